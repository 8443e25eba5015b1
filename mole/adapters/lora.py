"""LoRA: a low-rank product beside a linear module, y = W x + s B A x (Hu et al., 2021, arXiv 2106.09685).

s = alpha / r, or alpha / √r with `rslora` (Kalajdzievski, 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters.adapter import AdapterLayer
from mole.backbones.modules import in_out_features
from mole.registry import ADAPTERS, config_dataclass


@config_dataclass
class LoraConfig:
    """What a new LoRA adapter looks like."""

    name: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096)
    alpha: float = Field(default=16.0, gt=0)
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | str = "all-linear"
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ValueError("targets: name at least one module, or all-linear")


@dataclass(frozen=True)
class LoraWeights:
    """The factors at one module: A [r, d_in], B [d_out, r]."""

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"LoRA factors of shapes {tuple(self.A.shape)} and {tuple(self.B.shape)}; "
                "wanted A [r, d_in], B [d_out, r]"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """s in y = W x + s B A x."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B}

    def layer(self, base: nn.Module, dropout: float) -> LoraLayer:
        """A layer on `base` with a float32 copy of these factors."""
        d_in, d_out = in_out_features(base)
        if (self.A.shape[1], self.B.shape[0]) != (d_in, d_out):
            raise ValueError(
                f"the adapter is for a module of {self.A.shape[1]} → {self.B.shape[0]} features, "
                f"this one has {d_in} → {d_out}"
            )
        return LoraLayer(base, self, dropout)


class LoraLayer(AdapterLayer):
    """A linear module with LoRA factors beside it. Only A and B, kept in float32, get gradients."""

    method = "lora"

    def __init__(self, base: nn.Module, weights: LoraWeights, dropout: float = 0.0):
        super().__init__(base)
        device = next(base.parameters()).device
        self.A = nn.Parameter(weights.A.detach().to(device, torch.float32, copy=True).contiguous())
        self.B = nn.Parameter(weights.B.detach().to(device, torch.float32, copy=True).contiguous())
        self.alpha, self.rslora, self.scale = weights.alpha, weights.rslora, weights.scale
        self.dropout = nn.Dropout(dropout)
        self.train(base.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., d_in] → [..., d_out] in the dtype of the base module's output."""
        out = self.base(x, *args, **kwargs)
        delta = F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A), self.B)
        return (out + self.scale * delta).to(out.dtype)

    def weights(self) -> LoraWeights:
        A, B = (factor.detach().cpu().clone() for factor in (self.A, self.B))
        return LoraWeights(A=A, B=B, alpha=self.alpha, rslora=self.rslora)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, alpha={self.alpha}, rslora={self.rslora}"


@ADAPTERS.register("lora", LoraConfig)
def new_lora(config: LoraConfig, base: nn.Module, generator: torch.Generator) -> LoraLayer:
    """A LoRA layer on `base` that does not change its output yet: A random, B zero."""
    d_in, d_out = in_out_features(base)
    A = torch.empty(config.rank, d_in)
    if config.init == "gaussian":
        A.normal_(0.0, 1.0 / config.rank, generator=generator)
    else:
        bound = 1.0 / math.sqrt(d_in)
        A.uniform_(-bound, bound, generator=generator)
    weights = LoraWeights(A=A, B=torch.zeros(d_out, config.rank), alpha=config.alpha, rslora=config.rslora)
    return LoraLayer(base, weights, config.dropout)
