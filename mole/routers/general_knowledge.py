"""General knowledge subtraction: experts without what general experts have in common with them (GenKnowSub).

Alipour et al. 2025 (ACL; arXiv 2505.10939). With general experts g = 1 … G:

    delta    ΔW_e − (1/G) Σ_g ΔW_g, whatever the ranks and scales
    factors  s_e (B_e − mean_g B_g)(A_e − mean_g A_g), as PEFT does it; depends on how the factors are rotated

In a mixture the first needs no new experts: Σ_e w_e (ΔW_e − M) = Σ_e w_e ΔW_e − (Σ_e w_e) M, so the general experts
get the weight −Σ_e w_e / G each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from mole.adapters import LoraWeights
from mole.registry import config_dataclass, unknown
from mole.routers.base import MixtureShape
from mole.routers.low_rank import Change, added, change_of, require_lora, truncated


@config_dataclass
class Subtracting:
    """Fields of routers that can take general knowledge off their experts.

    `general_experts` experts of the mixture that hold it; they are never chosen. `subtract` null: delta, if there are
    some. `subtract_rank` keeps the best approximation of that rank of each difference, instead of the exact one.
    """

    general_experts: tuple[str, ...] = ()
    subtract: Literal["delta", "factors"] | None = None
    subtract_rank: Annotated[int, Field(ge=1)] | None = None

    def subtraction_problems(self, combine: str, missing: str) -> list[str]:
        """What is wrong with these fields, together with those on combining."""
        problems = []
        if not self.general_experts and (self.subtract or self.subtract_rank):
            problems.append("router.subtract and router.subtract_rank need router.general_experts: name some")
        if len(set(self.general_experts)) < len(self.general_experts):
            problems.append("router.general_experts names an expert twice")
        if self.subtract == "factors" and self.subtract_rank:
            problems.append("router.subtract=factors keeps the rank: set router.subtract_rank=null")
        if self.general_experts and self.subtract != "factors" and not self.subtract_rank:
            if combine == "parameters":
                problems.append("router.subtract=delta needs router.combine=outputs, or a router.subtract_rank")
            if missing == "renormalise":
                problems.append("router.subtract=delta gives general experts negative weights: set router.missing=drop")
        return problems

    @property
    def makes_experts(self) -> bool:
        """Whether modules compute with other factors than those of the experts."""
        return bool(self.general_experts) and (self.subtract == "factors" or self.subtract_rank is not None)


class Subtraction:
    """What a config says of general knowledge, for the experts of one mixture. Raises ValueError for unknown names."""

    def __init__(self, config: Any, shape: MixtureShape):
        self.config, self.shape = config, shape
        for name in config.general_experts:
            if name not in shape.expert_names:
                raise ValueError(f"router.general_experts: {unknown('expert', name, shape.expert_names)}")
        self.generals = tuple(shape.expert_names.index(name) for name in config.general_experts)
        if len(self.generals) == shape.num_experts:
            raise ValueError("router.general_experts names every expert: nothing is left to route to")

    @property
    def weighs_generals(self) -> bool:
        """Whether the general experts work in the mixture with a negative weight."""
        return bool(self.generals) and not self.config.makes_experts

    def change(self, here: Mapping[int, Any], expert: int, site: str) -> tuple[Change, float]:
        """What the expert with that index changes at a module, and the relative error of a truncation to a rank.

        `here` has the weights at the module, by mixture index; general experts that have none there count as 0.
        Raises ValueError for weights of another kind.
        """
        own = self._lora(here, expert, site)
        general = [self._lora(here, g, site) for g in self.generals if g in here]
        if not self.generals:
            return change_of(own), 0.0
        if self.config.subtract == "factors":
            return self._of_factors(own, general, expert, site), 0.0
        share = -1.0 / len(self.generals)
        difference = added([change_of(w) for w in (own, *general)], [1.0, *[share] * len(general)])
        if self.config.subtract_rank is None:
            return difference, 0.0
        return truncated(difference, self.config.subtract_rank)

    def _of_factors(self, own: LoraWeights, general: list[LoraWeights], expert: int, site: str) -> Change:
        ranks = [weights.rank for weights in (own, *general)]
        if len(general) < len(self.generals) or len(set(ranks)) > 1:
            raise ValueError(
                f"router.subtract=factors at {site}: {self.shape.expert_names[expert]!r} and the general experts need "
                f"factors of one rank there, found ranks {ranks} for {len(self.generals) + 1} experts: use "
                "router.subtract=delta"
            )
        B, A = own.B.detach().double(), own.A.detach().double()
        mean_B = torch.stack([weights.B.detach().double() for weights in general]).mean(0)
        mean_A = torch.stack([weights.A.detach().double() for weights in general]).mean(0)
        return Change(own.scale * (B - mean_B), A - mean_A)

    def _lora(self, here: Mapping[int, Any], expert: int, site: str) -> LoraWeights:
        name = self.shape.expert_names[expert]
        weights = require_lora(here[expert], router=self.config.name, expert=name, site=site)
        if self.generals and (weights.magnitude is not None or weights.bias is not None):
            what = "DoRA" if weights.magnitude is not None else "lora_bias"
            raise ValueError(
                f"router.general_experts: {name!r} has {what} at {site}, from which nothing low-rank can be taken off"
            )
        return weights
