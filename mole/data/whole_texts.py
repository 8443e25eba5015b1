"""From a text, or a pair of texts, with a label to a sample whose target is what a head should say of the whole."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

from mole.data.encode import Encoded
from mole.data.samples import IGNORED, Sample
from mole.head import Head
from mole.registry import unknown

Metric = Literal["accuracy", "mcc", "accuracy_f1", "accuracy_macro_f1", "pearson_spearman"]
AT_ONCE = 1000  # texts that the tokenizer is given together


@dataclass(frozen=True)
class LabelledText:
    """A text, perhaps with a second, and what is to be said of it.

    `target`: the label's index, or the number of a regression; `label`: the same in words; `where`: file and line.
    """

    text: str
    second: str | None
    target: int | float
    label: str
    where: str


def encode_texts(
    tokenizer: Any, rows: Iterable[LabelledText], *, task: str, max_length: int | None
) -> Iterator[Encoded]:
    """Each row as a sample, in order; its ids are those of the tokenizer's own call for one text or for a pair.

    What is longer than `max_length` tokens loses the ends of its longer text (`longest_first`).
    """
    for is_pair, alike in groupby(rows, key=lambda row: row.second is not None):
        while part := list(islice(alike, AT_ONCE)):
            texts, seconds = [row.text for row in part], [row.second for row in part] if is_pair else None
            cut = {"truncation": "longest_first", "max_length": max_length} if max_length else {}
            found = tokenizer(texts, seconds, verbose=False, **cut)
            kinds = found.get("token_type_ids") or [()] * len(part)
            for row, ids, types in zip(part, found["input_ids"], kinds, strict=True):
                is_cut = len(ids) == max_length and len(tokenizer(row.text, row.second, verbose=False)["input_ids"])
                yield _encoded(row, ids, types, task, truncated=is_cut > len(ids))


def _encoded(row: LabelledText, ids: list[int], types: Iterable[int], task: str, truncated: bool) -> Encoded:
    text = row.text if row.second is None else f"{row.text}\n{row.second}"
    all_ids = tuple(ids)
    sample = Sample(
        input_ids=all_ids,
        labels=(IGNORED,) * len(ids),
        task=task,
        prompt=text,
        completion=row.label,
        prompt_ids=all_ids,
        target=row.target,
        token_types=tuple(types) if any(types) else (),  # zeros are what a model takes where it is given none
        row=row.where.rpartition("/")[2],
    )
    return Encoded(sample if ids else None, truncated, "" if ids else "it has no token", row.where, text)


def label_index(label: str, head: Head, where: str, hint: str = "") -> int:
    """The output that stands for `label`; ValueError, naming the row, if the head has none."""
    if label not in head.labels:
        raise ValueError(f"{where}: {unknown('label', label, head.labels)}{hint}")
    return head.labels.index(label)


def label_number(label: Any, where: str) -> float:
    """The number that a regression should give; ValueError, naming the row, for anything else."""
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: the label of a regression is a number, got {label!r}")
    return number


def default_metric(head: Head) -> Metric:
    """The main score of a task that names none."""
    return "accuracy" if head.kind == "classification" else "pearson_spearman"
