"""Hash routing: a fixed random function of the token's id chooses (Roller et al. 2021, arXiv 2106.04426)."""

from __future__ import annotations

import torch

from mole.moe.config import MoEConfig
from mole.moe.routers.base import MOE_ROUTERS, Choice, MoERouter, Tokens, without_padding
from mole.routers.hashing import mixed, non_negative, signed, splitmix64
from mole.routing import Routing

_MASK = (1 << 64) - 1


@MOE_ROUTERS.register("hash", MoEConfig)
class Hash(MoERouter):
    """Expert (π(id) + j) mod E for the slots j = 0 … k − 1, with weight 1/k; π permutes the numbers of 64 bits."""

    def forward(self, tokens: Tokens) -> Choice:
        """Token ids [B, T] → weights and ids [B, T, k]. Raises ValueError without token ids."""
        if tokens.ids is None:
            raise ValueError("router.name=hash needs token ids: call the block with token_ids=…")
        if tokens.ids.shape != tokens.x.shape[:2]:
            raise ValueError(
                f"token_ids has shape {tuple(tokens.ids.shape)}, the tokens are {tuple(tokens.x.shape[:2])}: give one "
                "id for each"
            )
        k = self.config.k
        start = signed(splitmix64(self.config.router.seed & _MASK))
        first = non_negative(mixed(tokens.ids.to(tokens.x.device).long() + start)) % self.num_experts
        ids = (first[..., None] + torch.arange(k, device=first.device)) % self.num_experts
        weights = torch.full(ids.shape, 1 / k, device=ids.device)
        ids, weights = without_padding(ids, weights, tokens.valid)
        return Choice(Routing(weights, ids))
