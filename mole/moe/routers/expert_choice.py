"""Expert choice: inside each sequence every expert takes its best tokens (Zhou et al. 2022, arXiv 2202.09368).

    P = softmax(S) over experts;   expert e takes the C largest P_te;   C = min(T, ceil(c T / E)), or k

T counts the real tokens. Loads are exact by construction, and a token may have any number of experts. Not causal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mole.moe.config import MoEConfig
from mole.moe.routers.base import MOE_ROUTERS, Choice, ScoringRouter, Tokens, normalised
from mole.moe.subsets import subset
from mole.routers.float32 import without_autocast
from mole.routers.selection import largest
from mole.routing import EMPTY, Routing


@MOE_ROUTERS.register("expert_choice", MoEConfig)
class ExpertChoice(ScoringRouter):
    """Learned choice per expert and sequence."""

    def forward(self, tokens: Tokens) -> Choice:
        """x [B, T, d] → weights and ids [B, T, K], K the most experts that any token has; others are −1."""
        config, valid = self.config, tokens.valid
        batch, length = tokens.x.shape[:2]
        with without_autocast(tokens.x):
            logits, _, _ = self.noisy(tokens)
            kept = self.barred(logits)
            log_p = self._log_p(kept, valid)
            size, most = self._sizes(batch, length, valid, logits.device)
            values = log_p.detach() if valid is None else log_p.detach().masked_fill(~valid[..., None], float("-inf"))
            values = values.transpose(1, 2)  # [B, E', T]
            z = None
            if config.noise == "simple" and self.training:
                z = self._drawn(kept, valid, size).transpose(1, 2)
                values = values.masked_fill(z.detach() < 0.5, float("-inf"))
            best = largest(values, most)
            open_ = values.gather(-1, best) != float("-inf")  # NaN is no mask: it goes on to the output
            taken = (torch.arange(most, device=best.device) < size[:, None, None]) & open_
            chosen = torch.zeros(values.shape, dtype=torch.bool, device=best.device).scatter(-1, best, taken)
            chosen = chosen.transpose(1, 2)  # [B, T, E']
            gates = torch.where(chosen, log_p.masked_fill(~chosen, 0.0).exp(), 0.0)
            if z is not None:
                gates = gates * z.transpose(1, 2)
            coverage = gates.sum(-1)
            if config.normalises:
                gates = normalised(log_p.masked_fill(~chosen, 0.0), chosen)
            gates = gates * config.router.route_scale
            ids, weights = _ragged(chosen, gates)
        routing = Routing(weights, ids, logits=logits)
        return Choice(routing, log_p=self.log_scores(logits), coverage=coverage, limit=batch * most)

    def _log_p(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        if self.config.router.softmax_over == "experts":
            return self.log_scores(logits)
        if valid is not None:
            logits = logits.masked_fill(~valid[..., None], torch.finfo(logits.dtype).min)
        return torch.log_softmax(logits, dim=1)

    def _sizes(self, batch: int, length: int, valid: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
        """C of each sequence [B], and its bound."""
        factor, k = self.config.router.capacity_factor, self.config.k

        def of(tokens: int) -> int:
            return min(tokens, k if factor is None else math.ceil(factor * tokens / self.num_experts))

        if valid is None:
            return torch.full((batch,), of(length), device=device), of(length)
        real = valid.sum(1)
        wanted = torch.full_like(real, k) if factor is None else (factor * real.double() / self.num_experts).ceil()
        return torch.minimum(real, wanted.long()), of(length)

    def _drawn(self, logits: Tensor, valid: Tensor | None, size: Tensor) -> Tensor:
        """0/1 [B, T, E']: for each expert a random subset of the tokens, of the size of the sequence's C."""
        scores = logits.transpose(1, 2)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], float("-inf"))
        found: list[Tensor] = []
        for row, count in zip(scores, size.tolist(), strict=True):
            found.append(subset(row, count) if count else torch.zeros_like(row))
        return torch.stack(found).transpose(1, 2) if found else torch.zeros_like(logits)


def _ragged(chosen: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights [B, T, K] of the chosen experts [B, T, E'], in their order; K is E' in a trace."""
    choices = chosen.shape[-1]
    if torch.compiler.is_compiling() or not chosen.numel():
        ids = torch.arange(choices, device=chosen.device).expand_as(chosen)
        return torch.where(chosen, ids, EMPTY), gates
    most = max(1, int(chosen.sum(-1).max()))
    ids = (~chosen).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
    return torch.where(chosen.gather(-1, ids), ids, EMPTY), gates.gather(-1, ids)
