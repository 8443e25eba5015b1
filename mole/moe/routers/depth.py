"""Mixture of depths: some tokens of a sequence pass through the module, the others past it.

Raposo et al. 2024, arXiv 2404.02258. The best C = ceil(ratio · T) tokens by a learned score s pass, with the gate σ(s).
That looks ahead, so a small predictor learns beside it, from the hidden states alone, who will pass; it decides in a
generation, where later tokens are not there yet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.moe.config import MoEConfig
from mole.moe.routers.base import MOE_ROUTERS, Choice, MoERouter, Tokens, width
from mole.routers.float32 import Linear, at_least_float32, without_autocast
from mole.routers.selection import largest
from mole.routing import EMPTY, Routing

RATIO = 0.125
PREDICTOR = "depth_predictor"


@MOE_ROUTERS.register("depth", MoEConfig)
class Depth(MoERouter):
    """`weight` [1, d] scores; `predictor_steps` counts the forwards that the predictor was trained in."""

    predictor_steps: Tensor

    def __init__(self, config: MoEConfig, num_experts: int, input_dim: int | None):
        super().__init__(config, num_experts, width(input_dim))
        read = width(input_dim)
        hidden = max(1, read // 2)
        self.weight = nn.Parameter(torch.empty(1, read))
        nn.init.orthogonal_(self.weight)
        self.predictor = nn.Sequential(Linear(read, hidden), nn.SiLU(), Linear(hidden, 1))
        self.register_buffer("predictor_steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, tokens: Tokens) -> Choice:
        """x [B, T, d] → weights and ids [B, T, 1], id 0 for tokens that pass, −1 for others."""
        x, valid = tokens.x, tokens.valid
        generating = tokens.frame is not None and tokens.frame.generating
        with without_autocast(x):
            scores = F.linear(at_least_float32(x), self.weight.to(torch.promote_types(x.dtype, torch.float32)))
            scores = scores / self.config.router.temperature
            guess = self.predictor(at_least_float32(x.detach()))[..., 0]
            if generating:
                passes = self._guessed(guess)
            else:
                passes = self._best(scores[..., 0].detach(), valid)
            if valid is not None:
                passes = passes & valid
            gates = torch.where(passes[..., None], torch.sigmoid(scores) * self.config.router.route_scale, 0.0)
            ids = torch.where(passes[..., None], 0, EMPTY)
            penalties = {PREDICTOR: self._error(guess, passes, valid)} if self.training else {}
        if self.training and not tokens.again:
            self.predictor_steps += 1
        limit = x.shape[0] * self._size(x.shape[1])
        return Choice(Routing(gates, ids, logits=scores), limit=None if generating else limit, penalties=penalties)

    def _size(self, length: int) -> int:
        ratio = self.config.router.capacity_factor or RATIO
        return min(length, math.ceil(ratio * length))

    def _best(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        """bool [B, T]: the best C of each sequence's real tokens."""
        most = self._size(scores.shape[1])
        room = torch.full((scores.shape[0],), most, device=scores.device)
        if valid is not None:
            scores = scores.masked_fill(~valid, float("-inf"))
            room = ((self.config.router.capacity_factor or RATIO) * valid.sum(1).double()).ceil().long()
        best = largest(scores, most)
        inside = torch.arange(most, device=scores.device) < room[:, None]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, inside)

    def _guessed(self, guess: Tensor) -> Tensor:
        if not int(self.predictor_steps):
            raise RuntimeError(
                "router.name=depth generates with its predictor, which was never trained: train the block first"
            )
        return guess > 0

    def _error(self, guess: Tensor, passes: Tensor, valid: Tensor | None) -> Tensor:
        each = F.binary_cross_entropy_with_logits(guess, passes.to(guess.dtype), reduction="none")
        if valid is None:
            return each.mean() if each.numel() else each.sum()
        return (each * valid).sum() / valid.sum().clamp_min(1)
