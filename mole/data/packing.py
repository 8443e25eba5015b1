"""Packed rows: short samples share a row, so that batches hold little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mole.data.samples import IGNORED, Sample


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens: the longest sample first, each into the first row that has room for it.

    Returns indices of `lengths`, every one once. First-fit decreasing needs at most 11/9 of the fewest rows, and one
    more (Johnson, 1973). Raises ValueError for a sample that is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into rows of {capacity}")
    size = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * size)  # a tree: room[i] is the most room in the rows below it; rows are the leaves
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < size:
            node = 2 * node + (room[2 * node] < lengths[index])
        if node - size == len(rows):
            rows.append([])
        rows[node - size].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def collate_packed(rows: Sequence[Sequence[Sample]], pad_token_id: int) -> dict[str, Any]:
    """One batch of B rows, T positions long (the longest row), of S samples.

    Returns `input_ids` and `labels` (int64 [B, T]; labels are -100 on prompts, padding and the first token of each
    sample), `position_ids` (int64 [B, T], from 0 in every sample, by which a backbone finds the borders), `segment_ids`
    (int64 [B, T]: which sample, -1 at padding), `prompt_mask` (bool [B, T]), `task_names` and `texts` (lists of S).
    There is no `attention_mask`: with one, backbones do not look for borders. Raises ValueError for samples of whole
    texts, which have one answer for a row.
    """
    if not rows or not all(rows):
        raise ValueError("a batch needs at least one row, and a row at least one sample")
    samples = [sample for row in rows for sample in row]
    if any(sample.target is not None for sample in samples):
        raise ValueError(
            "packing is for text to be continued, and this data is to be classified: training.packing=null"
        )
    shape = (len(rows), max(sum(len(sample.input_ids) for sample in row) for row in rows))
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED)
    segment_ids, position_ids = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    number = 0
    for place, row in enumerate(rows):
        end = 0
        for sample in row:
            here = slice(end, end + len(sample.input_ids))
            input_ids[place, here] = torch.tensor(sample.input_ids)
            labels[place, here] = torch.tensor((IGNORED, *sample.labels[1:]))
            segment_ids[place, here] = number
            position_ids[place, here] = torch.arange(len(sample.input_ids))
            number, end = number + 1, here.stop
        position_ids[place, end:] = torch.arange(shape[1] - end)
    first = position_ids == 0
    unsupervised = torch.tensor([sample.labels[0] == IGNORED for sample in samples])
    prompt_mask = (labels == IGNORED) & (segment_ids >= 0)
    prompt_mask &= ~first | unsupervised[segment_ids.clamp_min(0)]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "prompt_mask": prompt_mask,
        "task_names": [sample.task for sample in samples],
        "texts": [sample.prompt for sample in samples],
    }
