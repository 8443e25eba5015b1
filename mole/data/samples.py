"""What training and evaluation see: samples of token ids with labels, in train, validation and test splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

from mole.head import Head

IGNORED = -100
Item = TypeVar("Item")


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """`limit` of the items at equal distances from first to last, in order; all of them if `limit` is None or more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


@dataclass(frozen=True)
class Sample:
    """One example. `labels[i]` is `input_ids[i]` where the token is supervised, else -100; both have one length.

    `prompt_ids` is a prefix of `input_ids` and what generation is given; `completion` is the text that it should
    give. Windows of plain text have no prompt: there `prompt_ids` holds at most the beginning-of-sequence token.

    Where a head is to say something of the whole text, `target` is what: the index of a label, or the number of a
    regression. Then no token is supervised, `completion` is the label's name, and `prompt_ids` are all ids.
    `token_types` tells a first text from a second (0, 1), as long as `input_ids`; empty: one kind. `row`: where the
    example stood, as in "dev.tsv:12".
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    task: str
    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    target: int | float | None = None
    token_types: tuple[int, ...] = ()
    row: str = ""

    @property
    def supervised(self) -> int:
        """What the loss counts: tokens, of which the first of a sequence is never one; 1 where there is a target."""
        if self.target is not None:
            return 1
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Split(Sequence[Sample]):
    """The samples of one split, in a fixed order."""

    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Split": ...
    def __getitem__(self, index: int | slice) -> "Sample | Split":
        if isinstance(index, slice):
            return Split(self.samples[index])
        return self.samples[index]


@dataclass(frozen=True)
class DataSplits:
    """A dataset, tokenized.

    `validation` and `test` are None where the config asks for none. `dropped` counts the examples that had no
    supervised token, `truncated` those cut to the longest length allowed (over all splits). `fingerprint` is the
    sha256 of every id, label and task name in order. `head` is what a task of whole texts asks of a model, and
    `metric` the name of its main score; None for text to be continued.
    """

    train: Split
    validation: Split | None
    test: Split | None
    name: str
    fingerprint: str
    dropped: int = 0
    truncated: int = 0
    head: Head | None = None
    metric: str | None = None
