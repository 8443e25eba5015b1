"""The LoRA factors of several experts at one layer, stacked so that one matrix product serves them all."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class LoraStack(NamedTuple):  # made at every call of every layer: a dataclass takes five times as long
    """n experts with their own ranks r_e, R = Σ r_e.

    `A`      [R, d_in]   rows of expert 0, then of expert 1, …
    `B`      [d_out, R]  columns in the same order
    `scales` float32 [n] s_e of each expert (alpha / r, or alpha / √r); float64 for factors in float64
    `ranks`  r_e of each expert
    `columns` int64 [R]  the expert that each column of B belongs to
    `spread` [R, n], in the dtype of `scales`: s_e where the column is expert e's, 0 elsewhere
    The last two are made from the others where they are needed and missing.
    """

    A: Tensor
    B: Tensor
    scales: Tensor
    ranks: tuple[int, ...]
    columns: Tensor | None = None
    spread: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def equal_ranks(self) -> bool:
        return self.ranks.count(self.ranks[0]) == len(self.ranks)

    def slices(self) -> list[slice]:
        """The rows of A (columns of B) that belong to each expert."""
        ends = list(accumulate(self.ranks))
        return [slice(end - rank, end) for rank, end in zip(self.ranks, ends, strict=True)]

    def column_experts(self) -> Tensor:
        """`columns`."""
        return columns_of(self.ranks, self.A.device) if self.columns is None else self.columns

    def spread_scales(self) -> Tensor:
        """`spread`, which takes weights of experts [..., n] to those of columns, [..., R], in one product."""
        return spread_of(self.column_experts(), self.scales) if self.spread is None else self.spread


def columns_of(ranks: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """int64 [Σ r_e]: expert e, r_e times. For ranks 1, 3: 0 1 1 1."""
    return torch.tensor([expert for expert, rank in enumerate(ranks) for _ in range(rank)], device=device)


def spread_of(columns: Tensor, scales: Tensor) -> Tensor:
    """[R, n]: the scale of each expert in its columns."""
    return (columns[:, None] == torch.arange(len(scales), device=columns.device)) * scales
