"""Methods that work on entries: in any space, block by block; and the election of signs that TIES is named for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mole.merging.base import Merge
from mole.merging.deltas import Layer
from mole.merging.largest import Cut
from mole.merging.products import Dense, LowRank, Product
from mole.merging.spaces import Grid, Rows, opened


class Elementwise(Merge):
    """Base of the methods that merge entry by entry in the space `space`; `scale` multiplies what comes out."""

    vectors = True
    space: str
    scale: float = 1.0

    def merge_grid(self, grid: Grid, layer: Layer) -> Tensor:
        """The merged entries, [rows, columns]."""
        raise NotImplementedError

    def merge(self, layer: Layer) -> Product:
        space = opened(self.space, layer)
        return scaled(space.close([self.merge_grid(grid, layer) for grid in space.grids]), self.scale)


def scaled(product: Product, scale: float) -> Product:
    """The update times a number."""
    if isinstance(product, Dense):
        return Dense(scale * product.matrix)
    return LowRank(scale * product.B, product.A)


def trimmed(grid: Grid, cuts: Mapping[str, Cut], first: Mapping[str, int] | None = None) -> Grid:
    """The grid with zeros in the place of what an expert's cut does not keep.

    `first` is the number of each expert's first entry here in the order that its cut counts in; by default 0.
    """
    columns = grid.shape[1]

    def rows_of(name: str, rows: Rows) -> Rows:
        def kept(start: int, stop: int) -> Tensor:
            values = rows(start, stop)
            return values * cuts[name].keeps(values, (first or {}).get(name, 0) + start * columns)

        return kept

    return replace(grid, entries={name: rows_of(name, rows) for name, rows in grid.entries.items()})


def elected_mean(grid: Grid, weights: Mapping[str, float], sign: str) -> tuple[Tensor, float]:
    """The mean of w_e τ_e over the experts whose sign is the elected one, and the share of entries in dispute.

    γ = sign Σ w_e τ_e, or of the number of signs (`sign` total, frequency). Zeros never count. Where the sum is zero
    the sign is what most of the grid has; where that is a tie as well, nothing is elected and the mean is 0.
    """
    given = [grid.weight(name, weights[name]) for name in grid.entries]
    merged, disputed, majority, is_open = _elect(grid, given, sign, 0.0)
    if is_open and majority:
        merged, *_ = _elect(grid, given, sign, majority)
    return merged, disputed / max(1, merged.numel())


def _elect(grid: Grid, weights: list[float], sign: str, fallback: float) -> tuple[Tensor, int, float, bool]:
    """Merged entries, how many are in dispute, the sign that most have, and whether `fallback` decided any."""
    made, disputed, balance, is_open = [], 0, 0.0, False
    for start, stop in grid.blocks():
        parts = [weight * rows(start, stop) for weight, rows in zip(weights, grid.entries.values(), strict=True)]
        values = torch.stack(parts)
        signs = values.sign()
        elected = (values if sign == "total" else signs).sum(0).sign()
        balance += float(elected.sum())
        undecided = (elected == 0) & (signs != 0).any(0)
        is_open = is_open or bool(undecided.any())
        elected = torch.where(undecided, fallback, elected)
        agrees = (signs == elected) & (signs != 0)
        made.append((values * agrees).sum(0) / agrees.sum(0).clamp_min(1))
        disputed += int(((signs > 0).any(0) & (signs < 0).any(0)).sum())
    return torch.cat(made), disputed, float((balance > 0) - (balance < 0)), is_open
