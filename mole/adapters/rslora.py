"""rsLoRA: LoRA whose scale falls with √r instead of r, so that large ranks learn (Kalajdzievski, 2023, 2312.03732)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from mole.adapters.adapter import Maker
from mole.adapters.lora import LoraLayer, at_targets, first
from mole.registry import ADAPTERS, config_dataclass


@config_dataclass
class RsLoraConfig:
    """What a new rsLoRA adapter looks like: s = alpha / √rank."""

    name: Literal["rslora"] = "rslora"
    rank: int = Field(default=64, ge=1, le=4096)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | str = "all-linear"
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ValueError("targets: name at least one module, or all-linear")


@ADAPTERS.register("rslora", RsLoraConfig)
def new_rslora(config: RsLoraConfig, model: nn.Module) -> dict[str, Maker]:
    """LoRA layers with that scale, which do not change their modules' outputs yet."""
    return at_targets(
        config, model, lambda base, generator: LoraLayer(base, first(config, base, generator, rslora=True))
    )
