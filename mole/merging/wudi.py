"""WUDI: the update that disturbs no expert on what that expert reads (Cheng et al., 2025, arXiv 2503.08099).

min_τ Σ_e ‖(τ − τ_e) τ_eᵀ‖² / ‖τ_e‖² with τ as [out, in]: the rows of τ_e stand for the inputs of its task. It is
quadratic: τ* = T K⁺ with K = [τ_eᵀ/‖τ_e‖] and T = [τ_e τ_eᵀ/‖τ_e‖] side by side, which is where gradient descent from
Σ τ_e ends. Solved in the experts' common bases.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mole.merging.base import Merge, settings_without_effect
from mole.merging.deltas import Layer
from mole.merging.products import Product
from mole.merging.spaces import core_of
from mole.registry import MERGES, config_dataclass


@config_dataclass
class WudiConfig:
    """`closed` solves it; `adam` takes `iters` steps of size `lr` in the experts' common bases."""

    name: Literal["wudi"] = "wudi"
    solver: Literal["closed", "adam"] = "closed"
    ridge: float = Field(default=0.0, ge=0)
    iters: int = Field(default=300, ge=1)
    lr: float = Field(default=1e-5, gt=0)

    def __post_init__(self):
        if self.solver == "closed":
            settings_without_effect(self, ("iters", "lr"), "solver=closed")
        elif self.ridge:
            raise ValueError("ridge: cannot act with solver=adam: set it to 0, or solver=closed")


@MERGES.register("wudi", WudiConfig)
class Wudi(Merge):
    """τ*, of rank at most Σ r_e."""

    def merge(self, layer: Layer) -> Product:
        core = core_of(layer)
        norms = {name: float(torch.linalg.vector_norm(matrix)) for name, matrix in core.M.items()}
        parts = [matrix / norms[name] for name, matrix in core.M.items() if norms[name] > 0]
        sizes = [norm for norm in norms.values() if norm > 0]
        if not parts:
            return core.product(torch.zeros(core.U.shape[1], core.V.shape[1], dtype=core.U.dtype))
        if self.config.solver == "adam":
            start = torch.stack(list(core.M.values())).sum(0)
            return core.product(_descended(start, parts, sizes, self.config.iters, self.config.lr))
        reads = torch.cat([part.T for part in parts], dim=1)
        gives = torch.cat([size * part @ part.T for size, part in zip(sizes, parts, strict=True)], dim=1)
        if self.config.ridge:
            eye = self.config.ridge**0.5 * torch.eye(len(reads), dtype=reads.dtype, device=reads.device)
            reads, gives = torch.cat([reads, eye], 1), torch.cat([gives, gives.new_zeros(len(gives), len(eye))], 1)
        return core.product(gives @ torch.linalg.pinv(reads))


def _descended(start: Tensor, parts: list[Tensor], sizes: list[float], steps: int, lr: float) -> Tensor:
    """Where Adam stands after so many steps; `parts` are τ_e / ‖τ_e‖."""
    merged = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [((merged - size * part) @ part.T).square().sum() for size, part in zip(sizes, parts, strict=True)]
        torch.stack(losses).sum().backward()
        optimizer.step()
    return merged.detach()
