"""DoRA: the length of each row of the weight and its direction, trained apart (Liu et al., 2024, arXiv 2402.09353).

    ν = m / ‖W + s B A‖ (row by row);   y = W x + b + (ν − 1) ∘ W x + ν ∘ s B A x

m [d_out] is trained with A and B; it starts at the row lengths of W. The norm is no part of the gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters.adapter import Maker, trainable
from mole.adapters.lora import LoraLayer, LoraWeights, at_targets, first
from mole.backbones.modules import dense_weight
from mole.registry import ADAPTERS, config_dataclass


@config_dataclass
class DoraConfig:
    """What a new DoRA adapter looks like."""

    name: Literal["dora"] = "dora"
    rank: int = Field(default=8, ge=1, le=4096)
    alpha: float = Field(default=16.0, gt=0)
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | str = "all-linear"
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ValueError("targets: name at least one module, or all-linear")


class DoraLayer(LoraLayer):
    """A linear module with LoRA factors and a magnitude. Dropout acts on the input of A alone."""

    def __init__(self, base: nn.Module, weights: LoraWeights, dropout: float = 0.0):
        super().__init__(base, weights, dropout)
        assert weights.magnitude is not None
        self.magnitude = trainable(weights.magnitude.flatten(), self.A.device)
        self._norm: tuple[Any, Tensor] | None = None

    def row_lengths(self) -> Tensor:
        """‖W + s B A‖ of each row, [d_out]; kept as long as A and B are the same."""
        state = (self.A._version, self.B._version, self.A.device, self.A.dtype, self.A.data_ptr(), self.B.data_ptr())
        if self._norm is None or self._norm[0] != state:
            with torch.no_grad():
                weight = dense_weight(self.base).to(self.A.device)
                A, B = self.A.to(weight.dtype), self.B.to(weight.dtype)
                moved = torch.addmm(weight, B, A, alpha=self.scale)
                self._norm = (state, torch.linalg.vector_norm(moved, dim=1).to(self.A.dtype))
        return self._norm[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., d_in] → [..., d_out] in the dtype of the base module's output."""
        out = self.base(x, *args, **kwargs)
        bias = getattr(self.base, "bias", None)
        rows = out if bias is None else out - bias
        delta = F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A), self.B)
        ratio = self.magnitude / self.row_lengths()
        return (out + (ratio - 1) * rows + ratio * self.scale * delta).to(out.dtype)

    def weights(self) -> LoraWeights:
        return replace(super().weights(), magnitude=self.magnitude.detach().cpu().clone())


@ADAPTERS.register("dora", DoraConfig)
def new_dora(config: DoraConfig, model: nn.Module) -> dict[str, Maker]:
    """DoRA layers that do not change their modules' outputs yet: B zero, m the row lengths of W."""

    def new(base: nn.Module, generator: torch.Generator) -> DoraLayer:
        weights = first(config, base, generator)
        return DoraLayer(base, replace(weights, magnitude=torch.linalg.vector_norm(dense_weight(base), dim=1)))

    return at_targets(config, model, new)
