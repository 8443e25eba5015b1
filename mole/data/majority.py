"""Generated tasks of whole texts: are there more words of one kind than of another? No download, as many as wanted.

A text is 16 words, each drawn alike from w05 … w59, so about six of them decide; the rest are noise, and what decides
one task is noise to the other.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pydantic import Field

from mole.data.encode import Encoded, assemble, longest
from mole.data.generated import draw
from mole.data.samples import DataSplits
from mole.data.whole_texts import LabelledText, encode_texts, label_index
from mole.head import Head
from mole.registry import DATASETS, config_dataclass

WORDS = range(5, 60)
LENGTH = 16  # words of a text
HEAD = Head("classification", ("no", "yes"))


@config_dataclass
class MajorityConfig:
    """Fields that both tasks have."""

    name: str
    task: str | None = None
    examples: int = Field(default=2000, ge=1)
    validation_examples: int = Field(default=200, ge=0)
    test_examples: int = Field(default=500, ge=0)
    max_length: int | None = Field(default=None, ge=8)

    def head(self) -> Head:
        """What the task asks of a model."""
        return HEAD


@config_dataclass
class MajorityAConfig(MajorityConfig):
    name: Literal["majority_a"] = "majority_a"


@config_dataclass
class MajorityBConfig(MajorityConfig):
    name: Literal["majority_b"] = "majority_b"


def majority(more: range, less: range, rng: random.Random) -> tuple[str, str]:
    """A text and "yes" if it has more words of `more` than of `less`, else "no"; draws are thrown away."""
    while True:
        words = [rng.choice(WORDS) for _ in range(LENGTH)]
        lead = sum(word in more for word in words) - sum(word in less for word in words)
        if lead:
            return " ".join(f"w{word:02}" for word in words), "yes" if lead > 0 else "no"


majority_a = partial(majority, range(10, 20), range(20, 30))
majority_b = partial(majority, range(30, 40), range(40, 50))


def load_majority(
    generate: partial, config: MajorityConfig, tokenizer: Any, *, seed: int, context_length: int | None
) -> DataSplits:
    """The splits of such a task: no text of one is in another, and the test split depends on the seed alone."""
    name = config.name
    drawn = draw(
        generate,
        name,
        seed,
        train=config.examples,
        validation=config.validation_examples,
        test=config.test_examples,
    )
    max_length = longest(config.max_length, context_length)

    def encode(split: str, examples: Any) -> Iterator[Encoded]:
        rows = (
            LabelledText(text, None, label_index(label, HEAD, where), label, where)
            for number, (text, label) in enumerate(examples, start=1)
            for where in [f"{split} example {number}"]
        )
        return encode_texts(tokenizer, rows, task=config.task or name, max_length=max_length)

    splits = {split: None if examples is None else encode(split, examples) for split, examples in drawn.items()}
    return assemble(name, splits, max_unsupervised=0.0, head=HEAD, metric="accuracy")


for _config, _generate in ((MajorityAConfig, majority_a), (MajorityBConfig, majority_b)):
    DATASETS.register(_config.name, _config)(partial(load_majority, _generate))
