"""The merged update of one module, as a product of factors or as a whole matrix, and its fit to a rank.

The best fit of rank r' in the Frobenius norm keeps the r' largest singular values; what it loses is
√(Σ_{i>r'} σ_i²), and σ_{r'+1} bounds how far any output can move (Eckart and Young, 1936).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ENERGY = re.compile(r"energy:(0?\.[0-9]+|1(?:\.0*)?)", re.ASCII)
RANKS = ("auto", "exact", "sum", "max", "full", "energy:<share>")


@dataclass(frozen=True)
class LowRank:
    """ΔW = B A with B [d_out, r], A [r, d_in]; r may be 0."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    def norm(self) -> float:
        """‖ΔW‖_F, without making ΔW."""
        return float(((self.B.T @ self.B) * (self.A @ self.A.T)).sum().clamp_min(0).sqrt())

    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [d_out, k], σ [k] descending, V [d_in, k], with k at most the rank and both widths."""
        Q_B, R_B = torch.linalg.qr(self.B)
        Q_A, R_A = torch.linalg.qr(self.A.T)
        U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        return Q_B @ U, sigma, Q_A @ Vh.T


@dataclass(frozen=True)
class Dense:
    """ΔW itself, [d_out, d_in]."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(torch.linalg.vector_norm(self.matrix))

    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [d_out, k], σ [k] descending, V [d_in, k], with k the smaller width."""
        U, sigma, Vh = torch.linalg.svd(self.matrix, full_matrices=False)
        return U, sigma, Vh.T


Product = LowRank | Dense


@dataclass(frozen=True)
class Fitted:
    """What became of a product: its factors, ‖ΔW‖_F before, ‖ΔW − ΔW'‖_F / ‖ΔW‖_F, and the first σ left out."""

    product: LowRank
    norm: float
    error: float = 0.0
    next_sigma: float = 0.0


def check_rank(rank: int | str) -> None:
    """Raises ValueError for what `fit` does not take as a rank."""
    good = rank >= 1 if isinstance(rank, int) else rank in RANKS or _ENERGY.fullmatch(rank) is not None
    if not good or rank == RANKS[-1]:
        raise ValueError(f"rank={rank}: wanted a whole number from 1, {', '.join(RANKS[:-1])}, or such as energy:0.99")


def fit(product: Product, rank: int | str, ranks: Sequence[int]) -> Fitted:
    """The product with factors of a rank.

    exact  all of it: factors as they are, or as many singular values as there are numerically
    sum, max  the ranks of the experts here (`ranks`) added up, or the largest of them
    auto   exact for a product of factors, sum for a whole matrix
    full   the matrix as one factor, the identity as the other: not a digit is lost
    energy:<share>  the fewest singular values whose squares make that share of all
    <int>  at most so many
    """
    check_rank(rank)
    if rank == "auto":
        rank = "exact" if isinstance(product, LowRank) else "sum"
    norm = product.norm()
    if norm == 0:
        return Fitted(_nothing(product), 0.0)
    if rank == "full":
        return Fitted(_whole(product), norm)
    wanted = {"sum": sum(ranks), "max": max(ranks)}.get(rank, rank) if isinstance(rank, str) else rank
    most = {"exact": min(product.shape)}.get(wanted, 0) if isinstance(wanted, str) else wanted
    if isinstance(product, LowRank) and product.rank <= most:
        return Fitted(product, norm)
    U, sigma, V = product.singular()
    kept = _kept(sigma, wanted, product.shape)
    root = sigma[:kept].sqrt()
    lost = float(torch.linalg.vector_norm(sigma[kept:]))
    error = 0.0 if wanted == "exact" else lost / float(torch.linalg.vector_norm(sigma))
    following = float(sigma[kept]) if kept < len(sigma) and wanted != "exact" else 0.0
    return Fitted(LowRank(U[:, :kept] * root, root[:, None] * V[:, :kept].T), norm, error, following)


def _kept(sigma: Tensor, wanted: int | str, shape: tuple[int, int]) -> int:
    """How many singular values stay: at least one, and none that is zero within rounding."""
    real = max(1, int((sigma > sigma[0] * max(shape) * torch.finfo(sigma.dtype).eps).sum()))
    if isinstance(wanted, int):
        return min(wanted, real)
    if wanted == "exact":
        return real
    share = float(wanted.removeprefix("energy:"))
    held = sigma.square().cumsum(0)
    return min(real, 1 + int((held < share * held[-1]).sum()))


def _nothing(product: Product) -> LowRank:
    """The zero update, of rank 1: an adapter holds no factors of rank 0."""
    d_out, d_in = product.shape
    like = product.B if isinstance(product, LowRank) else product.matrix
    return LowRank(like.new_zeros(d_out, 1), like.new_zeros(1, d_in))


def _whole(product: Product) -> LowRank:
    matrix = product.B @ product.A if isinstance(product, LowRank) else product.matrix
    d_out, d_in = matrix.shape
    eye = torch.eye(min(d_out, d_in), dtype=matrix.dtype, device=matrix.device)
    return LowRank(matrix, eye) if d_in <= d_out else LowRank(eye, matrix)
