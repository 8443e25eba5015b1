"""What the datasets of a command ask of a model, known before a tokenizer is: a head for whole texts, or none."""

from collections.abc import Iterable
from typing import Any

from mole.data.samples import DataSplits
from mole.data.whole_texts import default_metric
from mole.head import Head


def head_of(configs: dict[str, Any]) -> Head | None:
    """The head that all datasets want, by their configs; None for text to be continued.

    Label sets that are not fixed are read from the files. Raises ValueError, naming two datasets, if they want
    different heads, or one wants none; and what is wrong with a file.
    """
    wanted = {name: config.head() if hasattr(config, "head") else None for name, config in configs.items()}
    (first, head), *others = wanted.items() or {"": None}.items()
    for name, other in others:
        if other != head:
            raise ValueError(
                f"dataset {first} is {_said(head)}, and dataset {name} is {_said(other)}: one model has one head, so "
                "give datasets of one kind, with the same labels in the same order"
            )
    return head


def _said(head: Head | None) -> str:
    if head is None:
        return "text to be continued"
    return f"classification among {', '.join(head.labels)}" if head.labels else "regression"


def metric_of(datasets: Iterable[DataSplits]) -> str | None:
    """The main score of datasets with one head: theirs if they agree, else that of tasks which name none."""
    known = list(datasets)
    metrics = {splits.metric for splits in known}
    if len(metrics) == 1:
        return metrics.pop()
    head = known[0].head if known else None
    return default_metric(head) if head is not None else None
