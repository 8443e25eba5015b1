"""What a block is made of: its configuration, and what cannot go together.

Every violation is gathered and raised as one ValueError that gives the field, its value and what is valid.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from mole.registry import config_dataclass, unknown
from mole.routing.losses import LOSSES

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Null = Literal["zero", "identity", "constant"]

NULL_RATE = "null_rate"
COEFFICIENT = 0.01
OWN_LOSSES = tuple(name for name in LOSSES if name != "expert_label")  # a block knows no tasks
LEARNED = ("top_k", "expert_choice")  # routers that score experts, and may do so noisily
_OWNED = (("slots", 1, "soft"), ("residual", "outside", "depth"), ("softmax_over", "experts", "expert_choice"))
AHEAD = ("expert_choice", "soft")  # a token's output depends on later ones


@config_dataclass
class MoERouterConfig:
    """How tokens are scored and chosen. Fields that a router does not have must stay as they are."""

    name: Literal["top_k", "expert_choice", "soft", "depth", "hash", "round_robin"] = "top_k"
    score: Literal["softmax", "sigmoid", "cosine"] = "softmax"
    temperature: Positive = 1.0
    proj_dim: Count = 256
    norm_topk: bool = False
    straight_through: bool | None = None
    route_scale: Positive = 1.0
    num_groups: Count = 1
    topk_groups: Count = 1
    noise: Literal["learned", "normal", "gumbel", "simple", "jitter"] | None = "learned"
    noise_scale: NotNegative = 1.0
    noise_eps: Annotated[float, Field(gt=0, lt=1)] = 0.01
    noise_tau: Positive = 1.0
    noise_tau_end: Positive = 1.0
    noise_steps: Annotated[int, Field(ge=0)] = 0
    capacity_factor: Positive | None = None
    bias_rate: NotNegative = 0.0
    softmax_over: Literal["experts", "tokens"] = "experts"
    slots: Count = 1
    residual: Literal["outside", "inside"] = "outside"
    seed: int = 0
    losses: dict[str, NotNegative] | None = None


@config_dataclass
class CapacityConfig:
    """How many tokens an expert takes at most, and what becomes of those that it does not."""

    factor: Positive | None = None
    eval_factor: Positive | None = None
    minimum: Count = 4
    drop_order: Literal["priority", "position"] = "priority"
    dropped: Literal["zero", "identity"] = "zero"


@config_dataclass
class MoEConfig:
    """A mixture of experts out of modules: how many, how they are chosen, balanced and computed."""

    name: Literal["default"] = "default"
    num_experts: Count | None = None
    k: Count = 1
    aggregation: Literal["sum", "mean"] = "sum"
    route: Literal["tokens", "images", "sequence"] = "tokens"
    contract: Literal["auto", "pointwise", "sequence", "zeros"] = "auto"
    layer_id: int | str | None = None
    null_experts: tuple[Null, ...] = ()
    shared_experts: Annotated[int, Field(ge=0)] = 0
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    router: MoERouterConfig = field(default_factory=MoERouterConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    null_target: Annotated[float, Field(gt=0, lt=1)] | None = None
    losses_over: Literal["sequence", "microbatch", "global"] = "microbatch"
    losses_mode: Literal["collect", "inject"] = "collect"
    backend: Literal["auto", "loop", "vmap", "grouped", "stacked", "reference"] = "auto"
    init_noise: NotNegative = 0.0
    causal: bool = False
    allow_noncausal: bool = False

    def __post_init__(self):
        problems = [*_selection(self), *_noise(self), *_nulls(self), *_losses(self), *_places(self)]
        if self.num_experts is not None:
            problems += counts(self, self.num_experts)
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def normalises(self) -> bool:
        """Whether a token's gates sum to 1."""
        return self.router.norm_topk or self.aggregation == "mean"

    @property
    def straight_through(self) -> bool:
        """Whether a normalised gate at k = 1 carries the gradient of ln p."""
        given = self.router.straight_through
        return self.aggregation == "mean" if given is None else given

    @property
    def noise(self) -> str | None:
        """The noise of training, for routers that have one."""
        return self.router.noise if self.router.name in LEARNED else None


def _selection(config: MoEConfig) -> list[str]:
    router, found = config.router, []
    if router.name in ("soft", "depth") and config.k != 1:
        found.append(f"k={config.k}: router.name={router.name} has no k, leave it at 1")
    one = router.name == "top_k" and config.k == 1
    if one and config.normalises and not config.straight_through:
        found.append(
            "router.norm_topk=true at k=1 gives every token the gate 1, which has no gradient: set "
            "router.straight_through=true, router.norm_topk=false, or k above 1"
        )
    if router.straight_through and not config.normalises:
        found.append("router.straight_through=true needs router.norm_topk=true or aggregation=mean")
    if config.aggregation == "mean" and router.route_scale != 1:
        found.append(f"router.route_scale={router.route_scale:g} cancels under aggregation=mean: leave it at 1")
    if config.aggregation == "mean" and router.name in ("soft", "depth"):
        found.append(f"aggregation=mean: router.name={router.name} has no slots to take a mean of, use sum")
    if router.bias_rate and router.name != "top_k":
        found.append(f"router.bias_rate={router.bias_rate:g}: only router.name=top_k has a bias, not {router.name}")
    if router.bias_rate and one and config.normalises:
        found.append(
            f"router.bias_rate={router.bias_rate:g} with normalised gates at k=1: the bias and the router fight; use "
            "plain gates (aggregation=sum, router.norm_topk=false), best with router.score=sigmoid"
        )
    if router.capacity_factor is not None and router.name not in ("expert_choice", "depth"):
        found.append(
            f"router.capacity_factor={router.capacity_factor:g} is of router.name=expert_choice and depth; for "
            f"{router.name} set capacity.factor"
        )
    if router.capacity_factor is not None and router.name == "expert_choice" and config.k != 1:
        found.append(f"k={config.k} and router.capacity_factor={router.capacity_factor:g}: give one of them")
    limited = config.capacity.factor is not None or config.capacity.eval_factor is not None
    if limited and router.name in ("expert_choice", "soft", "depth"):
        found.append(f"capacity.factor: router.name={router.name} drops nothing, leave it at null")
    for name, usual, owner in _OWNED:
        if getattr(router, name) != usual and router.name != owner:
            found.append(f"router.{name}={getattr(router, name)} is of router.name={owner}, not {router.name}")
    if router.proj_dim != 256 and router.score != "cosine":
        found.append(f"router.proj_dim={router.proj_dim} is of router.score=cosine, not {router.score}")
    if config.expert_dropout and router.name not in LEARNED:
        found.append(f"expert_dropout={config.expert_dropout:g}: router.name={router.name} cannot bar experts, use 0")
    return found


def _noise(config: MoEConfig) -> list[str]:
    router, found = config.router, []
    if router.name not in LEARNED and router.noise not in (None, "learned"):
        found.append(f"router.noise={router.noise}: router.name={router.name} has no noise, set null")
    if router.score == "sigmoid" and config.noise in ("simple", "gumbel"):
        found.append(f"router.noise={router.noise} samples from a softmax: not with router.score=sigmoid")
    if router.name not in LEARNED and router.score != "softmax":
        found.append(f"router.score={router.score}: router.name={router.name} has its own score, leave it at softmax")
    if router.noise_tau_end > router.noise_tau:
        found.append(
            f"router.noise_tau_end={router.noise_tau_end:g} is above router.noise_tau={router.noise_tau:g}: it falls"
        )
    return found


def _nulls(config: MoEConfig) -> list[str]:
    found = []
    if config.null_experts and config.router.name not in LEARNED:
        found.append(
            f"null_experts={list(config.null_experts)} (hole): router.name={config.router.name} cannot choose them"
        )
    if config.null_experts and config.router.num_groups > 1:
        found.append(f"null_experts={list(config.null_experts)} belong to no group: set router.num_groups=1")
    losses = config.router.losses or {}
    if config.null_target is not None and not (config.null_experts and losses.get(NULL_RATE)):
        found.append(f"null_target={config.null_target:g} needs a null expert, and null_rate in router.losses")
    if NULL_RATE in losses and config.null_target is None:
        found.append("router.losses: null_rate needs null_target, the wanted share of slots, between 0 and 1")
    return found


def _losses(config: MoEConfig) -> list[str]:
    router = config.router
    losses = router.losses or {}
    known = [*OWN_LOSSES, NULL_RATE]
    found = [unknown("router.losses: loss", name, known) for name in losses if name not in known]
    if "load_cv2" in losses and (config.noise not in ("learned", "normal") or router.name != "top_k"):
        found.append(
            f"router.losses: load_cv2 (aux_criterion=prob) needs router.noise=learned (gaussian) or normal with "
            f"router.name=top_k, not noise={router.noise} with {router.name}"
        )
    if losses and router.name not in LEARNED:
        found.append(f"router.losses={losses}: router.name={router.name} has nothing to balance, set {{}} or null")
    return found


def _places(config: MoEConfig) -> list[str]:
    router, found = config.router, []
    if config.route != "tokens" and router.name not in ("top_k", "round_robin"):
        found.append(
            f"route={config.route}: with router.name={router.name} one sample's output would depend on the others; use "
            "route=tokens or router.name=top_k"
        )
    if config.route != "tokens" and config.contract != "auto":
        found.append(f"contract={config.contract}: under route={config.route} experts see whole samples, use auto")
    if config.route != "tokens" and config.backend in ("vmap", "grouped", "stacked"):
        found.append(f"backend={config.backend}: route={config.route} gives experts whole samples, use loop or auto")
    if config.contract in ("sequence", "zeros") and config.backend in ("vmap", "grouped", "stacked"):
        found.append(f"backend={config.backend} packs tokens: contract={config.contract} goes with loop or auto")
    if config.causal and router.name in AHEAD and not config.allow_noncausal:
        found.append(
            f"router.name={router.name} lets a token's output depend on later tokens, and the module is in a decoder: "
            "use top_k, or allow_noncausal=True"
        )
    return found


def counts(config: MoEConfig, experts: int) -> list[str]:
    """What is wrong with a configuration for as many experts."""
    router, found = config.router, []
    choices = experts + len(config.null_experts)
    if router.name in ("top_k", "hash", "round_robin") and config.k > choices:
        found.append(f"k={config.k}: valid are 1 … {choices}, the experts with the null ones")
    if router.num_groups > 1:
        if router.name != "top_k":
            found.append(f"router.num_groups={router.num_groups}: router.name={router.name} has no groups, use 1")
        if experts % router.num_groups:
            found.append(f"router.num_groups={router.num_groups} does not divide num_experts={experts}")
        elif config.k > router.topk_groups * experts // router.num_groups:
            most = router.topk_groups * experts // router.num_groups
            found.append(f"k={config.k}: {router.topk_groups} groups of experts hold {most}, valid are 1 … {most}")
    if router.topk_groups > router.num_groups:
        found.append(f"router.topk_groups={router.topk_groups}: valid are 1 … router.num_groups={router.num_groups}")
    if router.name == "depth" and experts != 1:
        found.append(f"num_experts={experts}: router.name=depth passes tokens through one module or past it, use 1")
    if "load_cv2" in (router.losses or {}) and config.k >= choices:
        found.append(f"router.losses: load_cv2 needs a choice, k={config.k} takes all {choices}; use importance_cv2")
    return found


def losses_of(config: MoEConfig, experts: int) -> dict[str, float]:
    """The losses and coefficients of a block; by default those of MoEfy for its noise."""
    if config.router.losses is not None:
        return {name: value for name, value in config.router.losses.items() if value}
    if config.router.name not in LEARNED or experts == 1:
        return {}
    if config.noise not in ("learned", "normal"):
        return {"balance_entropy": COEFFICIENT}
    names = ["importance_cv2"]
    if config.router.name == "top_k" and config.k < experts + len(config.null_experts):
        names.append("load_cv2")
    return dict.fromkeys(names, COEFFICIENT)
