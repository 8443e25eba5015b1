"""Loop back-end: the slots sorted by expert, one call for each expert that has any. For experts of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

from mole.moe.dispatch.plan import ExpertPlan, gated, sorted_slots, with_unused


def loop(plan: ExpertPlan, x: Tensor, ids: Tensor, weights: Tensor, limit: int | None = None) -> Tensor:
    """Σ over the slots; shapes as of every back-end. Waits for the device once."""
    slots = sorted_slots(ids, weights, plan.num_experts)
    rows = x.index_select(0, slots.tokens).split(slots.counts)
    made = [(index, plan.call(index, some)) for index, some in enumerate(rows) if len(some)]
    plan.alike(made, 1)
    parts = [out for _, out in made]
    out = torch.cat(parts) if parts else plan.nothing(x)
    y = out.new_zeros(x.shape[0], *out.shape[1:]).index_add(0, slots.tokens, gated(out, slots.gates))
    return with_unused(y, plan, slots.counts)
