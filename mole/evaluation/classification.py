"""Scores of what a model says of whole texts: accuracy, F1, Matthews correlation; Pearson's and Spearman's.

None of them is ever undefined: where a formula divides zero by zero the score is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mole.head import Head
from mole.registry import unknown


def accuracy(predicted: Tensor, targets: Tensor) -> float:
    """The share of label indices [N] that are right."""
    return float((predicted == targets).sum()) / len(targets)


def f1(predicted: Tensor, targets: Tensor, positive: int = 1) -> float:
    """2·TP / (2·TP + FP + FN) of the label with index `positive`; 0 if it is neither predicted nor there."""
    hits = int(((predicted == positive) & (targets == positive)).sum())
    named = int((predicted == positive).sum()) + int((targets == positive).sum())
    return 2 * hits / named if named else 0.0


def macro_f1(predicted: Tensor, targets: Tensor, size: int) -> float:
    """The mean over the F1 of those of `size` labels that are predicted or there."""
    known = [label for label in range(size) if bool(((predicted == label) | (targets == label)).any())]
    return sum(f1(predicted, targets, label) for label in known) / len(known)


def mcc(predicted: Tensor, targets: Tensor) -> float:
    """Matthews correlation, for any number of labels (Gorodkin 2004); 0 if one label alone is predicted or there."""
    size = int(max(predicted.max(), targets.max())) + 1
    counts = torch.bincount(targets * size + predicted, minlength=size * size).view(size, size)
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    said, there = counts.sum(0).tolist(), counts.sum(1).tolist()
    spread = (total**2 - sum(n * n for n in said)) * (total**2 - sum(n * n for n in there))
    shared = right * total - sum(a * b for a, b in zip(said, there, strict=True))
    return shared / math.sqrt(spread) if spread else 0.0


def pearson(x: Tensor, y: Tensor) -> float:
    """The correlation of two rows of numbers [N]; 0 if either is constant."""
    x, y = x.double(), y.double()
    if bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return 0.0
    x, y = ((row - row.mean()) / (row - row.mean()).abs().max() for row in (x, y))
    found = float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())
    return max(-1.0, min(1.0, found))


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of the ranks of two rows of numbers [N], equal numbers sharing the mean of theirs."""
    return pearson(ranks(x), ranks(y))


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1 of numbers [N], float64; equal ones get the mean of the ranks that they take together."""
    _, places, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[places]


Parts = dict[str, float]


def _accuracy(logits: Tensor, targets: Tensor, head: Head) -> Parts:
    return {"accuracy": accuracy(logits.argmax(-1), targets)}


def _mcc(logits: Tensor, targets: Tensor, head: Head) -> Parts:
    return {"mcc": mcc(logits.argmax(-1), targets)}


def _accuracy_f1(logits: Tensor, targets: Tensor, head: Head) -> Parts:
    if head.size != 2:
        raise ValueError(
            f"metric accuracy_f1 is for two labels, and there are {head.size} ({', '.join(head.labels)}): choose "
            "accuracy_macro_f1"
        )
    return {**_accuracy(logits, targets, head), "f1": f1(logits.argmax(-1), targets)}


def _accuracy_macro_f1(logits: Tensor, targets: Tensor, head: Head) -> Parts:
    return {**_accuracy(logits, targets, head), "macro_f1": macro_f1(logits.argmax(-1), targets, head.size)}


def _pearson_spearman(logits: Tensor, targets: Tensor, head: Head) -> Parts:
    said = logits.squeeze(-1)
    return {"pearson": pearson(said, targets), "spearman": spearman(said, targets)}


METRICS: dict[str, Callable[[Tensor, Tensor, Head], Parts]] = {
    "accuracy": _accuracy,
    "mcc": _mcc,
    "accuracy_f1": _accuracy_f1,
    "accuracy_macro_f1": _accuracy_macro_f1,
    "pearson_spearman": _pearson_spearman,
}


def scores(metric: str, head: Head, logits: Tensor, targets: Any) -> dict[str, float]:
    """The parts of the main score `metric`, and that itself, their mean, as "score".

    `logits` [N, C] are those of `predict`, `targets` [N] label indices or numbers (a tensor or a sequence). Logits
    that are not finite make every part NaN: a model that broke has no score. Raises ValueError for an unknown metric,
    one that does not go with the head, and logits of another size than the head's.
    """
    if metric not in METRICS:
        raise ValueError(unknown("metric", metric, METRICS))
    is_regression = head.kind == "regression"
    if is_regression != (metric == "pearson_spearman"):
        raise ValueError(f"metric {metric} does not go with a head for {head.kind}")
    targets = torch.as_tensor(targets)
    if logits.shape != (len(targets), head.size) or not len(targets):
        raise ValueError(
            f"logits {list(logits.shape)} for {len(targets)} texts and a head of {head.size} outputs: "
            f"[{len(targets)}, {head.size}] with one text at least is wanted"
        )
    parts = METRICS[metric](logits, targets, head)
    if not bool(torch.isfinite(logits).all()):
        parts = dict.fromkeys(parts, math.nan)
    return {**parts, "score": sum(parts.values()) / len(parts)}
