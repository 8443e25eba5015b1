"""Text-to-text tasks made by a random generator: as many examples as wanted, checkable by exact match, no download.

Each asks, in words that the tiny backbone has not met, for something that it learnt under other words; so an expert
has to connect, not to learn from nothing, as with large backbones.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from pydantic import Field

from mole.data.encode import Encoded, assemble, encode_pair, longest
from mole.data.samples import DataSplits
from mole.registry import DATASETS, config_dataclass

CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_word(rng: random.Random, shortest: int, longest: int) -> str:
    """A pronounceable word: consonants and vowels in turn."""
    length = rng.randint(shortest, longest)
    starts_with_vowel = rng.random() < 0.3
    return "".join(
        rng.choice(VOWELS if (position % 2 == 0) == starts_with_vowel else CONSONANTS) for position in range(length)
    )


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """The sum of two numbers."""
    a, b = rng.randint(1, 49), rng.randint(1, 49)
    return f'Give the total of "{a}, {b}".\n', str(a + b)


def reverse(rng: random.Random) -> tuple[str, str]:
    """A word from its end to its beginning."""
    word = random_word(rng, 3, 6)
    return f'How is "{word}" read from its end?\n', word[::-1]


def sorting(rng: random.Random) -> tuple[str, str]:
    """The letters of a word in alphabetical order."""
    word = random_word(rng, 3, 6)
    return f'Put "{word}" in order, please.\n', "".join(sorted(word))


def shouting(rng: random.Random) -> tuple[str, str]:
    """A word in capital letters."""
    word = random_word(rng, 3, 6)
    return f'Shout "{word}" at me!\n', word.upper()


def consonants(rng: random.Random) -> tuple[str, str]:
    """A word without its vowels."""
    word = random_word(rng, 4, 7)
    return f'Strip "{word}" of a e i o u.\n', "".join(letter for letter in word if letter not in VOWELS)


def initials(rng: random.Random) -> tuple[str, str]:
    """The first letters of three words."""
    words = [random_word(rng, 2, 4) for _ in range(3)]
    return f'Abbreviate "{"-".join(words)}".\n', "".join(word[0] for word in words)


def cipher(rng: random.Random) -> tuple[str, str]:
    """A word with every letter replaced by the next of the alphabet (a follows z)."""
    word = random_word(rng, 3, 6)
    return f'Encrypt "{word}" for us.\n', "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in word)


@config_dataclass
class GeneratedConfig:
    """Fields that every generated task has."""

    name: str
    task: str | None = None
    examples: int = Field(default=2000, ge=1)
    validation_examples: int = Field(default=100, ge=0)
    test_examples: int = Field(default=200, ge=0)
    max_length: int | None = Field(default=None, ge=2)


@config_dataclass
class ArithmeticConfig(GeneratedConfig):
    name: Literal["arithmetic"] = "arithmetic"


@config_dataclass
class ReverseConfig(GeneratedConfig):
    name: Literal["reverse"] = "reverse"


@config_dataclass
class SortingConfig(GeneratedConfig):
    name: Literal["sorting"] = "sorting"


@config_dataclass
class ShoutingConfig(GeneratedConfig):
    name: Literal["shouting"] = "shouting"


@config_dataclass
class ConsonantsConfig(GeneratedConfig):
    name: Literal["consonants"] = "consonants"


@config_dataclass
class InitialsConfig(GeneratedConfig):
    name: Literal["initials"] = "initials"


@config_dataclass
class CipherConfig(GeneratedConfig):
    name: Literal["cipher"] = "cipher"


Generator = Callable[[random.Random], tuple[str, str]]


def _distinct(generate: Generator, name: str, rng: random.Random, count: int, taken: set[str]) -> Iterator:
    """`count` examples whose prompts are not in `taken`, which grows by them."""
    for made in range(count):
        for _ in range(1000):
            prompt, completion = generate(rng)
            if prompt not in taken:
                break
        else:
            raise ValueError(f"dataset {name}: found only {made} different examples, not {count}: ask for fewer")
        taken.add(prompt)
        yield prompt, completion


def _unlimited(generate: Generator, rng: random.Random, count: int, taken: set[str]) -> Iterator:
    """`count` examples whose prompts are not in `taken`; one may come more than once."""
    made = 0
    while made < count:
        prompt, completion = generate(rng)
        if prompt not in taken:
            made += 1
            yield prompt, completion


def draw(
    generate: Generator, name: str, seed: int, *, train: int, validation: int, test: int
) -> dict[str, Iterator | list | None]:
    """As many prompts with answers for each split: those of held-out ones differ; None where none are wanted."""
    taken: set[str] = set()
    held_out = {}
    for split, count in (("test", test), ("validation", validation)):
        rng = random.Random(f"{name} {split} {seed}")
        held_out[split] = list(_distinct(generate, name, rng, count, taken)) if count else None
    return {"train": _unlimited(generate, random.Random(f"{name} train {seed}"), train, taken), **held_out}


def load_generated(
    generate: Generator, config: GeneratedConfig, tokenizer: Any, *, seed: int, context_length: int | None
) -> DataSplits:
    """The splits of a generated task: no prompt of one is in another, and the test split depends on the seed alone."""
    name = config.name
    pairs = draw(
        generate,
        name,
        seed,
        train=config.examples,
        validation=config.validation_examples,
        test=config.test_examples,
    )
    max_length = longest(config.max_length, context_length)

    def encode(split: str, examples: Any) -> Iterator[Encoded]:
        for number, (prompt, completion) in enumerate(examples, start=1):
            yield encode_pair(
                tokenizer,
                prompt,
                completion,
                task=config.task or name,
                max_length=max_length,
                where=f"{split} example {number}",
            )

    splits = {split: None if examples is None else encode(split, examples) for split, examples in pairs.items()}
    return assemble(name, splits, max_unsupervised=0.0)


for _config, _generate in (
    (ArithmeticConfig, arithmetic),
    (ReverseConfig, reverse),
    (SortingConfig, sorting),
    (ShoutingConfig, shouting),
    (ConsonantsConfig, consonants),
    (InitialsConfig, initials),
    (CipherConfig, cipher),
):
    DATASETS.register(_generate.__name__, _config)(partial(load_generated, _generate))
