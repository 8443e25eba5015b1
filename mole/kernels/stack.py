"""The LoRA factors of several experts at one layer, stacked so that one matrix product serves them all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraStack:
    """n experts with their own ranks r_e, R = Σ r_e.

    `A`      [R, d_in]   rows of expert 0, then of expert 1, …
    `B`      [d_out, R]  columns in the same order
    `scales` float32 [n] s_e of each expert (alpha / r, or alpha / √r)
    `ranks`  r_e of each expert
    """

    A: Tensor
    B: Tensor
    scales: Tensor
    ranks: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def equal_ranks(self) -> bool:
        return len(set(self.ranks)) == 1

    def slices(self) -> list[slice]:
        """The rows of A (columns of B) that belong to each expert."""
        ends = list(accumulate(self.ranks))
        return [slice(end - rank, end) for rank, end in zip(self.ranks, ends, strict=True)]

    def column_experts(self) -> Tensor:
        """int64 [R]: the expert that each column of B belongs to."""
        ranks = torch.tensor(self.ranks, device=self.A.device)
        return torch.arange(self.num_experts, device=self.A.device).repeat_interleave(
            ranks, output_size=sum(self.ranks)
        )
