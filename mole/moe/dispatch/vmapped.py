"""vmap back-end: the experts' parameters stacked, one call over [E, C, d] with C the most rows of an expert.

For experts of one architecture. With a `limit` all shapes are known beforehand, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mole.kernels.precision import autocast_dtype, without_autocast
from mole.moe.dispatch.plan import ExpertPlan, gated, sorted_keys


def vmapped(plan: ExpertPlan, x: Tensor, ids: Tensor, weights: Tensor, limit: int | None = None) -> Tensor:
    """Σ over the slots; shapes as of every back-end."""
    rows, k = ids.shape
    experts, (keys, order) = plan.num_experts, sorted_keys(ids, plan.num_experts)
    starts = torch.searchsorted(keys, torch.arange(experts + 1, device=ids.device))
    if limit is None:
        limit = max(1, int(starts.diff().max()))
    limit = min(limit, rows)
    places = torch.arange(len(keys), device=ids.device) - starts.index_select(0, keys)
    # The last place takes the slots of nobody; places without a slot are row 0 with gate 0.
    target = torch.where((keys < experts) & (places < limit), keys * limit + places, experts * limit)
    table = torch.zeros(experts * limit + 1, dtype=torch.long, device=ids.device).scatter(0, target, order // k)[:-1]
    slots = torch.full((experts * limit + 1,), rows * k, device=ids.device).scatter(0, target, order)[:-1]
    gates = torch.cat([weights.reshape(-1), weights.new_zeros(1)]).index_select(0, slots)
    out = _called(plan, x.index_select(0, table).view(experts, limit, *x.shape[1:])).flatten(0, 1)
    return out.new_zeros(rows, *out.shape[1:]).index_add(0, table, gated(out, gates))


def _called(plan: ExpertPlan, rows: Tensor) -> Tensor:
    """[E, C, d] → [E, C, *out]."""
    # Calls of a plain expert are its own: a module made here would not be traced.
    module, prefix = (plan.experts[0], "") if plan.plain else (_Call(plan), "expert.")
    dtype = autocast_dtype(rows)
    states = [dict(expert.named_parameters()) for expert in plan.experts]
    buffers = [dict(expert.named_buffers()) for expert in plan.experts]
    stacked = {f"{prefix}{name}": _cast(torch.stack([one[name] for one in states]), dtype) for name in states[0]}
    held = {f"{prefix}{name}": torch.stack([one[name] for one in buffers]) for name in buffers[0]}

    def one(parameters: dict[str, Tensor], own: dict[str, Tensor], some: Tensor) -> Tensor:
        return functional_call(module, (parameters, own), (some.unsqueeze(0),)).squeeze(0)

    # Autocast does not reach the batched products: what it would cast is cast here.
    with without_autocast(rows):
        return vmap(one, randomness="different")(stacked, held, _cast(rows, dtype))


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


class _Call(nn.Module):
    """The first expert, called as the block calls experts; its parameters are put in by functional_call."""

    def __init__(self, plan: ExpertPlan):
        super().__init__()
        self.expert = plan.experts[0]
        self.call = plan.forward

    def forward(self, rows: Tensor) -> Tensor:
        return self.call(self.expert, rows)
