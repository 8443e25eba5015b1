"""Static router: learned weights that do not depend on the input, one set for the model or one for each part of it.

    w = normalise(θ_g),   θ_g ∈ R^E (and one for the plain backbone) for the group g of modules

With normalise=none and a set per module: LoRA soups' learned concatenation (CAT), arXiv 2410.13025.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mole.registry import ROUTERS, config_dataclass, unknown
from mole.routers.base import Combining, Learning, MixtureShape, Router, dropped
from mole.routers.float32 import at_least_float32
from mole.routing import Frame, Routing

HEAD_START = 4.0  # logit of `init_expert`; that of the others is 0
_BLOCK = re.compile(r"^.*?\.\d+(?=\.|$)")


@config_dataclass
class StaticConfig(Combining, Learning):
    """How the learned numbers become weights, who shares them, and where they start."""

    name: Literal["static"] = "static"
    normalise: Literal["softmax", "sigmoid", "none"] = "softmax"
    num_groups: Annotated[int, Field(ge=1)] | None = 1
    site: Literal["block", "module"] = "block"
    include_base: bool | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    init: float | None = None
    init_expert: str | None = None
    exclude: tuple[str, ...] = ()
    lr: Annotated[float, Field(gt=0)] | None = 0.01
    weight_decay: Annotated[float, Field(ge=0)] | None = 0.0

    def __post_init__(self):
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with these fields together."""
        found = self.shared_problems()
        if self.include_base and self.normalise != "softmax":
            found.append(
                f"router.include_base=true cannot act with router.normalise={self.normalise}: the backbone takes "
                "weight from the experts in a softmax only"
            )
        return found

    def shared_problems(self) -> list[str]:
        """What is wrong in every kind of static router."""
        problems = []
        if self.init_expert is not None and self.normalise != "softmax":
            problems.append("router.init_expert needs router.normalise=softmax")
        if self.init is not None and self.normalise != "none":
            problems.append("router.init is the first weight with router.normalise=none: others start at equal weights")
        if self.temperature != 1 and self.normalise == "none":
            problems.append("router.temperature cannot act with router.normalise=none: set it to 1.0")
        if self.init_expert is not None and self.init_expert in self.exclude:
            problems.append(f"router.init_expert={self.init_expert} is in router.exclude")
        return problems

    @property
    def has_base(self) -> bool:
        """Whether the plain backbone has a weight of its own: what the experts do not get."""
        return self.normalise == "softmax" if self.include_base is None else self.include_base


def block_of(site: str) -> str:
    """The path of the repeated block that a module is in; its own outside of one."""
    match = _BLOCK.match(site)
    return match.group() if match else site


def groups_of(sites: Sequence[str], num_groups: int | None, site: str) -> dict[str, tuple[int, ...]]:
    """Group → indices of its sites: runs of neighbouring blocks (or modules), of near-equal length.

    A module outside every repeated block is a block by itself. Raises ValueError for more groups than there are parts.
    """
    parts: dict[str, list[int]] = {}
    for index, path in enumerate(sites):
        parts.setdefault(block_of(path) if site == "block" else path, []).append(index)
    if num_groups is None:
        return {name: tuple(members) for name, members in parts.items()}
    if num_groups > len(parts):
        raise ValueError(
            f"router.num_groups={num_groups} with {len(parts)} {site}s: lower router.num_groups, set it to null, or "
            "set router.site=module"
        )
    ends = [len(parts) * (i + 1) // num_groups for i in range(num_groups)]
    members = list(parts.values())
    runs = [members[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return {f"run-{i}": tuple(index for part in run for index in part) for i, run in enumerate(runs)}


@ROUTERS.register("static", StaticConfig)
class StaticRouter(Router):
    """Weights [1, 1, E] per group of modules. Raises ValueError for unknown names, and if no expert is left.

    Start: equal weights, of which the backbone has one share where it takes part; sigmoid: ½ each.
    """

    learned = True
    expert_axes: ClassVar[Mapping[str, int]] = {"theta": 1}
    config: StaticConfig
    kept: Tensor

    def __init__(self, config: StaticConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        named = {"exclude": config.exclude, "init_expert": (config.init_expert,) if config.init_expert else ()}
        for field, names in named.items():
            for name in names:
                if name not in shape.expert_names:
                    raise ValueError(f"router.{field}: {unknown('expert', name, shape.expert_names)}")
        kept = torch.tensor([name not in config.exclude for name in shape.expert_names])
        if not kept.any():
            raise ValueError("router.exclude names every expert: leave at least one")
        self.groups = self._groups()
        start = 0.0 if config.normalise != "none" else 1.0 / int(kept.sum()) if config.init is None else config.init
        self.theta = nn.Parameter(torch.full((len(self.groups), shape.num_experts), start))
        if config.init_expert is not None:
            self.theta.data[:, shape.expert_names.index(config.init_expert)] = HEAD_START
        if config.has_base:
            self.base = nn.Parameter(torch.zeros(len(self.groups), 1))
        self.register_buffer("kept", kept, persistent=False)

    def _groups(self) -> dict[str, tuple[int, ...]]:
        """Set of weights → indices of its sites."""
        return self._groups_of(self.sites)

    def _groups_of(self, sites: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return groups_of(sites, self.config.num_groups, self.config.site)

    def weights(self, *, dropping: bool = False) -> Tensor:
        """w of every group, [G, E]; what a softmax leaves to the backbone is missing from the sum."""
        theta, config = at_least_float32(self.theta), self.config
        left_out = dropped(torch.zeros(theta.shape[-1], device=theta.device), config.expert_dropout, dropping)
        spent = self.kept & (left_out == 0)
        if config.normalise == "none":
            return theta * spent
        if config.normalise == "sigmoid":
            return torch.sigmoid(theta / config.temperature) * spent
        logits = theta.masked_fill(~spent, float("-inf"))
        if config.has_base:
            logits = torch.cat([logits, at_least_float32(self.base)], dim=-1)
        return torch.softmax(logits / config.temperature, dim=-1)[:, : theta.shape[-1]]

    def forward(self, x: Tensor | None, frame: Frame) -> Routing | tuple[Routing, ...]:
        """→ static weights [1, 1, E]: one routing if all modules share it, else one for each site."""
        theta = at_least_float32(self.theta) / self.config.temperature
        made = [
            Routing(weights[None, None], logits=logits[None, None])
            for weights, logits in zip(self.weights(dropping=self.training), theta, strict=True)
        ]
        if len(made) == 1:
            return made[0]
        return tuple(self._by_site(made))

    def mergeable(self) -> Tensor | tuple[Tensor, ...]:
        """The weights [E], or one such tensor for each site."""
        weights = self.weights().detach()
        return weights[0] if len(weights) == 1 else tuple(self._by_site(list(weights)))

    def weights_by_group(self) -> dict[str, dict[str, float]]:
        """Group → expert → weight; the backbone's own as `base`."""
        names, found = self.shape.expert_names, {}
        for group, row in zip(self.groups, self.weights().detach().tolist(), strict=True):
            found[group] = dict(zip(names, row, strict=True))
            if self.config.has_base:
                found[group]["base"] = 1.0 - sum(row)
        return found

    def own_statistics(self) -> dict[str, Any]:
        """The weights of every group, by expert."""
        return {f"{group}/weights": weights for group, weights in self.weights_by_group().items()}

    def _by_site(self, of_groups: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * len(self.sites)
        for one, members in zip(of_groups, self.groups.values(), strict=True):
            for index in members:
                found[index] = one
        return found
