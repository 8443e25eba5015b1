"""TSV: the experts' singular vectors, made orthogonal to each other (Gargiulo et al., 2024, arXiv 2412.00081).

Of each expert its largest singular triplets; U = [U_1 … U_E] and V likewise are replaced by the nearest matrices with
orthonormal columns, P Qᵀ of the SVD P D Qᵀ; the merged update is λ U⊥ Σ V⊥ᵀ. Solved in the experts' common bases.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mole.merging.base import Merge
from mole.merging.deltas import Layer
from mole.merging.products import LowRank, Product
from mole.merging.spaces import core_of
from mole.registry import MERGES, config_dataclass


@config_dataclass
class TsvConfig:
    """`keep` auto: every triplet if they all find room side by side, else each expert its share of the room."""

    name: Literal["tsv"] = "tsv"
    keep: Literal["auto"] | int = "auto"
    scale: float = Field(default=1.0)

    def __post_init__(self):
        if self.keep != "auto" and self.keep < 1:
            raise ValueError(f"keep={self.keep}: at least 1 singular triplet of each expert, or auto")


@MERGES.register("tsv", TsvConfig)
class Tsv(Merge):
    """λ U⊥ Σ V⊥ᵀ."""

    def merge(self, layer: Layer) -> Product:
        core = core_of(layer)
        room = min(layer.shape)
        keep = self.config.keep
        if keep == "auto":
            keep = room if sum(layer.ranks) <= room else max(1, room // len(layer.deltas))
        triplets = [_triplets(matrix, keep) for matrix in core.M.values()]
        U, sigma, V = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
        return LowRank(core.U @ (orthonormal(U) * (self.config.scale * sigma)), (core.V @ orthonormal(V)).T)


def _triplets(matrix: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, V of the `keep` largest singular values; vectors of σ = 0 are arbitrary, and are left out."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    count = min(keep, int((sigma > _tiny(sigma, matrix)).sum()))
    return U[:, :count], sigma[:count], Vh[:count].T


def orthonormal(columns: Tensor) -> Tensor:
    """P Qᵀ over the singular values that are not zero: the nearest matrix with orthonormal columns, if they are
    independent."""
    P, sigma, Qh = torch.linalg.svd(columns, full_matrices=False)
    real = sigma > _tiny(sigma, columns)
    return P[:, real] @ Qh[real]


def _tiny(sigma: Tensor, matrix: Tensor) -> Tensor:
    return sigma[:1] * max(matrix.shape) * torch.finfo(sigma.dtype).eps
