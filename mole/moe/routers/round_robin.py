"""Round robin: tokens go to the experts in turn. Perfect balance, nothing learned; for looking for mistakes."""

from __future__ import annotations

import torch

from mole.moe.config import MoEConfig
from mole.moe.routers.base import MOE_ROUTERS, Choice, MoERouter, Tokens, without_padding
from mole.routing import Routing


@MOE_ROUTERS.register("round_robin", MoEConfig)
class RoundRobin(MoERouter):
    """Slot j of the n-th real token goes to expert (n k + j) mod E with weight 1/k."""

    def forward(self, tokens: Tokens) -> Choice:
        """x [B, T, d] → weights and ids [B, T, k]."""
        batch, length = tokens.x.shape[:2]
        k, device = self.config.k, tokens.x.device
        place = torch.arange(batch * length, device=device).view(batch, length)
        if tokens.valid is not None:
            place = tokens.valid.flatten().cumsum(0).view(batch, length) - 1
        ids = (place[..., None] * k + torch.arange(k, device=device)) % self.num_experts
        weights = torch.full(ids.shape, 1 / k, device=device)
        ids, weights = without_padding(ids, weights, tokens.valid)
        return Choice(Routing(weights, ids))
