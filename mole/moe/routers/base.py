"""What routers of blocks read and give; those that score experts share their scores and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.moe.config import MoEConfig
from mole.registry import Registry
from mole.routers.float32 import at_least_float32, without_autocast
from mole.routers.noise import gumbel, jittered
from mole.routing import EMPTY, Frame, Routing

MOE_ROUTERS: Registry[Any] = Registry("router of blocks")
LARGEST_SCALE, FIRST_SCALE = 100.0, 2.0  # of cosines
TINY = 1e-20
LEAST_NOISE = 0.01


@dataclass(frozen=True)
class Tokens:
    """One forward: `x` [B, T, d], `valid` bool [B, T] (None: all are), `ids` int64 [B, T] of a vocabulary.

    `again`: the forward is computed a second time, for gradient checkpointing.
    """

    x: Tensor
    valid: Tensor | None = None
    ids: Tensor | None = None
    frame: Frame | None = None
    again: bool = False


@dataclass(frozen=True)
class Choice:
    """A routing [B, T, K], and what only the block reads.

    `log_p`     [B, T, E'] log of each expert's probability for a token, up to a constant per token; with graph.
    `coverage`  [B, T] how much weight a token got, where experts choose tokens; with graph.
    `limit`     rows that no expert exceeds, known without reading a number; None: as many as there are tokens.
    `penalties` losses of the router itself, which are added as they are.
    """

    routing: Routing
    log_p: Tensor | None = None
    coverage: Tensor | None = None
    limit: int | None = None
    penalties: dict[str, Tensor] = field(default_factory=dict)


class MoERouter(nn.Module):
    """Base: tokens → choice. `num_choices` E' counts the null experts, `num_experts` E does not."""

    def __init__(self, config: MoEConfig, num_experts: int, input_dim: int | None):
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.num_choices = num_experts + len(config.null_experts)
        self.input_dim = input_dim

    def forward(self, tokens: Tokens) -> Choice:
        raise NotImplementedError


def width(input_dim: int | None) -> int:
    """The width of the input. Raises ValueError if nobody said it."""
    if input_dim is None:
        raise ValueError("the experts do not tell the width of their input: give input_dim")
    return input_dim


class ScoringRouter(MoERouter):
    """S = X Wᵀ / temperature, or cosines with centroids; in float32 or better, with the noise of training.

    `weight` [E', d] orthogonal at the start (cosine: [E', proj_dim] behind `projection`). Noise: `learned`
    S + ε (softplus(X W_n) + 0.01), W_n = 0 at the start; `normal` S + ε / E'; `jitter` of X; `gumbel`
    (S + G) / τ, τ falling by equal factors over `noise_steps` forwards of training; `simple`: see subsets.
    """

    tau_steps: Tensor
    bias: Tensor

    def __init__(self, config: MoEConfig, num_experts: int, input_dim: int | None):
        super().__init__(config, num_experts, width(input_dim))
        router, read = config.router, width(input_dim)
        if router.score == "cosine":
            self.projection = nn.Parameter(torch.empty(router.proj_dim, read))
            self.log_scale = nn.Parameter(torch.full((1,), math.log(FIRST_SCALE)))
            nn.init.orthogonal_(self.projection)
        self.weight = nn.Parameter(torch.empty(self.num_choices, router.proj_dim if router.score == "cosine" else read))
        nn.init.orthogonal_(self.weight)
        if config.noise == "learned":
            self.noise_weight = nn.Parameter(torch.zeros(self.num_choices, read))
        if config.noise == "gumbel":
            self.register_buffer("tau_steps", torch.zeros(1, dtype=torch.int64))
        self._tau: Tensor | None = None

    def clean(self, x: Tensor) -> Tensor:
        """S / temperature: [.., d] → [.., E']."""
        x = at_least_float32(x)
        weight = self.weight.to(x.dtype)
        if self.config.router.score == "cosine":
            x = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1)
            scale = at_least_float32(self.log_scale).exp().clamp_max(LARGEST_SCALE)
            return F.linear(x, F.normalize(weight, dim=-1)) * scale.to(x.dtype) / self.config.router.temperature
        return F.linear(x, weight) / self.config.router.temperature

    def noisy(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits [B, T, E'] with this forward's noise; without it; and the noise's size, where it is added."""
        router, x = self.config.router, tokens.x
        noise = self.config.noise if self.training else None
        if noise == "jitter":
            x = jittered(at_least_float32(x), router.noise_eps)
        logits = self.clean(x)
        if self.config.noise == "gumbel":
            tau = self._temperature(tokens)
            drawn = logits + router.noise_scale * gumbel(logits) if noise else logits
            return drawn / tau, logits, None
        if noise not in ("learned", "normal"):
            return logits, logits, None
        if noise == "learned":
            size = F.softplus(F.linear(at_least_float32(x), self.noise_weight.to(logits.dtype))) + LEAST_NOISE
        else:
            size = torch.full_like(logits, 1 / self.num_choices)
        size = router.noise_scale * size
        return logits + torch.randn_like(logits) * size, logits, size

    def log_scores(self, logits: Tensor) -> Tensor:
        """ln a: of a softmax, or of a sigmoid each."""
        if self.config.router.score == "sigmoid":
            return F.logsigmoid(logits)
        return torch.log_softmax(logits, dim=-1)

    def barred(self, logits: Tensor) -> Tensor:
        """`logits` with −inf for the experts that this forward leaves out; at least k choices stay."""
        probability = self.config.expert_dropout
        if not self.training or not probability:
            return logits
        draw = torch.rand(self.num_experts, device=logits.device)
        least = min(max(self.config.k - len(self.config.null_experts), 1), self.num_experts)
        stays = (draw >= probability) | (draw >= draw.topk(least).values[-1])
        stays = torch.cat([stays, stays.new_ones(self.num_choices - self.num_experts)])
        return logits.masked_fill(~stays, float("-inf"))

    def _temperature(self, tokens: Tokens) -> Tensor:
        """τ. A forward of training takes a step; computed again, it finds the τ that it had."""
        router = self.config.router
        share = (self.tau_steps.double() / max(router.noise_steps, 1)).clamp_max(1.0)
        tau = (router.noise_tau * (router.noise_tau_end / router.noise_tau) ** share).float()
        if not self.training or not router.noise_steps:
            return tau
        notes, place = {} if tokens.frame is None else tokens.frame.notes, (id(self), "tau")
        if tokens.again:
            return notes.get(place, tau if self._tau is None else self._tau)
        notes[place] = self._tau = tau
        self.tau_steps += 1
        return tau

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tau": None}


def normalised(log_gates: Tensor, filled: Tensor) -> Tensor:
    """Gates [.., K] that sum to 1 over the slots `filled`; a single one is 1 with the gradient of its logarithm."""
    safe = log_gates.masked_fill(~filled, 0.0)
    gates = torch.where(filled, safe.exp(), 0.0)
    shares = gates / (gates.sum(-1, keepdim=True) + TINY)
    alone = torch.exp(safe - safe.detach())
    shares = torch.where(filled.sum(-1, keepdim=True) == 1, alone, shares)
    return torch.where(filled, shares, 0.0)


def without_padding(ids: Tensor, weights: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids and weights [B, T, K] with no slot for tokens that are none."""
    if valid is None:
        return ids, weights
    return torch.where(valid[..., None], ids, EMPTY), torch.where(valid[..., None], weights, 0.0)


__all__ = [
    "MOE_ROUTERS",
    "Choice",
    "MoERouter",
    "ScoringRouter",
    "Tokens",
    "normalised",
    "width",
    "without_autocast",
    "without_padding",
]
