"""Multi-adapters: learned static weights of single-task experts and of the plain backbone, as branches of one sum.

    y = Σ_k w_k b_k + w_base b_base,    w = normalise(θ_g)

One θ for the model, for runs of neighbouring sub-layers, for each block or each sub-layer. Norms that are mixed by
themselves belong to the sub-layer that the backbone lists before them in their block, else to the first of the block;
norms outside the blocks to the sub-layer before them, those before all sub-layers to the first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import MixtureShape
from mole.routers.float32 import at_least_float32
from mole.routers.static import StaticConfig, StaticRouter, block_of
from mole.routing import Frame, Routing

BASE, FLEX = "base", "flex"
_NORM = re.compile(r"norm|^ln_", re.IGNORECASE)
Mode = Literal["base", "flex", "base_ft", "full_ft"]


@config_dataclass
class MultiAdapterConfig(StaticConfig):
    """Which branches take part, who shares their weights, and what else is trained.

    `mode` base: the backbone is a branch, θ and the head are trained; flex: a new adapter after the mix in the place of
    that branch; base_ft: as base, the backbone is trained too; full_ft: the experts as well. `include_base` and
    `include_flex` follow the mode where they are null.
    """

    name: Literal["multi_adapter"] = "multi_adapter"  # type: ignore[assignment]
    mode: Mode = "base"
    site: Literal["block", "module"] = "module"
    num_groups: int | None = 1
    include_flex: bool | None = None
    flex_size: Annotated[int, Field(ge=1)] = 64
    flex_norm: bool = True
    log_every_steps: Annotated[int, Field(ge=1)] | None = None

    def problems(self) -> list[str]:
        """As of a static router; and what the mode says otherwise."""
        found = self.shared_problems()
        if self.num_groups is not None and self.num_groups < 1:
            one = " (-1 for a set per block is written num_groups=null router.site=block)" * (self.num_groups == -1)
            found.append(f"router.num_groups={self.num_groups}: a number of sets from 1 on, or null{one}")
        for field, follows in (("include_base", self.mode != "flex"), ("include_flex", self.mode == "flex")):
            value = getattr(self, field)
            if value is not None and value != follows:
                found.append(f"router.{field}={str(value).lower()} contradicts router.mode={self.mode}: leave it null")
        if self.combine != "outputs":
            found.append("router=multi_adapter mixes what experts give: set router.combine=outputs")
        return found

    @property
    def has_base(self) -> bool:
        return self.mode != "flex"

    @property
    def has_flex(self) -> bool:
        """Whether a new adapter follows the mix."""
        return self.mode == "flex"


def is_norm_site(path: str) -> bool:
    """Whether a mixed module is a norm by itself, by its name."""
    return bool(_NORM.search(path.rpartition(".")[2]))


def sub_layers(sites: Sequence[str], closing: Collection[str] = ()) -> list[str]:
    """The sites that are no norms by themselves, in the order of execution; all of them if all are norms.

    A whole sub-layer stands for the modules in it, and a norm in `closing` for the sub-layer that it closes.
    """
    found = [site for site in sites if site in closing or not is_norm_site(site)]
    return [site for site in found if not any(site.startswith(f"{outer}.") for outer in found)] or list(sites)


@ROUTERS.register("multi_adapter", MultiAdapterConfig)
class MultiAdapterRouter(StaticRouter):
    """Weights [1, 1, E] and the backbone's own [1, 1, 1] per set. Raises ValueError for fewer than two branches."""

    clipped = False
    config: MultiAdapterConfig

    def __init__(self, config: MultiAdapterConfig, shape: MixtureShape, **place: Any):
        if odd := sorted({BASE, FLEX} & set(shape.expert_names)):
            raise ValueError(f"an expert is called {odd[0]!r}, which names a branch of its own: rename it")
        super().__init__(config, shape, **place)
        branches = int(self.kept.sum()) + config.has_base
        if branches < 2:
            raise ValueError(
                f"router=multi_adapter needs two branches at least, and there is {branches}: give more experts, or "
                "leave the backbone in (router.mode=base)"
            )
        if config.normalise == "none":
            start = 1.0 / branches if config.init is None else config.init
            nn.init.constant_(self.theta, start)
            if config.has_base:
                nn.init.constant_(self.base, start)

    @property
    def sub_layers(self) -> list[str]:
        """The sites that count where weights are shared by sub-layers."""
        return sub_layers(self.sites, self.shape.closing)

    def _groups(self) -> dict[str, tuple[int, ...]]:
        """Set → indices of its sites; each norm goes with a sub-layer."""
        owners = self.sub_layers
        sets = [[owners[place] for place in places] for places in super()._groups_of(owners).values()]
        set_of = {site: name for name, members in enumerate(sets) for site in members}
        first_of_block: dict[str, int] = {}
        for site in owners:
            first_of_block.setdefault(block_of(site), set_of[site])
        members: list[list[int]] = [[] for _ in sets]
        before, block = set_of[owners[0]], ""
        for place, site in enumerate(self.sites):
            if block_of(site) != block:
                block = block_of(site)
                before = first_of_block.get(block, before)
            outer = next((owner for owner in owners if site.startswith(f"{owner}.")), site)
            before = set_of.get(outer, before)
            members[before].append(place)
        return {f"set_{number:02d}": tuple(places) for number, places in enumerate(members)}

    def forward(self, x: Tensor | None, frame: Frame) -> Routing | tuple[Routing, ...]:
        """→ weights [1, 1, E] with the backbone's own: one routing if all modules share it, else one for each site."""
        weights, base = self.weights(dropping=self.training), self.base_weights()
        theta = at_least_float32(self.theta) / self.config.temperature
        if base is None:
            base = torch.zeros_like(weights[:, :1])
        elif self.config.normalise == "softmax":
            base = 1.0 - weights.sum(-1, keepdim=True)
        made = [
            Routing(w[None, None], logits=logits[None, None], base=own[None, None])
            for w, logits, own in zip(weights, theta, base, strict=True)
        ]
        return made[0] if len(made) == 1 else tuple(self._by_site(made))

    def base_weights(self) -> Tensor | None:
        """The backbone's weight in every set [G, 1]; None where it is no branch."""
        if not self.config.has_base:
            return None
        own = at_least_float32(self.base)
        if self.config.normalise == "sigmoid":
            return torch.sigmoid(own / self.config.temperature)
        return own if self.config.normalise == "none" else 1.0 - self.weights().sum(-1, keepdim=True)

    def weights_by_group(self) -> dict[str, dict[str, float]]:
        """Set → branch → weight."""
        base = self.base_weights()
        found: dict[str, dict[str, float]] = {}
        for place, (group, row) in enumerate(zip(self.groups, self.weights().detach().tolist(), strict=True)):
            found[group] = {n: w for n, w, k in zip(self.shape.expert_names, row, self.kept.tolist(), strict=True) if k}
            if base is not None:
                found[group][BASE] = float(base[place].detach())
        return found

    def mergeable(self) -> Tensor | tuple[Tensor, ...]:
        raise ValueError(
            "router=multi_adapter mixes branches, each with norms of its own: no single expert does the same"
        )

    def highest_weight(self, summed_rates: float) -> float | None:
        """What a softmax weight can hardly pass under Adam: `summed_rates` is Σ learning rate over all steps.

        Each θ moves by about one rate a step, so the gap to K' others is at most Δ = 2 Σ rate / temperature:
        1 / (1 + K' e^−Δ). None where nothing bounds it so.
        """
        if self.config.normalise != "softmax":
            return None
        others = int(self.kept.sum()) + self.config.has_base - 1
        return 1.0 / (1.0 + others * math.exp(-2.0 * summed_rates / self.config.temperature))
