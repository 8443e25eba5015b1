"""Cross-entropy per supervised token, in nats, by task; per whole text where a head says something of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole.data import IGNORED, Sample, targets_of
from mole.evaluation.mode import device_of, evaluating, moved
from mole.evaluation.predictions import predict

POSITIONS_AT_ONCE = 1024  # rows of the vocabulary that are float32 at a time


class TaskLoss(NamedTuple):
    """`loss` in nats per token, the mean over `tokens` supervised tokens.

    Of whole texts: nats, or squared error, per text, and `tokens` counts texts.
    """

    loss: float
    tokens: int


def mean_loss(
    model: nn.Module,
    samples: Sequence[Sample],
    collate: Callable[[list[Sample]], dict[str, Any]],
    *,
    batch_size: int,
    device: torch.device | str | None = None,
) -> dict[str, TaskLoss]:
    """Task name → loss, for the samples of each task, in order of first appearance.

    `collate` makes a batch of samples; its `labels` [B, T] (-100: not supervised) stay here, every other key goes to
    `model` as a keyword, whose output has `logits` [B, T, V]. `device` is where the tensors go (None: where the model
    is). Of samples with a target, labels are [B] and logits [B, C], [B, 1] of a regression; see `predict` for what
    then goes to the model. The sums are float64 and taken in the samples' order, so batch size and padding matter only
    as far as they change the model's own rounding. Raises ValueError if there are no samples, or a task has nothing
    supervised.
    """
    if not samples:
        raise ValueError("there is nothing to evaluate: no samples")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    where = device_of(model) if device is None else torch.device(device)
    if any(sample.target is not None for sample in samples):
        logits = predict(model, samples, collate, batch_size=batch_size, device=where)
        return by_task(samples, text_losses(logits, samples), [1] * len(samples))
    sums, counts = [0.0] * len(samples), [0] * len(samples)
    # Samples of like length together: less padding; the longest first, so that too large a batch fails at once.
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].input_ids))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = moved(collate([samples[index] for index in indices]), where)
            labels = batch.pop("labels")
            row_sums, row_counts = _row_losses(model(**batch).logits, labels, batch.get("attention_mask"))
            for index, row_sum, row_count in zip(indices, row_sums.tolist(), row_counts.tolist(), strict=True):
                sums[index], counts[index] = row_sum, row_count
    return by_task(samples, sums, counts)


def by_task(samples: Sequence[Sample], sums: list[float], counts: list[int]) -> dict[str, TaskLoss]:
    """Task name → mean, from each sample's summed loss and number of tokens."""
    rows_of: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        rows_of.setdefault(sample.task, []).append(index)
    return {task: _mean(task, [sums[i] for i in rows], [counts[i] for i in rows]) for task, rows in rows_of.items()}


def text_losses(logits: Tensor, samples: Sequence[Sample]) -> list[float]:
    """Each sample's loss by its logits [N, C], in float64: the cross-entropy of its label, or the squared error."""
    targets = targets_of(samples)
    assert targets is not None
    logits = logits.double()
    if targets.is_floating_point():
        return (logits.squeeze(-1) - targets.double()).square().tolist()
    return functional.cross_entropy(logits, targets, reduction="none").tolist()


def _row_losses(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per row the float64 sum of its tokens' losses and their number; the token at t is predicted at t - 1."""
    targets = labels[:, 1:].to(logits.device)
    supervised = targets != IGNORED
    if mask is not None:
        valid = mask.to(logits.device).bool()
        supervised &= valid[:, 1:] & valid[:, :-1]  # with padding on the left, nothing precedes the first token
    rows, positions = supervised.nonzero(as_tuple=True)
    losses = [
        functional.cross_entropy(logits[row, position].float(), targets[row, position], reduction="none").cpu().double()
        for row, position in zip(rows.split(POSITIONS_AT_ONCE), positions.split(POSITIONS_AT_ONCE), strict=True)
    ]
    sums = torch.zeros(len(targets), dtype=torch.float64)  # on the CPU: some accelerators have no float64
    if losses:
        sums.index_add_(0, rows.cpu(), torch.cat(losses))
    return sums, supervised.sum(1)


def _mean(name: str, sums: list[float], counts: list[int]) -> TaskLoss:
    tokens = sum(counts)
    if not tokens:
        raise ValueError(f"task {name!r} has no supervised token to evaluate")
    broken = [value for value in sums if not math.isfinite(value)]
    return TaskLoss((sum(broken) if broken else math.fsum(sums)) / tokens, tokens)


def total(losses: Iterable[TaskLoss]) -> TaskLoss:
    """The loss over all tokens of several tasks: each token counts alike."""
    each = list(losses)
    return _mean("all tasks", [one.loss * one.tokens for one in each], [one.tokens for one in each])
