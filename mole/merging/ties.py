"""TIES: trim, elect a sign, average what agrees (Yadav et al., 2023, arXiv 2306.01708).

Of each expert the largest entries stay; each entry's sign is that of the weighted sum; the merged entry is the mean of
the experts with that sign. What comes out has full rank, unless the space is a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from mole.merging.base import Space, Walk, Weighted, checked_weights
from mole.merging.deltas import Layer
from mole.merging.elementwise import Elementwise, elected_mean, trimmed
from mole.merging.largest import Cut, cut_of
from mole.merging.spaces import Grid, opened
from mole.registry import MERGES, config_dataclass


@config_dataclass
class Trimming(Weighted):
    """Weights 1 unless given. `density` of each expert's entries stay, per layer or over all layers of the expert."""

    density: float = Field(default=0.2, gt=0, le=1)
    threshold: Literal["layer", "expert"] = "layer"
    sign: Literal["total", "frequency"] = "total"
    scale: float = 1.0


@config_dataclass
class TiesConfig(Trimming):
    """`scale` is λ, `space` the numbers that are trimmed and elected."""

    name: Literal["ties"] = "ties"
    space: Space = "delta"


@MERGES.register("ties", TiesConfig)
class Ties(Elementwise):
    """λ times the mean of w_e τ_e over the experts that have the elected sign."""

    def __init__(self, config: Trimming, names: Sequence[str]):
        super().__init__(config, names)
        self.weights = checked_weights(config.weights, self.names, 1.0)
        self.space, self.scale = getattr(config, "space", "knots"), config.scale
        self._cuts: dict[tuple[str, str], Cut] = {}  # (expert, which grid) → the cut over all its layers
        self._first: dict[tuple[str, str], int] = {}  # (expert, grid) → the number of its first entry in that cut
        self._disputed: dict[str, float] = {}

    def survey(self, walk: Walk) -> None:
        if self.config.threshold == "layer" or self.config.density == 1:
            return
        sizes: dict[tuple[str, str], int] = {}
        for layer in walk():
            for part, grid in _parts(self.space, layer):
                for name in grid.entries:
                    self._first[name, grid.key] = sizes.get((name, part), 0)
                    sizes[name, part] = self._first[name, grid.key] + grid.shape[0] * grid.shape[1]
        for (name, part), size in sizes.items():

            def blocks(name: str = name, part: str = part) -> Iterator[Tensor]:
                for layer in walk():
                    for found, grid in _parts(self.space, layer):
                        if found == part and name in grid.entries:
                            yield from _blocks(grid, name)

            self._cuts[name, part] = cut_of(blocks, _count(self.config.density, size))

    def merge_grid(self, grid: Grid, layer: Layer) -> Tensor:
        if self.config.density < 1:
            grid = self._trimmed(grid, layer)
        merged, self._disputed[grid.key] = elected_mean(grid, self.weights, self.config.sign)
        return merged

    def _trimmed(self, grid: Grid, layer: Layer) -> Grid:
        part = grid.key.removeprefix(layer.key)
        if self.config.threshold == "expert":
            cuts = {name: self._cuts[name, part] for name in grid.entries}
            return trimmed(grid, cuts, {name: self._first[name, grid.key] for name in grid.entries})
        count = _count(self.config.density, grid.shape[0] * grid.shape[1])
        return trimmed(grid, {n: cut_of(lambda n=n: _blocks(grid, n), count) for n in grid.entries})

    def facts(self, layer: Layer) -> dict[str, float]:
        shares = [share for key, share in self._disputed.items() if key.startswith(layer.key)]
        self._disputed = {}
        return {"disputed": max(shares)} if shares else {}


def _parts(space: str, layer: Layer) -> Iterator[tuple[str, Grid]]:
    """The grids of a layer, each under what distinguishes it from its layer's others: "", or ".A" and ".B"."""
    return ((grid.key.removeprefix(layer.key), grid) for grid in opened(space, layer).grids)


def _blocks(grid: Grid, name: str) -> Iterator[Tensor]:
    return (grid.entries[name](start, stop) for start, stop in grid.blocks())


def _count(density: float, size: int) -> int:
    """How many of `size` entries are `density` of them, rounded down; a product such as 0.29 · 100 is 29."""
    return int(density * size + 1e-6)
