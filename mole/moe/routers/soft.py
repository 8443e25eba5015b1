"""Soft MoE: every expert works on mixtures of all tokens of a sequence (Puigcerver et al. 2023, arXiv 2308.00951).

    L = norm(X) · scale · norm(Φ);   D = softmax of L over tokens;   C = softmax of L over slots;   y = C f(Dᵀ X)

Nothing is dropped, shapes are static. Not causal. Legend: S = E · p slots, p of each expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.moe.config import MoEConfig
from mole.moe.routers.base import MOE_ROUTERS, Choice, MoERouter, Tokens, width
from mole.routers.float32 import at_least_float32, without_autocast
from mole.routing import Routing


@dataclass(frozen=True)
class SoftChoice(Choice):
    """`dispatch` [B, T, S]: what each slot reads; `combine` [B, T, S]: what each token gets of it.

    As a routing: the weight of each expert's slots in a token, dense.
    """

    dispatch: Tensor | None = None
    combine: Tensor | None = None


@MOE_ROUTERS.register("soft", MoEConfig)
class Soft(MoERouter):
    """Φ is `weight` [S, d]; `scale` is learned, 1 at the start."""

    def __init__(self, config: MoEConfig, num_experts: int, input_dim: int | None):
        super().__init__(config, num_experts, width(input_dim))
        self.weight = nn.Parameter(torch.empty(num_experts * config.router.slots, width(input_dim)))
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.orthogonal_(self.weight)

    def forward(self, tokens: Tokens) -> SoftChoice:
        """x [B, T, d] → dispatch and combine [B, T, S]."""
        with without_autocast(tokens.x):
            x = F.normalize(at_least_float32(tokens.x), dim=-1)
            slots = self.scale.to(x.dtype) * F.normalize(self.weight.to(x.dtype), dim=-1)
            logits = F.linear(x, slots) / self.config.router.temperature
            heard = logits
            if tokens.valid is not None:
                heard = logits.masked_fill(~tokens.valid[..., None], torch.finfo(logits.dtype).min)
            dispatch, combine = torch.softmax(heard, dim=1), torch.softmax(logits, dim=-1)
            if tokens.valid is not None:
                dispatch, combine = dispatch * tokens.valid[..., None], combine * tokens.valid[..., None]
            by_expert = combine.unflatten(-1, (self.num_experts, -1)).sum(-1) * self.config.router.route_scale
            merit = logits.unflatten(-1, (self.num_experts, -1)).logsumexp(-1)
        routing = Routing(by_expert, None, logits=merit)
        scaled = combine * self.config.router.route_scale
        return SoftChoice(routing, log_p=torch.log_softmax(merit, dim=-1), dispatch=dispatch, combine=scaled)
