"""From samples to batches: the order of an epoch, and padded tensors."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole.data.samples import IGNORED, Sample


def epoch_order(length: int, epoch: int, seed: int) -> list[int]:
    """The order in which epoch number `epoch` visits `length` samples: a permutation of `range(length)`.

    It depends on these three numbers alone, not on the number of processes: with several, each takes its share of
    this one order.
    """
    order = list(range(length))
    random.Random(f"epoch order {seed} {epoch}").shuffle(order)
    return order


WINDOW = 50  # batches whose samples are sorted together


def by_length(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """`order` with samples of like length next to each other, so that batches of `batch_size` hold little padding.

    Sorted within windows of 50 batches only, the batches of a window in an order of their own: training sees no drift
    from long to short. The same for the same `order`.
    """
    shuffled = random.Random(f"batches {len(order)} {order[:1]}")
    found: list[int] = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda index: -lengths[index])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        whole, short = [b for b in batches if len(b) == batch_size], [b for b in batches if len(b) < batch_size]
        shuffled.shuffle(whole)
        found += [index for batch in (*whole, *short) for index in batch]
    return found


def collate(samples: Sequence[Sample], pad_token_id: int, padding_side: str = "right") -> dict[str, Any]:
    """One padded batch of B samples, T tokens long (the longest sample).

    Returns `input_ids`, `attention_mask` and `labels` (int64 [B, T]; labels are -100 on prompts and padding),
    `prompt_mask` (bool [B, T]: a real token that is not supervised), `task_names` and `texts` (lists of B names and B
    prompts); `token_type_ids` (int64 [B, T]) if a sample tells two texts apart.
    Of samples with a target, `labels` is [B]: int64 label indices, or the float32 numbers of a regression.
    Padding is told from real tokens by position, so a padding token that is also the end-of-sequence token is safe.
    Raises ValueError if some samples have a target and others none, or a target of another kind.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is 'left' or 'right', got {padding_side!r}")
    if not samples:
        raise ValueError("a batch needs at least one sample")
    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    attention_mask, token_types = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        here = slice(0, length) if padding_side == "right" else slice(shape[1] - length, shape[1])
        input_ids[row, here] = torch.tensor(sample.input_ids, dtype=torch.long)
        labels[row, here] = torch.tensor(sample.labels, dtype=torch.long)
        attention_mask[row, here] = 1
        if sample.token_types:
            token_types[row, here] = torch.tensor(sample.token_types, dtype=torch.long)
    targets = targets_of(samples)
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels if targets is None else targets,
        "prompt_mask": attention_mask.bool() & (labels == IGNORED),
        "task_names": [sample.task for sample in samples],
        "texts": [sample.prompt for sample in samples],
    }
    return {**batch, "token_type_ids": token_types} if any(sample.token_types for sample in samples) else batch


def targets_of(samples: Sequence[Sample]) -> Tensor | None:
    """The targets [B] of samples: int64 label indices, float32 numbers, or None where the samples have none.

    Raises ValueError for samples of several kinds.
    """
    kinds = {type(sample.target): sample for sample in samples}
    if len(kinds) > 1:
        names = {type(None): "tokens to predict", int: "a label", float: "a number"}
        found = ", ".join(f"{names[kind]} (task {sample.task})" for kind, sample in kinds.items())
        raise ValueError(f"one batch has samples with {found}: train on datasets of one kind at a time")
    (kind,) = kinds
    if kind is type(None):
        return None
    return torch.tensor([sample.target for sample in samples], dtype=torch.float32 if kind is float else torch.long)
