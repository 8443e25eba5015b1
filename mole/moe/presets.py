"""What `mole moefy` can be told of a surgery: which modules, how experts start, how they route; and usual settings."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Annotated, Literal

from pydantic import Field

from mole.moe.config import CapacityConfig, Count, MoEConfig, MoERouterConfig, NotNegative
from mole.registry import config_dataclass


@config_dataclass
class UpcyclingRouterConfig(MoERouterConfig):
    """Without noise: equal experts would not tell tokens apart by chance."""

    noise: Literal["learned", "normal", "gumbel", "simple", "jitter"] | None = None


@config_dataclass
class SurgeryConfig(MoEConfig):
    """One expert for each token, whose gate is 1 in value: at the start the model computes what it did before."""

    pattern: str
    num_experts: Count | None = 4
    init: Literal["copy", "fresh"] = "copy"
    init_noise: NotNegative = 0.01
    aggregation: Literal["sum", "mean"] = "mean"
    router: UpcyclingRouterConfig = field(default_factory=UpcyclingRouterConfig)


@config_dataclass
class SwitchRouterConfig(MoERouterConfig):
    """Jitter."""

    noise: Literal["learned", "normal", "gumbel", "simple", "jitter"] | None = "jitter"
    losses: dict[str, NotNegative] | None = field(default_factory=lambda: {"load_balance": 0.01})


@config_dataclass
class SwitchCapacityConfig(CapacityConfig):
    """A quarter more than the even share."""

    factor: Annotated[float, Field(gt=0)] | None = 1.25
    eval_factor: Annotated[float, Field(gt=0)] | None = 2.0
    drop_order: Literal["priority", "position"] = "position"
    dropped: Literal["zero", "identity"] = "zero"


@config_dataclass
class SwitchConfig(SurgeryConfig):
    """One expert, weighted by its probability; capacity (Fedus et al. 2021, arXiv 2101.03961)."""

    name: Literal["switch"] = "switch"  # type: ignore[assignment]
    aggregation: Literal["sum", "mean"] = "sum"
    router: SwitchRouterConfig = field(default_factory=SwitchRouterConfig)  # type: ignore[assignment]
    capacity: SwitchCapacityConfig = field(default_factory=SwitchCapacityConfig)


@config_dataclass
class MixtralRouterConfig(UpcyclingRouterConfig):
    """Gates of the chosen sum to 1."""

    norm_topk: bool = True
    losses: dict[str, NotNegative] | None = field(default_factory=lambda: {"load_balance": 0.02})


@config_dataclass
class MixtralConfig(SurgeryConfig):
    """Two of eight experts (Jiang et al. 2024, arXiv 2401.04088)."""

    name: Literal["mixtral"] = "mixtral"  # type: ignore[assignment]
    num_experts: Count | None = 8
    k: Count = 2
    aggregation: Literal["sum", "mean"] = "sum"
    router: MixtralRouterConfig = field(default_factory=MixtralRouterConfig)


@config_dataclass
class DeepseekRouterConfig(UpcyclingRouterConfig):
    """Sigmoid scores, balanced by a bias of the choice, without a loss."""

    score: Literal["softmax", "sigmoid", "cosine"] = "sigmoid"
    norm_topk: bool = True
    bias_rate: NotNegative = 1e-3
    losses: dict[str, NotNegative] | None = field(default_factory=dict)


@config_dataclass
class DeepseekConfig(SurgeryConfig):
    """Two of eight experts, balanced without a loss (DeepSeek-AI 2024, arXiv 2412.19437; 2408.15664)."""

    name: Literal["deepseek"] = "deepseek"  # type: ignore[assignment]
    num_experts: Count | None = 8
    k: Count = 2
    aggregation: Literal["sum", "mean"] = "sum"
    router: DeepseekRouterConfig = field(default_factory=DeepseekRouterConfig)


AnySurgery = Annotated[SurgeryConfig | SwitchConfig | MixtralConfig | DeepseekConfig, Field(discriminator="name")]


def block_config(config: SurgeryConfig) -> MoEConfig:
    """What of it each block keeps: how it routes. Its experts are made by then."""
    given = {f.name: getattr(config, f.name) for f in fields(MoEConfig) if f.name not in ("name", "init_noise")}
    for name, kind in (("router", MoERouterConfig), ("capacity", CapacityConfig)):
        part = given[name]
        given[name] = kind(**{f.name: getattr(part, f.name) for f in fields(kind)})
    return MoEConfig(**given)
