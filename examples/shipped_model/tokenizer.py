"""The shipped model's tokenizer: byte-level BPE in which each digit is a token, and its chat template."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.shipped_model import data

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")
MAX_LENGTH = 2048


def train_tokenizer(seed: int, vocab_size: int, num_conversations: int = 20_000) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, trained on conversations of this seed."""
    tokenizer = Tokenizer(models.BPE())
    # A space is a token of its own, so that a word reads the same in a sentence and between a JSON string's quotes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (END_OF_TEXT, TURN_START, TURN_END)]
    markers = [AddedToken(text, special=False, normalized=False) for text in MARKERS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    conversations = itertools.islice(data.training(seed), num_conversations)
    tokenizer.train_from_iterator((_without_markup(conversation) for conversation in conversations), trainer)
    tokenizer.add_tokens(markers)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: the data gave {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The files that `transformers.AutoTokenizer` reads: tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": TEMPLATE_FILE.read_text(encoding="utf-8"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def render(messages: list[data.Message], tools: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    """The conversation as the model reads it."""
    return _template().render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE_FILE.read_text(encoding="utf-8"))


def _without_markup(conversation: data.Conversation) -> str:
    """Markers become line ends, so that no merge is spent on parts of them."""
    text = render(conversation.messages, conversation.tools)
    for marker in (END_OF_TEXT, TURN_START, TURN_END, *MARKERS):
        text = text.replace(marker, "\n")
    return text
