"""The LoRA factors of several experts at one layer, stacked so that one matrix product serves them all."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class LoraStack(NamedTuple):  # made at every call of every layer: a dataclass takes five times as long
    """n experts with their own ranks r_e, R = Σ r_e.

    `A`      [R, d_in]   rows of expert 0, then of expert 1, …
    `B`      [d_out, R]  columns in the same order; best a view of [R, d_out], where each expert's lie together
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

    def blocks(self, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """A as [n, r, d_in] and B as [n, r, d_out] with one r for all, a multiple of `multiple`.

        Views where ranks allow it; else copies, in which the rows that an expert lacks are 0.
        """
        n, widest = len(self.ranks), max(self.ranks)
        rank = -(-widest // multiple) * multiple
        A, B = self.A, self.B.t()
        if not self.equal_ranks or rank != widest:
            starts = [e * rank - part.start for e, part in enumerate(self.slices())]
            places = torch.arange(A.shape[0], device=A.device)
            places = places + torch.tensor(starts, device=A.device).index_select(0, self.column_experts())
            A = A.new_zeros(n * rank, A.shape[1]).index_copy(0, places, A)
            B = B.new_zeros(n * rank, B.shape[1]).index_copy(0, places, B)
        return A.reshape(n, rank, -1), B.reshape(n, rank, -1)

    def part(self, places: list[int]) -> LoraStack:
        """The stack of some of the experts, in that order; views where they are neighbours."""
        if places == list(range(len(self.ranks))):
            return self
        slices = self.slices()
        ranks = tuple(self.ranks[place] for place in places)
        if places == list(range(places[0], places[-1] + 1)):
            rows = slice(slices[places[0]].start, slices[places[-1]].stop)
            scales = self.scales[places[0] : places[-1] + 1]
            return LoraStack(self.A[rows], self.B[:, rows], scales, ranks)
        A = torch.cat([self.A[slices[place]] for place in places], dim=0)
        B = torch.cat([self.B[:, slices[place]].t() for place in places], dim=0).t()
        return LoraStack(A, B, self.scales[places], ranks)


def columns_of(ranks: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """int64 [Σ r_e]: expert e, r_e times. For ranks 1, 3: 0 1 1 1."""
    return torch.tensor([expert for expert, rank in enumerate(ranks) for _ in range(rank)], device=device)


def spread_of(columns: Tensor, scales: Tensor) -> Tensor:
    """[R, n]: the scale of each expert in its columns."""
    return (columns[:, None] == torch.arange(len(scales), device=columns.device)) * scales


def over_all(weights: Tensor, ids: Tensor | None, num_experts: int) -> Tensor:
    """`weights` [.., K] of the experts `ids` as weights of all, [.., n]: repeats add up, other ids are nobody's."""
    if ids is None:
        return weights
    ids = ids.expand_as(weights)
    known = (ids >= 0) & (ids < num_experts)
    filled = torch.where(known, weights, torch.zeros_like(weights))
    empty = weights.new_zeros(*weights.shape[:-1], num_experts)
    return empty.scatter_add(-1, ids.clamp(0, num_experts - 1), filled)
