"""Gate router: every expert has a gate of its own, w_te = σ(v_e · x_t), which depends on no other expert.

PHATGOOSE trains its gates so, one expert at a time (arXiv 2402.05859); trained together they are independent gates.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass, unknown
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router, dropped
from mole.routers.float32 import at_least_float32, without_autocast
from mole.routing import Frame, Routing


@config_dataclass
class GateConfig(Combining, Placing, Learning):
    """Which experts work: those of `only`, or all."""

    name: Literal["gate"] = "gate"
    only: tuple[str, ...] | None = None

    def __post_init__(self):
        problems = self.placing_problems()
        if self.only is not None and len(set(self.only)) < max(len(self.only), 1):
            problems.append("router.only names at least one expert, and none twice")
        if problems:
            raise ValueError("\n".join(problems))


@ROUTERS.register("gate", GateConfig)
class GateRouter(Router):
    """Weights [B, T, K] in (0, 1), ½ at the start, of the K experts of `only` with their ids, or of all without.

    `v` [K, d]. Raises ValueError for a name that the mixture lacks.
    """

    scope = "layer"
    learned = True
    chosen: Tensor

    def __init__(self, config: GateConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        assert self.input_dim is not None, "a router of scope layer is built with the width of its input"
        for name in config.only or ():
            if name not in shape.expert_names:
                raise ValueError(f"router.only: {unknown('expert', name, shape.expert_names)}")
        names = shape.expert_names if config.only is None else config.only
        chosen = [shape.expert_names.index(name) for name in names]
        self.register_buffer("chosen", torch.tensor(chosen).view(1, 1, -1), persistent=False)
        self.v = nn.Parameter(torch.zeros(len(chosen), self.input_dim))

    def carry(self, old: Any) -> None:
        """The gates of the experts that both have."""
        theirs = {old.shape.expert_names[expert]: row for row, expert in enumerate(old.chosen.flatten().tolist())}
        with torch.no_grad():
            for row, expert in enumerate(self.chosen.flatten().tolist()):
                source = theirs.get(self.shape.expert_names[expert])
                if source is not None:
                    self.v[row].copy_(old.v[source])

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d] → weights [B, T, K]."""
        assert x is not None
        with without_autocast(x):
            v = at_least_float32(self.v)
            logits = F.linear(x.to(v.dtype), v)
            weights = torch.sigmoid(dropped(logits, self.config.expert_dropout, self.training))
        if self.config.only is None:
            return Routing(weights, logits=logits)
        return Routing(weights, self.chosen)
