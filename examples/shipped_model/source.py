"""Where phrasings, numbers and names come from, and the line between training and held-out ones."""

import random
import zlib
from dataclasses import dataclass, field

from examples.shipped_model import phrases
from examples.shipped_model.phrases import Phrases
from jaxcept.tools.builtin import TABLE

ATTRIBUTES = {name: tuple(facts) for name, facts in TABLE.items()}
SYLLABLES = tuple(
    "ba be bo da del do el en fa gor ha il in ka kor la lan li lo ma mar mi mo na nel no or pa per ra ran ri ro "  # noqa: SIM905
    "sa sel si ta tor tu ul va vel vi wa wen xi ya yo za zor".split()
)
ONSETS = (
    "b c d f g h j k l m n p r s t v w y z br ch cl cr dr fl fr gl gr ph pl pr qu sc sh sl sp st str th tr wh".split()  # noqa: SIM905
)
VOWELS = "a e i o u y ai au ea ee eo ia ie io oa oo ou ua ue".split()  # noqa: SIM905
CODAS = ("", "", "", *"b ck d f g k l ll m n nd ng nt p r rd rk rs s ss st t th x z".split())  # noqa: SIM905


@dataclass(slots=True)
class Source:
    """Draws phrasings, numbers and names from one side of the split."""

    rng: random.Random
    held_out: bool
    used: set[str] = field(default_factory=set)

    def phrase(self, choice: Phrases) -> str:
        drawn = self.rng.choice(choice.held_out if self.held_out else choice.train)
        self.used.add(drawn)
        return drawn

    def number(self, max_digits: int = 6, decimals: bool = True) -> str:
        """A positive number in decimal digits; of two digits or more it is from this side of the split."""
        while True:
            num_digits = min(max_digits, self.rng.choices((1, 2, 3, 4, 5, 6), (15, 34, 30, 15, 4, 2))[0])
            text = str(self.rng.randint(10 ** (num_digits - 1), 10**num_digits - 1))
            if decimals and self.rng.random() < 0.06:
                text += "." + str(self.rng.randint(1, 99)).rstrip("0")
            if len(text) == 1 or is_reserved(text) == self.held_out:
                return text

    def numbers(self, count: int, max_digits: int = 6) -> list[str]:
        """Numbers of which at least one has two digits or more."""
        while True:
            drawn = [self.number(max_digits) for _ in range(count)]
            if any(len(text) > 1 for text in drawn):
                return drawn

    def word(self, capital: bool = False) -> str:
        """A made-up word of this side of the split; in training half of them are spelled from all letters."""
        while True:
            if not self.held_out and self.rng.random() < 0.5:
                text = self._spelled()
            else:
                text = "".join(self.rng.choices(SYLLABLES, k=self.rng.choice((2, 2, 3, 3, 4))))
            if is_reserved(text) == self.held_out:
                return text.capitalize() if capital else text

    def _spelled(self) -> str:
        choice = self.rng.choice
        return "".join(choice(ONSETS) + choice(VOWELS) + choice(CODAS) for _ in range(choice((1, 2, 2, 3))))

    def entity(self, attribute: str | None = None, real: bool = False) -> tuple[str, str]:
        """A name and one of its attributes; in training half of the names are made up."""
        if not real and not self.held_out and self.rng.random() < 0.5:
            words = [self.word(capital=True) for _ in range(self.rng.choice((1, 1, 1, 2)))]
            return " ".join(words), attribute or self.rng.choice(tuple(phrases.LOOKUPS))
        names = [
            n for n in TABLE if is_reserved(n.lower()) == self.held_out and (attribute or ATTRIBUTES[n][0]) in TABLE[n]
        ]
        name = self.rng.choice(names)
        return name, attribute or self.rng.choice(ATTRIBUTES[name])


def is_reserved(text: str) -> bool:
    """Whether a number or name is kept out of training."""
    return zlib.crc32(text.encode()) % 8 == 0
