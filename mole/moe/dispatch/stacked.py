"""Stacked back-end: dense products over all experts, the hidden units weighted with the gates in between; no sorting.

    h = act(x [W_1 … W_E]);   y = [g_1 h_1 … g_E h_E] [V_1; …; V_E] + Σ_e g_e c_e,   g_e = 0 where e was not chosen

E / k times the arithmetic. For experts of one linear level, or two with what happens between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.kernels.precision import autocast_dtype, without_autocast
from mole.kernels.stack import over_all
from mole.moe.dispatch.plan import ExpertPlan
from mole.moe.dispatch.recipes import known, weights_of


class TooDeepError(ValueError):
    """A recipe with more than two linear levels, which stacking cannot serve."""


def stacked(plan: ExpertPlan, x: Tensor, ids: Tensor, weights: Tensor, limit: int | None = None) -> Tensor:
    """Σ over the slots; shapes as of every back-end. Waits for nothing."""
    found = known(plan.experts[0])
    assert found is not None
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        gates = over_all(weights, ids, plan.num_experts)
        layers = _Stack(plan.experts, gates, dtype)
        out = found.recipe(layers, x.to(dtype))
        if layers.levels < 2:  # the experts' outputs, [N, E, d_out]
            out = (out * gates[..., None]).sum(1).to(dtype)
        return out


class _Stack:
    """The layers of all experts on all rows: [N, d] → [N, E, h] → [N, d_out], the gates in the second."""

    def __init__(self, experts: Sequence[nn.Module], gates: Tensor, dtype: torch.dtype):
        self.experts, self.first, self.gates, self.dtype = experts, experts[0], gates, dtype
        self.levels = 0

    def linear(self, path: str, rows: Tensor) -> Tensor:
        mats, biases = weights_of(self.experts, path)
        if self.levels == 2:
            raise TooDeepError(f"{path or 'the expert'} is a third linear level: stacked serves two")
        if rows.dim() == 2:
            self.levels = 1
            wide = torch.cat([mat.t() for mat in mats]).to(self.dtype)  # [E·h, d]
            bias = None if biases is None else torch.cat(biases).to(self.dtype)
            return F.linear(rows, wide, bias).view(len(rows), len(self.experts), -1)
        self.levels = 2
        hidden = (rows * self.gates[..., None]).to(self.dtype).flatten(1)  # [N, E·h]
        out = hidden @ torch.cat(mats).to(self.dtype)
        return out if biases is None else out + self.gates.to(self.dtype) @ torch.stack(biases).to(self.dtype)
