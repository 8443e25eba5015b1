"""RKHS router: tokens and experts are mapped into one space, where their inner product is the score.

    z_te = ⟨W_h x_t + b_h, W_e k_e + b_e⟩ / τ;   p = softmax(z);   the k largest

Every expert has a key k_e of its own, so that a new one adds one row and leaves the scores of the others as they are.
The kernel selector of the library mttl.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router, dropped
from mole.routers.float32 import Linear, at_least_float32, without_autocast
from mole.routers.selection import chosen
from mole.routers.top_k import check_top_k, one_of_one
from mole.routing import Frame, Routing

LARGEST_KEY = 0.02  # of a new expert


@config_dataclass
class RkhsConfig(Placing, Combining, Learning):
    """Widths of the common space and of the experts' keys; what of the k best is kept."""

    name: Literal["rkhs"] = "rkhs"
    rkhs_dim: Annotated[int, Field(ge=1)] = 512
    emb_dim: Annotated[int, Field(ge=1)] = 128
    top_k: Annotated[int, Field(ge=1)] | None = None
    norm_topk: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0

    def __post_init__(self):
        problems = self.placing_problems() + one_of_one(self.top_k, self.norm_topk)
        if problems:
            raise ValueError("\n".join(problems))


@ROUTERS.register("rkhs", RkhsConfig)
class RkhsRouter(Router):
    """Learned token routing over keys of experts. Raises ValueError if top_k exceeds the experts."""

    scope = "layer"
    learned = True
    expert_axes: ClassVar[Mapping[str, int]] = {"keys": 0}
    config: RkhsConfig

    def __init__(self, config: RkhsConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        check_top_k(config.top_k, shape.num_experts)
        assert self.input_dim is not None, "a router of scope layer is built with the width of its input"
        self.of_tokens = Linear(self.input_dim, config.rkhs_dim)
        self.of_experts = Linear(config.emb_dim, config.rkhs_dim)
        self.keys = nn.Parameter(torch.empty(shape.num_experts, config.emb_dim).uniform_(-LARGEST_KEY, LARGEST_KEY))

    def scores(self, x: Tensor) -> Tensor:
        """z: [B, T, d_in] → [B, T, E]."""
        experts = self.of_experts(at_least_float32(self.keys))
        if not self.training:
            return self.of_tokens(x) @ experts.T / self.config.temperature
        # ⟨W x + b, u⟩ = ⟨x, Wᵀu⟩ + ⟨b, u⟩: no token is brought to the common space, which is wider than there are
        # experts, nor kept there for backward. A single token, as in generation, is cheaper the other way.
        weight, bias = self.of_tokens.weight.to(experts.dtype), self.of_tokens.bias.to(experts.dtype)
        return F.linear(x.to(experts.dtype), experts @ weight, experts @ bias) / self.config.temperature

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d_in] → weights [B, T, K] with expert ids, or dense [B, T, E] if all are kept."""
        assert x is not None
        with without_autocast(x):
            logits = self.scores(x)
            kept = dropped(logits, self.config.expert_dropout, self.training)
            weights, ids = chosen(torch.softmax(kept, dim=-1), self.config.top_k, normalise=self.config.norm_topk)
        return Routing(weights, ids, logits=logits)
