"""PiSSA: LoRA that starts at the largest singular values of the weight (Meng et al., 2024, arXiv 2404.02948).

W = U S Vᵀ; B₀ = U_r √S_r / √s, A₀ = √S_r V_rᵀ / √s. What trains is y = (W − s B₀A₀) x + s B A x from B₀, A₀ on. The
backbone stays as it is: the layer adds s (B A − B₀A₀) x, which is a LoRA of rank 2r, and that is what the expert holds.
So it goes with any other expert on the same backbone, and PEFT reads it as plain LoRA.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters.adapter import Maker
from mole.adapters.lora import LoraLayer, LoraWeights, at_targets
from mole.backbones.modules import dense_weight, in_out_features
from mole.registry import ADAPTERS, config_dataclass


@config_dataclass
class PissaConfig:
    """What a new PiSSA adapter looks like. `iterations` null: the exact singular vectors; else a fast estimate."""

    name: Literal["pissa"] = "pissa"
    rank: int = Field(default=8, ge=1, le=2048)
    alpha: float = Field(default=8.0, gt=0)
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | str = "all-linear"
    iterations: int | None = Field(default=None, ge=1, le=100)

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ValueError("targets: name at least one module, or all-linear")


class PissaLayer(LoraLayer):
    """A linear module with LoRA factors, of which those that they started from are taken away again."""

    first_A: Tensor
    first_B: Tensor

    def __init__(self, base: nn.Module, weights: LoraWeights, dropout: float = 0.0):
        super().__init__(base, weights, dropout)
        self.register_buffer("first_A", self.A.detach().clone())
        self.register_buffer("first_B", self.B.detach().clone())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` [..., d_in] → [..., d_out] in the dtype of the base module's output. Dropout acts on both products."""
        out = self.base(x, *args, **kwargs)
        A, B = torch.cat([self.A, self.first_A]), torch.cat([self.B, -self.first_B], dim=1)
        delta = F.linear(F.linear(self.dropout(x.to(A.dtype)), A), B)
        return (out + self.scale * delta).to(out.dtype)

    def weights(self) -> LoraWeights:
        """The difference to the start, of rank 2r and with the same scale."""
        A, B = torch.cat([self.A, self.first_A]), torch.cat([self.B, -self.first_B], dim=1)
        alpha = self.alpha * (math.sqrt(2.0) if self.rslora else 2.0)
        return LoraWeights(A=A.detach().cpu(), B=B.detach().cpu(), alpha=alpha, rslora=self.rslora)


def principal(base: nn.Module, config: PissaConfig, generator: torch.Generator) -> LoraWeights:
    """B₀, A₀ of a linear module. Raises ValueError for a rank above the module's width."""
    d_in, d_out = in_out_features(base)
    if config.rank > min(d_in, d_out):
        raise ValueError(f"adapter.rank={config.rank} for a weight of {d_in} → {d_out}: at most {min(d_in, d_out)}")
    weight = dense_weight(base)
    if config.iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, Vh = _estimate(weight, config.rank, config.iterations, generator)
    made = LoraWeights(A=Vh[: config.rank], B=U[:, : config.rank], alpha=config.alpha, rslora=config.rslora)
    size = (S[: config.rank] / made.scale).sqrt()
    return replace(made, A=size[:, None] * made.A, B=made.B * size)


def _estimate(weight: Tensor, rank: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of the range that `iterations` of power iteration find (Halko et al., 2011, arXiv 0909.4061)."""
    width = min(rank + 8, *weight.shape)
    seen = torch.randn(weight.shape[1], width, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ seen).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    U, S, Vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ U, S, Vh


@ADAPTERS.register("pissa", PissaConfig)
def new_pissa(config: PissaConfig, model: nn.Module) -> dict[str, Maker]:
    """PiSSA layers, which do not change their modules' outputs yet."""
    return at_targets(config, model, lambda base, generator: PissaLayer(base, principal(base, config, generator)))
