"""LoRA: a low-rank product beside a linear module, y = W x + s B A x (Hu et al., 2021, arXiv 2106.09685).

s = alpha / r, or alpha / √r with `rslora` (Kalajdzievski, 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters.adapter import AdapterLayer, Maker, trainable
from mole.backbones.modules import device_of, find_modules, in_out_features
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
    """The factors at one module.

    `A`          [r, d_in]; of an embedding [r, vocabulary]; of a convolution [r, C_in, *kernel].
    `B`          [d_out, r]; of a convolution [C_out, r / groups, 1, …].
    `magnitude`  m of DoRA (Liu et al., 2024, arXiv 2402.09353), [d_out]; of a convolution [1, C_out, 1, …].
    `bias`       β in s (B A x + β), [d_out].
    `embedding`  whether the module is an embedding: A is looked up by token.

    Raises ValueError for tensors that do not fit each other.
    """

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False

    def __post_init__(self) -> None:
        dims = self.A.dim()
        good = dims == self.B.dim() and (dims == 2 or (3 <= dims <= 5 and not self.embedding))
        if good and dims == 2:
            good = self.A.shape[0] == self.B.shape[1]
        elif good:
            good = self.A.shape[0] % self.B.shape[1] == 0 and set(self.B.shape[2:]) == {1}
        if not good:
            raise ValueError(
                f"LoRA factors of shapes {tuple(self.A.shape)} and {tuple(self.B.shape)}; "
                "wanted A [r, d_in], B [d_out, r]"
            )
        for what, tensor in (("magnitude", self.magnitude), ("bias", self.bias)):
            if tensor is not None and tensor.numel() != self.B.shape[0]:
                raise ValueError(f"a {what} of shape {tuple(tensor.shape)} for {self.B.shape[0]} outputs")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def symbol(self) -> str | None:
        """None: the path of a module is all that tells its place."""
        return None

    @property
    def scale(self) -> float:
        """s in y = W x + s B A x."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    @property
    def kind(self) -> str:
        """The kind of module that these are for: linear, embedding or convolution."""
        if self.embedding:
            return "embedding"
        return "linear" if self.A.dim() == 2 else "convolution"

    def tensors(self) -> dict[str, Tensor]:
        named = {"A": self.A, "B": self.B, "magnitude": self.magnitude, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def layer(self, base: nn.Module, dropout: float, model: nn.Module | None = None) -> LoraLayer:
        """A layer on `base` with a float32 copy of these factors.

        Raises ValueError for shapes that do not fit, and for what is more than A, B and a magnitude.
        """
        if self.kind != "linear" or self.bias is not None:
            what = "lora_bias" if self.bias is not None else self.kind
            raise ValueError(f"an adapter with {what} works in a mixture; it cannot be trained further by itself")
        d_in, d_out = in_out_features(base)
        if (self.A.shape[1], self.B.shape[0]) != (d_in, d_out):
            raise ValueError(
                f"the adapter is for a module of {self.A.shape[1]} → {self.B.shape[0]} features, "
                f"this one has {d_in} → {d_out}"
            )
        if self.magnitude is not None:
            from mole.adapters.dora import DoraLayer

            return DoraLayer(base, self, dropout)
        return LoraLayer(base, self, dropout)


class LoraLayer(AdapterLayer):
    """A linear module with LoRA factors beside it. Only A and B, kept in float32, get gradients."""

    method = "lora"

    def __init__(self, base: nn.Module, weights: LoraWeights, dropout: float = 0.0):
        super().__init__(base, dropout)
        device = device_of(base)
        self.A, self.B = trainable(weights.A, device), trainable(weights.B, device)
        self.alpha, self.rslora, self.scale = weights.alpha, weights.rslora, weights.scale

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
def new_lora(config: LoraConfig, model: nn.Module) -> dict[str, Maker]:
    """LoRA layers that do not change their modules' outputs yet: A random, B zero."""
    return at_targets(config, model, lambda base, generator: LoraLayer(base, first(config, base, generator)))


def at_targets(
    config: Any, model: nn.Module, new: Callable[[nn.Module, torch.Generator], LoraLayer]
) -> dict[str, Maker]:
    """`new` at every module that `config.targets` name, with the dropout of `config`."""

    def make(base: nn.Module, generator: torch.Generator) -> LoraLayer:
        layer = new(base, generator)
        layer.dropout.p = config.dropout
        return layer

    return {path: partial(make, module) for path, module in find_modules(model, config.targets).items()}


def first(config: Any, base: nn.Module, generator: torch.Generator, *, rslora: bool | None = None) -> LoraWeights:
    """The first factors on `base`: A random, B zero. Raises ValueError for a module that is not linear."""
    d_in, d_out = in_out_features(base)
    A = torch.empty(config.rank, d_in)
    if config.init == "gaussian":
        A.normal_(0.0, 1.0 / config.rank, generator=generator)
    else:
        bound = 1.0 / math.sqrt(d_in)
        A.uniform_(-bound, bound, generator=generator)
    scaling = config.rslora if rslora is None else rslora
    return LoraWeights(A=A, B=torch.zeros(d_out, config.rank), alpha=config.alpha, rslora=scaling)
