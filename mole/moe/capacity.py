"""Capacity: how many slots an expert takes, and which are dropped.

    C_e = max(minimum, ceil(factor · N · k / E))

`priority` grants slots by descending gate, all first choices before second ones (batch-prioritised routing, Riquelme
et al. 2021, arXiv 2106.05974); `position` by the order of tokens, first choices first (GShard, arXiv 2006.16668).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mole.moe.config import CapacityConfig
from mole.routing import EMPTY, Routing


def factor_of(config: CapacityConfig, training: bool) -> float | None:
    """The factor that holds now; None: nothing is dropped."""
    return config.factor if training or config.eval_factor is None else config.eval_factor


def limit_of(config: CapacityConfig, factor: float, slots: int, num_experts: int) -> int:
    """C for `slots` = N · k, as far as it is known without reading a mask."""
    return max(config.minimum, math.ceil(min(factor * slots / num_experts, slots)))


def limited(
    routing: Routing, valid: Tensor | None, config: CapacityConfig, factor: float, num_experts: int
) -> tuple[Routing, int]:
    """The routing without the slots that find no room, and the most that any expert has.

    Dropped slots have id −1 and weight 0. `valid` bool [B, T]: the tokens that count in N.
    """
    assert routing.expert_ids is not None
    ids = routing.expert_ids.reshape(-1, routing.expert_ids.shape[-1])
    tokens, k = ids.shape
    most = limit_of(config, factor, tokens * k, num_experts)
    room: Tensor | int = most
    if valid is not None:
        wanted = (factor * valid.sum().double() * k / num_experts).ceil().clamp_max(tokens * k)
        room = wanted.long().clamp_min(config.minimum)
    gates = routing.weights.detach().reshape(-1, k).t()  # [K, N]: first choices first
    order = torch.arange(tokens, device=ids.device).expand(k, tokens)
    if config.drop_order == "priority":
        order = gates.sort(dim=-1, descending=True, stable=True).indices
    granted = ids.t().gather(-1, order).flatten()
    kept = _place_in_expert(granted, num_experts) < room
    keep = torch.zeros(k, tokens, dtype=torch.bool, device=ids.device)
    keep = keep.scatter(-1, order, kept.view(k, tokens)).t().reshape(routing.expert_ids.shape)
    keep = keep | (routing.expert_ids >= num_experts)  # null experts have room for all
    dropped = replace(
        routing,
        expert_ids=torch.where(keep, routing.expert_ids, EMPTY),
        weights=torch.where(keep, routing.weights, 0.0),
    )
    return dropped, most


def _place_in_expert(ids: Tensor, num_experts: int) -> Tensor:
    """[P]: how many before it want the same expert; ids outside 0 … E − 1 are nobody's."""
    keys, order = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(num_experts + 1, device=ids.device))
    places = torch.arange(len(ids), device=ids.device) - starts.index_select(0, keys)
    return torch.empty_like(places).scatter(0, order, places)
