"""Arrow: every token goes to the experts whose update would act on it most, by its strongest direction.

v_e is the top right singular vector of ΔW_e = s_e B_e A_e, exactly; z_te = |x_t · v_e|. Nothing is learned and no data
is needed. Ostapenko et al. 2024, arXiv 2405.11157.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import MixtureShape, Router
from mole.routers.general_knowledge import Subtracting, Subtraction
from mole.routers.low_rank import Change, added, right_singular, stacked
from mole.routers.prototypes import Norm, Prototyped, PrototypeRouter
from mole.routing import Routing

logger = logging.getLogger(__name__)


@config_dataclass
class ArrowConfig(Prototyped, Subtracting):
    """|x · v_e| / temperature; with score=abs_cosine |x · v_e| / ‖x‖.

    `scale_by_sigma` multiplies v_e by its singular value. `tie` how modules of one group share a prototype: that of
    their updates stacked, or of their sum.
    """

    name: Literal["arrow"] = "arrow"
    top_k: Annotated[int, Field(ge=1)] | None = 4
    temperature: Annotated[float, Field(gt=0)] | None = 1.0
    input_norm: Norm = "none"
    prototype_norm: Norm = "none"
    score: Literal["abs_dot", "abs_cosine"] = "abs_dot"
    scale_by_sigma: bool = False
    tie: Literal["stack", "sum"] = "stack"

    def __post_init__(self):
        problems = [*self.placing_problems(), *self.subtraction_problems(self.combine, self.missing)]
        if problems:
            raise ValueError("\n".join(problems))


class LowRankRouter(PrototypeRouter):
    """Prototypes from the experts' own updates, with or without general knowledge; `sigma` [E, 2] the two largest
    singular values of each.
    """

    needs = frozenset({"experts"})
    signless = True
    sigma: Tensor
    generals: Tensor
    _scored: Tensor

    def __init__(self, config: Any, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        self.subtraction = Subtraction(config, shape)
        self.register_buffer("sigma", torch.zeros(shape.num_experts, 2))
        self.register_buffer("generals", torch.tensor(self.subtraction.generals, dtype=torch.long), persistent=False)
        scored = [index not in self.subtraction.generals for index in range(shape.num_experts)]
        self.register_buffer("_scored", torch.tensor(scored), persistent=False)

    def take_experts(self, weights: Sequence[Mapping[int, Any]]) -> None:
        """For each site: mixture index → LoRA weights there. Raises ValueError for experts of another kind."""
        self.require_one_input(weights)
        for expert in range(self.shape.num_experts):
            found = []
            for site, here in zip(self.sites, weights, strict=True):
                if expert in here:
                    change, error = self.subtraction.change(here, expert, site)
                    found.append(change)
                    if error:
                        name = self.shape.expert_names[expert]
                        logger.info("%s at %s: relative error of router.subtract_rank %.3g", name, site, error)
            if found:
                self._take(expert, found)

    def require_one_input(self, weights: Sequence[Mapping[int, Any]]) -> None:
        """Raises ValueError if the modules of this group read vectors of several widths."""
        for site, here in zip(self.sites, weights, strict=True):
            for expert, part in here.items():
                width = getattr(getattr(part, "A", None), "shape", (0, self.input_dim))[1]
                if width != self.input_dim:
                    raise ValueError(
                        f"router={self.config.name}: {self.sites[0]} reads {self.input_dim} features and {site} reads "
                        f"{width} ({self.shape.expert_names[expert]!r}), so they can share no prototype: group modules "
                        "with one common input by router.group_by, or use router.scope=layer"
                    )

    def _take(self, expert: int, changes: list[Change]) -> None:
        """Keeps what the router goes by for that expert; `changes` at those of its sites that the expert adapts."""
        change = self._tied(changes)
        sigma, V = right_singular(change)
        v = V[0] if sigma[0] > 0 else torch.zeros_like(V[0])
        v = v * torch.sign(v[v.abs().argmax()])  # its sign is free: one for ever
        self.take_prototypes({expert: v * sigma[0] if getattr(self.config, "scale_by_sigma", False) else v})
        self.sigma[expert] = torch.cat([sigma, sigma.new_zeros(1)])[:2].to(self.sigma)

    def _tied(self, changes: list[Change]) -> Change:
        if getattr(self.config, "tie", "stack") == "stack":
            return changes[0] if len(changes) == 1 else stacked(changes)
        if len({change.B.shape[0] for change in changes}) > 1:
            raise ValueError(
                f"router.tie=sum: {', '.join(self.sites)} give vectors of several widths: use router.tie=stack"
            )
        return added(changes, [1.0] * len(changes))

    def carry(self, old: Router) -> None:
        """Nothing: what this router knows follows from the experts themselves, which may be others by the same name."""

    def unchanged(self, old: Router) -> list[tuple[int, int]]:
        """Index here, index in `old`, of the experts that are the same in both by name and by what they change."""
        assert isinstance(old, LowRankRouter)
        names = {name: index for index, name in enumerate(old.shape.expert_names)}
        pairs = [(to, names[name]) for to, name in enumerate(self.shape.expert_names) if name in names]
        return [
            (to, source)
            for to, source in pairs
            if torch.equal(self.sigma[to].cpu(), old.sigma[source].cpu())
            and torch.equal(self.prototypes[to].cpu(), old.prototypes[source].cpu())
        ]

    @property
    def flatness(self) -> Tensor:
        """σ₂ / σ₁ [E]: near 1 there is no strongest direction, and the prototype says little."""
        return self.sigma[:, 1] / self.sigma[:, 0].clamp_min(torch.finfo(self.sigma.dtype).tiny)

    def _allowed(self) -> Tensor:
        return self.present & self._scored

    def _routing(self, logits: Tensor) -> Routing:
        routing = super()._routing(logits)
        if not self.subtraction.weighs_generals:
            return routing
        total = routing.weights.sum(-1, keepdim=True) / -len(self.subtraction.generals)
        if routing.expert_ids is None:
            return Routing(routing.weights + total * (~self._scored), logits=logits)
        weights = torch.cat([routing.weights, total.expand(*total.shape[:-1], len(self.generals))], dim=-1)
        ids = torch.cat([routing.expert_ids, self.generals.expand(*total.shape[:-1], -1)], dim=-1)
        return Routing(weights, ids, logits=logits)


@ROUTERS.register("arrow", ArrowConfig)
class ArrowRouter(LowRankRouter):
    """Per token, per module or group of modules; nothing is learned."""
