"""Bottleneck adapters: a small two-layer network beside a sub-layer of each block.

    y = h + s (U σ(D z + b) + c)

houlsby   z = h, the output of each attention and each feed-forward (Houlsby et al., 2019, arXiv 1902.00751)
pfeiffer  z = h, the output of each feed-forward alone (Pfeiffer et al., 2020, arXiv 2005.00247)
parallel  z = x, the input of each feed-forward (He et al., 2021, arXiv 2110.04366)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters.adapter import AdapterLayer, Maker, Weights, trainable
from mole.adapters.places import feed_forwards, outputs_of_blocks, width_of
from mole.backbones.modules import device_of, find_modules, in_out_features, kind_of
from mole.registry import ADAPTERS, config_dataclass

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@config_dataclass
class BottleneckConfig:
    """What new bottlenecks look like. Targets that are auto: the sub-layers that `style` has them at."""

    name: Literal["bottleneck"] = "bottleneck"
    style: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    size: int = Field(default=16, ge=1, le=65536)
    activation: Literal["relu", "gelu", "silu", "tanh", "identity"] = "relu"
    scale: float = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ValueError("targets: name at least one module, or auto")


@dataclass(frozen=True)
class BottleneckWeights(Weights):
    """The two layers at one module.

    `down` D [r, d_in or d_out], `down_bias` b [r], `up` U [d_out, r], `up_bias` c [d_out]. `reads` what z is: the
    module's output or its input. Raises ValueError for tensors that do not fit each other.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str = "relu"
    scale: float = 1.0
    reads: str = "output"
    alpha: ClassVar[None] = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        size, made = self.up.shape[-1] if self.up.dim() == 2 else 0, self.up.shape[0] if self.up.dim() else 0
        good = self.down.dim() == 2 and self.down.shape[0] == size > 0
        if not good or shapes["down_bias"] != (size,) or shapes["up_bias"] != (made,):
            raise ValueError(
                f"bottleneck tensors of shapes {shapes}; wanted down [r, d], up [d_out, r] and their biases"
            )
        if self.activation not in ACTIVATIONS or self.reads not in ("input", "output"):
            known = f"known: {', '.join(ACTIVATIONS)}; input, output"
            raise ValueError(f"activation {self.activation!r}, reads {self.reads!r} ({known})")

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "down_bias": self.down_bias, "up": self.up, "up_bias": self.up_bias}

    def misfit(self, module: nn.Module, model: nn.Module) -> str | None:
        d_in, d_out = widths(module, model)
        made_for = (self.down.shape[1], self.up.shape[0])
        here = (d_in if self.reads == "input" else d_out, d_out)
        if made_for != here:
            return f"made for {made_for[0]} → {made_for[1]} features, the backbone has {here[0]} → {here[1]}"
        return None

    def _layer(self, base: nn.Module, dropout: float, model: nn.Module) -> BottleneckLayer:
        return BottleneckLayer(base, self, dropout)


def widths(module: nn.Module, model: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear module; of a whole sub-layer, hidden states both. ValueError for other leaves."""
    if kind_of(module) == "linear":
        return in_out_features(module)
    if kind_of(module) is not None or next(module.children(), None) is None:
        raise ValueError(f"a {type(module).__name__} is neither a linear module nor a sub-layer of a block")
    return width_of(model), width_of(model)


class BottleneckLayer(AdapterLayer):
    """A module with a bottleneck after it, or beside it. Only the bottleneck, kept in float32, gets gradients."""

    method = "bottleneck"

    def __init__(self, base: nn.Module, weights: BottleneckWeights, dropout: float = 0.0):
        super().__init__(base, dropout)
        device = device_of(base)
        self.down, self.down_bias = trainable(weights.down, device), trainable(weights.down_bias, device)
        self.up, self.up_bias = trainable(weights.up, device), trainable(weights.up_bias, device)
        self.activation, self.scale, self.reads = weights.activation, weights.scale, weights.reads

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., d_in] → [..., d_out] in the dtype of the base module's output."""
        out = self.base(x, *args, **kwargs)
        seen = self.dropout((x if self.reads == "input" else out).to(self.down.dtype))
        hidden = ACTIVATIONS[self.activation](F.linear(seen, self.down, self.down_bias))
        return (out + self.scale * F.linear(hidden, self.up, self.up_bias)).to(out.dtype)

    def weights(self) -> BottleneckWeights:
        parts = (self.down, self.down_bias, self.up, self.up_bias)
        tensors = [part.detach().cpu().clone() for part in parts]
        return BottleneckWeights(*tensors, activation=self.activation, scale=self.scale, reads=self.reads)

    def extra_repr(self) -> str:
        return f"size={len(self.down)}, activation={self.activation}, scale={self.scale}, reads={self.reads}"


@ADAPTERS.register("bottleneck", BottleneckConfig)
def new_bottleneck(config: BottleneckConfig, model: nn.Module) -> dict[str, Maker]:
    """Bottlenecks that do not change their modules' outputs yet: D random, U and the biases zero."""
    reads = "input" if config.style == "parallel" else "output"

    def make(base: nn.Module, generator: torch.Generator) -> BottleneckLayer:
        d_in, d_out = widths(base, model)
        read = d_in if reads == "input" else d_out
        bound = 1.0 / math.sqrt(read)
        down = torch.empty(config.size, read).uniform_(-bound, bound, generator=generator)
        weights = BottleneckWeights(
            down=down,
            down_bias=torch.zeros(config.size),
            up=torch.zeros(d_out, config.size),
            up_bias=torch.zeros(d_out),
            activation=config.activation,
            scale=config.scale,
            reads=reads,
        )
        return BottleneckLayer(base, weights, config.dropout)

    return {path: partial(make, module) for path, module in _sites(config, model).items()}


def _sites(config: BottleneckConfig, model: nn.Module) -> dict[str, nn.Module]:
    if config.targets != "auto":
        return find_modules(model, config.targets)
    if config.style == "parallel":
        return feed_forwards(model)
    attention, feed_forward = outputs_of_blocks(model)
    wanted = attention | feed_forward if config.style == "houlsby" else feed_forward
    return {path: module for path, module in model.named_modules() if path in wanted}
