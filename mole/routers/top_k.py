"""Top-k router: a learned score per token (or per example) and layer; the k best experts.

    z = W x + b;   p = softmax(z / τ), σ(z / τ), or softmax(s cos(P x, c_e) / τ);   S = the k largest p;
    w = p_S / Σ p_S, or p_S

Shazeer et al. 2017, arXiv 1701.06538; GShard, arXiv 2006.16668; Switch Transformer, arXiv 2101.03961; ST-MoE, arXiv
2202.08906; cosine scores: Chi et al. 2022, arXiv 2204.09179.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router, dropped
from mole.routers.float32 import Linear, at_least_float32, without_autocast
from mole.routers.noise import chances, gumbel, jittered
from mole.routers.pooling import by_example, mean_of, prompt_of
from mole.routers.selection import chosen
from mole.routing import Frame, Routing

LARGEST_SCALE = 100.0  # of cosines
FIRST_SCALE = 2.0


def one_of_one(top_k: int | None, norm_topk: bool) -> list[str]:
    """What is wrong with the one best expert whose weight is made 1."""
    if top_k != 1 or not norm_topk:
        return []
    return [
        "router.top_k=1 with router.norm_topk=true gives every chosen expert the weight 1, which has no gradient: set "
        "router.norm_topk=false or raise router.top_k"
    ]


def check_top_k(top_k: int | None, num_experts: int) -> None:
    """Raises ValueError for more experts per token than there are."""
    if top_k is not None and top_k > num_experts:
        raise ValueError(f"router.top_k={top_k} with {num_experts} experts: lower router.top_k or add experts")


@config_dataclass
class TopKConfig(Placing, Combining, Learning):
    """How tokens are scored, what noise training adds, and what of the k best is kept."""

    name: Literal["top_k"] = "top_k"
    top_k: Annotated[int, Field(ge=1)] | None = 2
    norm_topk: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    score: Literal["softmax", "sigmoid", "cosine"] = "softmax"
    proj_dim: Annotated[int, Field(ge=1)] = 256
    bias: bool = False
    init_std: Annotated[float, Field(ge=0)] = 0.02
    noise: Literal["normal", "learned", "jitter", "gumbel"] | None = None
    noise_eps: Annotated[float, Field(gt=0, lt=1)] = 0.01
    noise_tau: Annotated[float, Field(gt=0)] = 1.0
    noise_tau_end: Annotated[float, Field(gt=0)] = 0.1
    noise_steps: Annotated[int, Field(ge=1)] = 1000
    per: Literal["token", "example"] = "token"

    def __post_init__(self):
        problems = self.placing_problems() + one_of_one(self.top_k, self.norm_topk)
        if self.score == "cosine" and self.bias:
            problems.append("router.score=cosine has no bias: set router.bias=false")
        if self.score == "sigmoid" and self.noise == "gumbel":
            problems.append("router.noise=gumbel samples from a softmax: set router.score=softmax, or another noise")
        if problems:
            raise ValueError("\n".join(problems))


@ROUTERS.register("top_k", TopKConfig)
class TopKRouter(Router):
    """Learned routing, one instance per mixed module or group. Raises ValueError if top_k exceeds the experts.

    Noise acts in training only: normal z + ε/E; learned z + ε softplus(x W_n), W_n = 0 at the start; jitter
    x ⊙ U(1−noise_eps, 1+noise_eps); gumbel softmax((z + g) / τ_g), with τ_g falling by equal factors from `noise_tau`
    to `noise_tau_end` over `noise_steps` forwards of training.
    """

    scope = "layer"
    learned = True
    expert_axes: ClassVar[Mapping[str, int]] = {"score.weight": 0, "score.bias": 0, "noise.weight": 0, "centroids": 0}
    config: TopKConfig
    steps: Tensor

    def __init__(self, config: TopKConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        check_top_k(config.top_k, shape.num_experts)
        assert self.input_dim is not None, "a router of scope layer is built with the width of its input"
        if config.per == "example":
            self.needs, self.keeps = frozenset({"prompt_mask"}), True  # type: ignore[misc]
        if config.score == "cosine":
            self.project = Linear(self.input_dim, config.proj_dim, bias=False)
            self.centroids = nn.Parameter(torch.empty(shape.num_experts, config.proj_dim))
            self.log_scale = nn.Parameter(torch.full((1,), math.log(FIRST_SCALE)))
            nn.init.normal_(self.project.weight, std=config.init_std or 1.0)  # a cosine does not see the size
            nn.init.normal_(self.centroids)
        else:
            self.score = Linear(self.input_dim, shape.num_experts, bias=config.bias)
            nn.init.normal_(self.score.weight, std=config.init_std)
            if config.bias:
                nn.init.zeros_(self.score.bias)
        if config.noise == "learned":
            self.noise = Linear(self.input_dim, shape.num_experts, bias=False)
            nn.init.zeros_(self.noise.weight)
        if config.noise == "gumbel":
            self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d_in] → weights [B, T, K] with expert ids, or dense [B, T, E] if all are kept.

        With per=example: T = 1.
        """
        assert x is not None
        config = self.config
        with without_autocast(x):
            if config.per == "example":
                x = mean_of(*by_example(x, prompt_of(frame, "top_k"), "top_k"))
            logits, noise = self._noisy(x, frame)
            kept = dropped(logits, config.expert_dropout, self.training)
            scores = torch.sigmoid(kept) if config.score == "sigmoid" else torch.softmax(kept, dim=-1)
            weights, ids = chosen(scores, config.top_k, normalise=False)
            if config.norm_topk:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
            odds = None
            if noise is not None and ids is not None and frame.recording:
                assert config.top_k is not None
                odds = chances(logits, *noise, config.top_k)
        return Routing(weights, ids, logits=logits, chances=odds)

    def scores(self, x: Tensor) -> Tensor:
        """z / τ: [B, T, d_in] → [B, T, E]."""
        if self.config.score != "cosine":
            return self.score(x) / self.config.temperature
        directions = F.normalize(self.project(x), dim=-1)
        cosines = F.linear(directions, F.normalize(at_least_float32(self.centroids), dim=-1).to(directions.dtype))
        scale = at_least_float32(self.log_scale).exp().clamp_max(LARGEST_SCALE)
        return cosines * scale / self.config.temperature

    def _noisy(self, x: Tensor, frame: Frame) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """z / τ with this forward's noise; and, of noise that is added to it, z / τ without it and the noise's size."""
        noise = self.config.noise if self.training else None
        if noise == "jitter":
            x = jittered(at_least_float32(x), self.config.noise_eps)
        logits = self.scores(x)
        if noise == "gumbel":
            return (logits + gumbel(logits)) / self._noise_temperature(frame), None
        if noise in (None, "jitter"):
            return logits, None
        size = F.softplus(self.noise(x)) if noise == "learned" else logits.new_tensor(1 / self.shape.num_experts)
        size = size / self.config.temperature  # it is added to z
        return logits + torch.randn_like(logits) * size, (logits, size)

    def _noise_temperature(self, frame: Frame) -> Tensor:
        """Of this forward of training: a recomputation finds the one of its forward."""
        config, place = self.config, (id(self), "noise_tau")
        if place not in frame.notes:
            share = (self.steps / config.noise_steps).clamp_max(1.0)
            frame.notes[place] = config.noise_tau * (config.noise_tau_end / config.noise_tau) ** share
            self.steps += 1
        return frame.notes[place]
