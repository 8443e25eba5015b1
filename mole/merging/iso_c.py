"""Iso-C: the summed update with one singular value for all directions (Marczak et al., 2025, arXiv 2502.04959).

Σ_e ΔW_e = U S Vᵀ becomes λ mean(S) U Vᵀ, over the singular values that are not zero: in a sum of low rank the others
belong to arbitrary directions.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from mole.merging.base import Merge, concatenated
from mole.merging.deltas import Layer
from mole.merging.products import LowRank, Product
from mole.registry import MERGES, config_dataclass


@config_dataclass
class IsoCConfig:
    """`scale` is λ; a singular value counts as zero below `tolerance` times the largest."""

    name: Literal["iso_c"] = "iso_c"
    scale: float = 1.0
    tolerance: float = Field(default=1e-6, gt=0, lt=1)


@MERGES.register("iso_c", IsoCConfig)
class IsoC(Merge):
    """λ mean(S) U Vᵀ."""

    def merge(self, layer: Layer) -> Product:
        U, sigma, V = concatenated(layer, dict.fromkeys(layer.deltas, 1.0)).singular()
        count = int((sigma > self.config.tolerance * sigma[:1]).sum())
        level = self.config.scale * sigma[:count].mean() if count else torch.zeros_like(sigma[:1])
        return LowRank(level * U[:, :count], V[:, :count].T)
