"""Token choice: each token takes its k best experts.

    a = softmax(S), σ(S), or softmax of cosines;   the k largest a + b;   gates a, or a / Σ a

b balances without a loss (Wang et al. 2024, arXiv 2408.15664) and chooses only. With groups of experts only the best
`topk_groups` are eligible, a group's value being the sum of its two largest a + b (DeepSeek-V3, arXiv 2412.19437).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mole.moe.config import MoEConfig
from mole.moe.routers.base import MOE_ROUTERS, Choice, ScoringRouter, Tokens, normalised, without_padding
from mole.moe.subsets import subset
from mole.routers.float32 import without_autocast
from mole.routers.noise import chances
from mole.routers.selection import largest
from mole.routing import EMPTY, Routing


@MOE_ROUTERS.register("top_k", MoEConfig)
class TopK(ScoringRouter):
    """Learned choice per token. `bias` [E], if the configuration has a `bias_rate`, is moved by update_router_bias."""

    def __init__(self, config: MoEConfig, num_experts: int, input_dim: int | None):
        super().__init__(config, num_experts, input_dim)
        if config.router.bias_rate:
            self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, tokens: Tokens) -> Choice:
        """x [B, T, d] → weights and ids [B, T, k]."""
        config = self.config
        with without_autocast(tokens.x):
            logits, clean, size = self.noisy(tokens)
            kept = self.barred(logits)
            log_a = self.log_scores(kept)
            if config.noise == "simple" and self.training:
                ids, gates, log_gates = self._drawn(kept, log_a)
            else:
                ids = largest(self._values(log_a.detach()), config.k)
                log_gates = log_a.gather(-1, ids)
                gates = log_gates.exp()
            filled = log_a.detach().gather(-1, ids) != float("-inf")  # NaN is no mask: it goes on to the output
            if config.normalises:
                weights = self._shares(gates, log_gates, filled)
            else:
                weights = torch.where(filled, gates, 0.0) * config.router.route_scale
            ids, weights = without_padding(torch.where(filled, ids, EMPTY), weights, tokens.valid)
            odds = None
            if size is not None and config.k < self.num_choices:
                odds = chances(logits, clean, size, config.k)
        log_p = log_a if kept is logits else self.log_scores(logits)
        return Choice(Routing(weights, ids, logits=logits, chances=odds), log_p=log_p)

    def _values(self, log_a: Tensor) -> Tensor:
        """What is compared, [B, T, E']. Logarithms keep apart what underflows."""
        router = self.config.router
        bias = getattr(self, "bias", None)
        if bias is None and router.num_groups == 1:
            return log_a
        values = log_a.exp()
        if bias is not None:
            values = values + torch.cat([bias, bias.new_zeros(self.num_choices - self.num_experts)]).to(values.dtype)
        values = values.masked_fill(log_a == float("-inf"), float("-inf"))
        if router.num_groups == 1:
            return values
        grouped = values.unflatten(-1, (router.num_groups, -1))
        merit = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = largest(merit, router.topk_groups)
        eligible = torch.zeros_like(merit, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~eligible[..., None], float("-inf")).flatten(-2)

    def _drawn(self, kept: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, gates and their logarithms of a random k-subset, best first."""
        taken = subset(kept, self.config.k)
        ids = largest(torch.where(taken.detach() > 0.5, log_a.detach(), float("-inf")), self.config.k)
        z = taken.gather(-1, ids)
        log_gates = log_a.gather(-1, ids)
        return ids, z * log_gates.exp(), log_gates

    def _shares(self, gates: Tensor, log_gates: Tensor, filled: Tensor) -> Tensor:
        if self.config.k == 1:
            weights = normalised(log_gates, filled)
        else:
            gates = torch.where(filled, gates, 0.0)
            weights = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return weights * self.config.router.route_scale
