"""Spaces: which numbers of the experts lie over each other when they are merged entry by entry.

delta    the entries of ΔW_e, made in blocks of rows
core     of M_e = Uᵀ ΔW_e V, with U and V orthonormal bases of all the experts' columns and rows: at most R × R numbers,
         lossless, ranks may differ (Panariello et al., 2025, arXiv 2509.17786). U and V are singular vectors of the
         updates side by side and one upon the other: other bases would change with the order of experts, or with the
         rotation of their factors
knots    of Σ V_eᵀ in [ΔW_1 … ΔW_E] = U Σ [V_1ᵀ … V_Eᵀ] (KnOTS: Stoica et al., 2024, arXiv 2410.19735), from products of
         the factors alone
factors  of s_e B_e and of A_e apart. They change with the rotation of an expert's factors, which leaves the expert as
         it is: for comparison with other programs only
split_factors  of B_e and A_e apart, a weight w_e becomes √|w_e s_e| on each and its sign falls to A: PEFT's way
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mole.merging.deltas import Layer
from mole.merging.products import Dense, LowRank, Product

BLOCK = 1 << 22  # entries of all experts together that are held at a time
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Grid:
    """Entries of several experts that lie over each other, [rows, columns] each.

    `entries` name → the rows from i to j. `weight` is what an expert's weight becomes here.
    """

    key: str
    shape: tuple[int, int]
    entries: Mapping[str, Rows]
    weight: Callable[[str, float], float] = lambda name, weight: weight

    def blocks(self, block: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of rows in which all experts together have about `block` entries."""
        rows, columns = self.shape
        step = max(1, (block or BLOCK) // max(1, columns * len(self.entries)))
        yield from ((start, min(start + step, rows)) for start in range(0, max(1, rows), step))


@dataclass(frozen=True)
class Opened:
    """The grids of one layer in a space; `close` makes the merged grids the layer's update."""

    grids: tuple[Grid, ...]
    close: Callable[[Sequence[Tensor]], Product]


def opened(space: str, layer: Layer) -> Opened:
    """The layer in a space; a matrix of one column always by its entries.

    Raises ValueError for factors of unlike ranks in the spaces that need equal ones.
    """
    space = "delta" if layer.part else space
    return {"delta": _delta, "core": _core, "knots": _knots, "factors": _factors, "split_factors": _split}[space](layer)


def weighted_sum(grid: Grid, weights: Mapping[str, float]) -> Tensor:
    """Σ w_e τ_e, [rows, columns]."""
    made = []
    for start, stop in grid.blocks():
        parts = [grid.weight(name, weights[name]) * rows(start, stop) for name, rows in grid.entries.items()]
        made.append(torch.stack(parts).sum(0))
    return torch.cat(made)


@dataclass(frozen=True)
class Core:
    """ΔW_e = U M_e Vᵀ: `U` [d_out, k], `V` [d_in, l] orthonormal, `M` name → [k, l]."""

    U: Tensor
    V: Tensor
    M: dict[str, Tensor]

    def product(self, merged: Tensor) -> LowRank:
        """U `merged` Vᵀ as factors, the smaller side of `merged` as their rank."""
        if merged.shape[0] <= merged.shape[1]:
            return LowRank(self.U, merged @ self.V.T)
        return LowRank(self.U @ merged, self.V.T)


def core_of(layer: Layer) -> Core:
    """The layer in bases of all that its experts read and write."""
    parts = layer.folded()
    U, _ = _stacked_left(parts)
    V, _ = _stacked_left({name: LowRank(part.A.T, part.B.T) for name, part in parts.items()})
    return Core(U, V, {name: (U.T @ part.B) @ (part.A @ V) for name, part in parts.items()})


def _stacked_left(parts: Mapping[str, LowRank]) -> tuple[Tensor, dict[str, Tensor]]:
    """U [d_out, k] of the SVD of all ΔW_e side by side, and C_e with ΔW_e = U C_e A_e, by name.

    Singular values that are zero within rounding have arbitrary vectors, and are left out.
    """
    Q, R = torch.linalg.qr(torch.cat([part.B for part in parts.values()], dim=1))
    columns = dict(zip(parts, R.split([part.rank for part in parts.values()], dim=1), strict=True))
    # ΔW_e = Q R_e A_e, and A_eᵀ = Q_e T_e: side by side that is Q [R_1 T_1ᵀ … ] times orthonormal rows.
    inner = [columns[name] @ torch.linalg.qr(part.A.T, mode="r").R.T for name, part in parts.items()]
    stacked = torch.cat(inner, dim=1)
    U, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    tiny = sigma[:1] * max(stacked.shape) * torch.finfo(sigma.dtype).eps
    kept = U[:, sigma > tiny]
    return Q @ kept, {name: kept.T @ part for name, part in columns.items()}


def _delta(layer: Layer) -> Opened:
    entries = {name: _product_rows(part.B, part.A) for name, part in layer.folded().items()}
    return Opened((Grid(layer.key, layer.shape, entries),), lambda merged: Dense(merged[0]))


def _core(layer: Layer) -> Opened:
    core = core_of(layer)
    shape = core.U.shape[1], core.V.shape[1]
    grid = Grid(layer.key, shape, {name: _rows_of(matrix) for name, matrix in core.M.items()})
    return Opened((grid,), lambda merged: core.product(merged[0]))


def _knots(layer: Layer) -> Opened:
    parts = layer.folded()
    U, left = _stacked_left(parts)
    entries = {name: _product_rows(left[name], part.A) for name, part in parts.items()}
    return Opened((Grid(layer.key, (U.shape[1], layer.shape[1]), entries),), lambda merged: LowRank(U, merged[0]))


def _factors(layer: Layer) -> Opened:
    parts = layer.folded()
    return _apart(layer, {n: p.B for n, p in parts.items()}, {n: p.A for n, p in parts.items()})


def _split(layer: Layer) -> Opened:
    def root(name: str, weight: float) -> float:
        return math.sqrt(abs(weight * layer.deltas[name].scale))

    def signed(name: str, weight: float) -> float:
        return math.copysign(root(name, weight), weight * layer.deltas[name].scale)

    deltas = layer.deltas
    return _apart(layer, {n: d.B for n, d in deltas.items()}, {n: d.A for n, d in deltas.items()}, root, signed)


def _apart(
    layer: Layer,
    B: Mapping[str, Tensor],
    A: Mapping[str, Tensor],
    weight_B: Callable[[str, float], float] = lambda name, weight: weight,
    weight_A: Callable[[str, float], float] = lambda name, weight: weight,
) -> Opened:
    ranks = {name: delta.rank for name, delta in layer.deltas.items()}
    if len(set(ranks.values())) > 1:
        told = ", ".join(f"{name}: {rank}" for name, rank in ranks.items())
        raise ValueError(f"{layer.path}: factors of unlike ranks lie over nothing ({told}); use space=delta")
    (d_out, d_in), rank = layer.shape, next(iter(ranks.values()))
    grids = (
        Grid(f"{layer.key}.B", (d_out, rank), {name: _rows_of(factor) for name, factor in B.items()}, weight_B),
        Grid(f"{layer.key}.A", (rank, d_in), {name: _rows_of(factor) for name, factor in A.items()}, weight_A),
    )
    return Opened(grids, lambda merged: LowRank(*merged))


def _rows_of(matrix: Tensor) -> Rows:
    return lambda start, stop: matrix[start:stop]


def _product_rows(left: Tensor, right: Tensor) -> Rows:
    return lambda start, stop: left[start:stop] @ right
