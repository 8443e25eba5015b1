"""Reference back-end: every expert on all rows, weighted. What the others are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from mole.moe.dispatch.plan import ExpertPlan, gated


def reference(plan: ExpertPlan, x: Tensor, ids: Tensor, weights: Tensor, limit: int | None = None) -> Tensor:
    """Σ_e g_e f_e(x) over all experts, g_e = 0 where e was not chosen."""
    total = None
    for index in range(plan.num_experts):
        gates = torch.where(ids == index, weights, 0.0).sum(-1)
        share = gated(plan.call(index, x), gates)
        total = share if total is None else total + share
    assert total is not None
    return total
