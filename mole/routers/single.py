"""Single router: one expert for everything, as if it were attached alone. No parameters."""

from typing import Any, Literal

import torch
from torch import Tensor

from mole.registry import ROUTERS, config_dataclass, unknown
from mole.routers.base import Combining, MixtureShape, Router
from mole.routing import Frame, Routing


@config_dataclass
class SingleConfig(Combining):
    """Weight 1 for the expert of that name, 0 for all others."""

    name: Literal["single"] = "single"
    expert: str


@ROUTERS.register("single", SingleConfig)
class SingleRouter(Router):
    """w one-hot. Raises ValueError for a name that the mixture lacks."""

    weights: Tensor

    def __init__(self, config: SingleConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        if config.expert not in shape.expert_names:
            raise ValueError(f"router.expert: {unknown('expert', config.expert, shape.expert_names)}")
        weights = torch.zeros(1, 1, shape.num_experts)
        weights[..., shape.expert_names.index(config.expert)] = 1.0
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """→ static weights [1, 1, E]."""
        return Routing(self.weights)

    def mergeable(self) -> Tensor:
        """→ [E]."""
        return self.weights[0, 0]
