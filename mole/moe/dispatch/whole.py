"""Experts that see more than a token: everything with the other tokens at zero, or their own tokens per sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mole.moe.dispatch.plan import ExpertPlan, gated, with_unused
from mole.moe.quiet import quietly


def zeros(plan: ExpertPlan, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x [B, *between, d], ids and weights [N, K], N the tokens of x → [B, *between, *out].

    Each expert that anybody chose runs on x with the other tokens at zero.
    """
    lead, total, first = x.shape[:-1], None, None
    counts = _counts(ids, plan.num_experts)
    for index, count in enumerate(counts):
        if not count:
            continue
        mine = ids == index
        kept = x * mine.any(-1).view(*lead, 1).to(x.dtype)
        out = plan.checked(index, plan.forward(plan.experts[index], kept), x, len(lead))
        first = first or (index, out.detach())
        plan.alike([first, (index, out)], len(lead))
        gates = torch.where(mine, weights, 0.0).sum(-1)
        share = gated(out.flatten(0, len(lead) - 1), gates).view(out.shape)
        total = share if total is None else total + share
    if total is None:
        total = _empty(plan, x, len(lead)) + weights.sum().to(x.dtype) * 0
    return with_unused(total, plan, counts)


def sequences(
    plan: ExpertPlan, x: Tensor, ids: Tensor, weights: Tensor, masked: Callable[..., Any] | None = None
) -> Tensor:
    """x [B, T, d], ids and weights [N, K] → [B, T, *out]: each expert on its own tokens of every sample, in order.

    A sample without any is left out. `masked`, in the place of the plan's call, takes bool [b, n_max] beside them,
    true where there is a token; tokens behind the last one are zero.
    """
    batch, length = x.shape[:2]
    counts = _counts(ids, plan.num_experts)
    flat, y, first = x.reshape(batch * length, x.shape[-1]), None, None
    for index, count in enumerate(counts):
        if not count:
            continue
        mine = (ids == index).any(-1).view(batch, length)
        some = mine.any(1).nonzero()[:, 0]
        own = mine.index_select(0, some)
        most = int(own.sum(1).max())
        places = (~own).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]  # own tokens first, in order
        mask = own.gather(1, places)
        tokens = some[:, None] * length + places
        given = flat.index_select(0, tokens.flatten()).view(len(some), most, -1) * mask[..., None].to(x.dtype)
        expert = plan.experts[index]
        out = plan.checked(
            index, plan.forward(expert, given) if masked is None else masked(expert, given, mask), given, 2
        )
        first = first or (index, out.detach())
        plan.alike([first, (index, out)], 2)
        gates = torch.where(ids == index, weights, 0.0).sum(-1)
        share = gated(out[mask], gates.index_select(0, tokens[mask]))
        start = out.new_zeros(batch * length, *out.shape[2:]) if y is None else y
        y = start.index_add(0, tokens[mask], share)
    if y is None:
        y = _empty(plan, x, 2).flatten(0, 1) + weights.sum().to(x.dtype) * 0
    return with_unused(y.view(batch, length, *y.shape[1:]), plan, counts)


def _counts(ids: Tensor, num_experts: int) -> list[int]:
    known = ids[(ids >= 0) & (ids < num_experts)]
    return torch.bincount(known, minlength=num_experts).tolist()


def _empty(plan: ExpertPlan, x: Tensor, leading: int) -> Tensor:
    """Zeros in the shape of an output for x."""
    expert = plan.experts[0]
    like = x if x.numel() else x.new_zeros(*(1,) * leading, *x.shape[leading:])
    with quietly([expert], x.device):
        out = plan.checked(0, plan.forward(expert, torch.zeros_like(like)), like, leading)
    return out.new_zeros(*x.shape[:leading], *out.shape[leading:])
