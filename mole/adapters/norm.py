"""Norms that an adapter trains along: weight and bias of a LayerNorm or RMSNorm that are the adapter's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mole.adapters.adapter import AdapterLayer, Weights, trainable
from mole.backbones.modules import device_of
from mole.backbones.sites import is_norm


@dataclass(frozen=True)
class NormWeights(Weights):
    """`weight` [d], and `bias` [d] of a norm that has one."""

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if self.weight.dim() != 1 or len(set(shapes.values())) > 1:
            raise ValueError(f"tensors of a norm of shapes {shapes}; wanted weight [d], and bias [d] if it has one")

    @classmethod
    def of(cls, norm: Any) -> NormWeights:
        """Those of the norm itself, copied."""
        bias = getattr(norm, "bias", None)
        return cls(norm.weight.detach().clone(), None if bias is None else bias.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def misfit(self, module: Any, model: nn.Module) -> str | None:
        if not is_norm(module):
            return f"made for a norm, which a {type(module).__name__} is not"
        here = {name: tuple(tensor.shape) for name, tensor in NormWeights.of(module).tensors().items()}
        mine = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        return None if here == mine else f"a norm of {mine}, the backbone has {here}"

    def _layer(self, base: nn.Module, dropout: float, model: nn.Module) -> NormLayer:
        return NormLayer(base, self)


def normed(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the norm `base` makes of `x` with another weight and bias, in the dtype of its own."""
    weight = weight.to(base.weight.dtype)
    bias = None if bias is None else bias.to(base.weight.dtype)
    if type(base) is nn.LayerNorm:
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
    parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return functional_call(base, parts, (x,))


class NormLayer(AdapterLayer):
    """A norm with a weight and a bias of its own, kept in float32."""

    method = "bottleneck"

    def __init__(self, base: nn.Module, weights: NormWeights):
        super().__init__(base)
        self.own_weight = trainable(weights.weight, device_of(base))
        self.own_bias = None if weights.bias is None else trainable(weights.bias, device_of(base))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., d] → the same shape."""
        return normed(self.base, x, self.own_weight, self.own_bias)

    def weights(self) -> NormWeights:
        bias = None if self.own_bias is None else self.own_bias.detach().cpu().clone()
        return NormWeights(self.own_weight.detach().cpu().clone(), bias)
