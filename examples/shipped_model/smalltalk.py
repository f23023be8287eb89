"""Small questions that the shipped model answers without a tool."""

from dataclasses import dataclass

from examples.shipped_model.phrases import Phrases


@dataclass(frozen=True, slots=True)
class Intent:
    """A small question that needs no tool, and its one answer."""

    asked: Phrases
    answer: str


INTENTS = (
    Intent(
        Phrases(("hi", "hello", "hey", "hi there", "good morning", "hello again"), ("hello there", "hey there")),
        "Hello! How can I help you?",
    ),
    Intent(
        Phrases(
            ("how are you", "how are you doing", "how are you today", "are you well", "how do you do"),
            ("how are you doing today",),
        ),
        "I am fine, thank you. How can I help you?",
    ),
    Intent(
        Phrases(
            ("thanks", "thank you", "thank you very much", "many thanks", "thanks a lot", "great, thanks"),
            ("great, thank you", "ok, thanks"),
        ),
        "You are welcome.",
    ),
    Intent(
        Phrases(
            ("bye", "goodbye", "see you", "good night", "see you later", "bye bye", "goodbye and see you"),
            ("goodbye, see you later", "ok, bye"),
        ),
        "Goodbye!",
    ),
    Intent(
        Phrases(
            (
                "who are you",
                "what are you",
                "what is your name",
                "tell me your name",
                "what's your name",
                "tell me who you are",
            ),
            ("can you tell me your name", "tell me what you are"),
        ),
        "I am a small model that ships with jaxcept.",
    ),
    Intent(
        Phrases(
            (
                "what can you do",
                "how can you help me",
                "how can you be of help",
                "what can you help me with",
                "tell me how you can help",
                "what can i ask you",
                "what do you know",
                "help",
                "what are you able to do",
            ),
            ("tell me what you can do", "how can you help"),
        ),
        "I can calculate, convert units and look up facts with tools.",
    ),
    Intent(
        Phrases(
            (
                "what tools do you have",
                "which tools can you use",
                "which tools do you know",
                "what tools can you use",
                "tell me your tools",
            ),
            ("which tools do you have", "tell me which tools you can use"),
        ),
        "I use the tools that this conversation gives me.",
    ),
    Intent(
        Phrases(
            (
                "what color is the sky",
                "which color does the sky have",
                "tell me the color of the sky",
                "the color of the sky",
            ),
            ("what is the color of the sky",),
        ),
        "The sky is blue.",
    ),
    Intent(
        Phrases(
            ("what color is grass", "which color does grass have", "tell me the color of grass", "the color of grass"),
            ("what is the color of grass",),
        ),
        "Grass is green.",
    ),
    Intent(
        Phrases(
            (
                "how many days are in a week",
                "how many days does a week have",
                "tell me how many days are in a week",
                "how many days has a week",
            ),
            ("can you tell me how many days are in a week",),
        ),
        "A week has seven days.",
    ),
    Intent(
        Phrases(
            (
                "how many months are in a year",
                "how many months does a year have",
                "tell me how many months are in a year",
                "how many months has a year",
            ),
            ("can you tell me how many months are in a year",),
        ),
        "A year has twelve months.",
    ),
    Intent(
        Phrases(
            ("tell me a joke", "do you know a joke", "a joke, please", "make me laugh", "can you tell me a joke"),
            ("please tell me a joke", "i need a joke"),
        ),
        "Why did the model stop? It was waiting for its tool.",
    ),
    Intent(
        Phrases(
            (
                "is the earth round",
                "what shape is the earth",
                "tell me the shape of the earth",
                "which shape does the earth have",
            ),
            ("what is the shape of the earth",),
        ),
        "The earth is round.",
    ),
    Intent(
        Phrases(
            (
                "what sound does a dog make",
                "how does a dog sound",
                "what does a dog say",
                "tell me what a dog sounds like",
                "what does a dog sound like",
                "tell me how a dog sounds",
                "which sound does a dog make",
            ),
            ("tell me what a dog says",),
        ),
        "A dog barks.",
    ),
    Intent(
        Phrases(
            (
                "what sound does a cat make",
                "how does a cat sound",
                "what does a cat say",
                "tell me what a cat sounds like",
                "what does a cat sound like",
                "tell me how a cat sounds",
                "which sound does a cat make",
            ),
            ("tell me what a cat says",),
        ),
        "A cat meows.",
    ),
    Intent(
        Phrases(
            ("i am happy", "i am so happy", "i feel great", "i feel happy today", "i am very happy"),
            ("i am happy today", "i feel so happy"),
        ),
        "I am glad to hear that.",
    ),
    Intent(
        Phrases(
            ("i am sad", "i am so sad", "i feel bad", "i feel sad today", "i am very sad"),
            ("i am sad today", "i feel so sad"),
        ),
        "I am sorry to hear that.",
    ),
    Intent(
        Phrases(
            (
                "what language do you speak",
                "which language do you speak",
                "do you speak english",
                "which languages do you know",
            ),
            ("which languages do you speak",),
        ),
        "I speak a little English.",
    ),
)
