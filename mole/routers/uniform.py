"""Uniform router: every expert with the same weight, for every token. No parameters."""

from typing import Any, Literal

import torch
from torch import Tensor

from mole.registry import ROUTERS, config_dataclass, unknown
from mole.routers.base import Combining, MixtureShape, Router
from mole.routing import Frame, Routing


@config_dataclass
class UniformConfig(Combining):
    """Weights 1/E over all experts but the excluded ones, which get 0."""

    name: Literal["uniform"] = "uniform"
    exclude: tuple[str, ...] = ()


@ROUTERS.register("uniform", UniformConfig)
class UniformRouter(Router):
    """w_e = 1/E over the experts that are not excluded. Raises ValueError if none is left or a name is unknown."""

    weights: Tensor

    def __init__(self, config: UniformConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        for name in config.exclude:
            if name not in shape.expert_names:
                raise ValueError(f"router.exclude: {unknown('expert', name, shape.expert_names)}")
        kept = torch.tensor([name not in config.exclude for name in shape.expert_names], dtype=torch.float32)
        if not kept.any():
            raise ValueError("router.exclude names every expert: leave at least one")
        self.register_buffer("weights", (kept / kept.sum()).view(1, 1, -1), persistent=False)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """→ static weights [1, 1, E]."""
        return Routing(self.weights)

    def mergeable(self) -> Tensor:
        """→ [E]."""
        return self.weights[0, 0]
