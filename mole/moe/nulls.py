"""Null experts: choices that cost no call. zero adds nothing (the hole), identity g·x, constant g·v with v learned.

Jin et al. 2024, "MoE++", arXiv 2410.07348. Their ids follow those of the experts, in the order given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Nulls(nn.Module):
    """The null experts of a block behind `num_experts` real ones. `width` of the output, for constants."""

    def __init__(self, kinds: tuple[str, ...], num_experts: int, width: int | None):
        super().__init__()
        self.kinds, self.first = kinds, num_experts
        for place, kind in enumerate(kinds):
            if kind == "constant":
                assert width is not None
                self.register_parameter(f"constant_{place}", nn.Parameter(torch.zeros(width)))

    def forward(self, y: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`y` [N, *out] with what the null experts add. `x` [N, *in], `ids` and `weights` [N, K]."""
        for place, kind in enumerate(self.kinds):
            if kind == "zero":
                continue
            gate = torch.where(ids == self.first + place, weights, 0.0).sum(-1)
            gate = gate.view(-1, *(1,) * (y.dim() - 1))
            if kind == "identity":
                alike(x, y, "null_experts")
                y = y + (gate * x).to(y.dtype)
            else:
                y = y + (gate * self.get_parameter(f"constant_{place}")).to(y.dtype)
        return y


def alike(x: Tensor, y: Tensor, who: str) -> Tensor:
    """`x`, if it has the shape of the output `y`. Raises ValueError, naming the setting that needs it."""
    if x.shape != y.shape:
        raise ValueError(
            f"{who}: identity needs experts whose output has the shape of their input, {tuple(x.shape[1:])}, got "
            f"{tuple(y.shape[1:])}"
        )
    return x
