"""Top-k router: a learned linear score per token and layer, softmax, the k best experts.

Shazeer et al. 2017, arXiv 1701.06538; GShard, arXiv 2006.16668; Switch Transformer, arXiv 2101.03961.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import MixtureShape, Router
from mole.routers.selection import largest
from mole.routing import Frame, Routing


@config_dataclass
class TopKConfig:
    """z = W x (+ b), p = softmax(z / temperature), weights of the k largest p."""

    name: Literal["top_k"] = "top_k"
    top_k: Annotated[int, Field(ge=1)] | None = 2
    norm_topk: bool = True
    temperature: Annotated[float, Field(gt=0)] = 1.0
    bias: bool = False
    init_std: Annotated[float, Field(ge=0)] = 0.02

    def __post_init__(self):
        if self.top_k == 1 and self.norm_topk:
            raise ValueError(
                "router.top_k=1 with router.norm_topk=true gives every chosen expert the weight 1, which has no "
                "gradient: set router.norm_topk=false or raise router.top_k"
            )


@ROUTERS.register("top_k", TopKConfig)
class TopKRouter(Router):
    """Learned token routing, one instance per mixed module. Raises ValueError if top_k exceeds the experts."""

    scope = "layer"
    learned = True

    def __init__(self, config: TopKConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        input_dim = self.input_dim
        if config.top_k is not None and config.top_k > shape.num_experts:
            raise ValueError(
                f"router.top_k={config.top_k} with {shape.num_experts} experts: lower router.top_k or add experts"
            )
        assert input_dim is not None, "a router of scope layer is built with the width of its input"
        self.score = nn.Linear(input_dim, shape.num_experts, bias=config.bias)
        nn.init.normal_(self.score.weight, std=config.init_std)
        if config.bias:
            nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d_in] → weights [B, T, K] with expert ids, or dense [B, T, E] if top_k is null."""
        assert x is not None
        with torch.autocast(x.device.type, enabled=False):
            logits = self.score(x.to(self.score.weight.dtype))
            probabilities = torch.softmax(logits / self.config.temperature, dim=-1)
        if self.config.top_k is None:
            return Routing(probabilities, logits=logits)
        ids = largest(probabilities, self.config.top_k)
        weights = probabilities.gather(-1, ids)
        if self.config.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(weights, ids, logits=logits)
