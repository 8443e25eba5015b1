"""DARE: drop entries at random and rescale the rest, then merge (Yu et al., 2023, arXiv 2311.03099).

Each entry is kept with probability `density` and divided by it, so that its mean over seeds is itself. Whether an entry
is kept follows from seed, expert, module and place alone: not from the order of experts, not from blocks, not from
the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mole.merging.base import Space, Weighted, checked_weights, settings_without_effect
from mole.merging.deltas import Layer
from mole.merging.elementwise import Elementwise, elected_mean
from mole.merging.spaces import Grid, Rows, weighted_sum
from mole.registry import MERGES, config_dataclass


@config_dataclass
class DareConfig(Weighted):
    """Weights as of what comes then, unless given: 1/E for linear, 1 for ties (without trimming)."""

    name: Literal["dare"] = "dare"
    density: float = Field(default=0.2, gt=0, le=1)
    seed: int = 0
    then: Literal["linear", "ties"] = "linear"
    sign: Literal["total", "frequency"] = "total"
    scale: float = 1.0
    space: Space = "delta"

    def __post_init__(self):
        if self.then == "linear":
            settings_without_effect(self, ("sign",), "then=linear")


@MERGES.register("dare", DareConfig)
class Dare(Elementwise):
    """λ times the sum, or the elected mean, of what is left of the experts."""

    def __init__(self, config: DareConfig, names: Sequence[str]):
        super().__init__(config, names)
        default = 1.0 / len(self.names) if config.then == "linear" else 1.0
        self.weights = checked_weights(config.weights, self.names, default)
        self.space, self.scale = config.space, config.scale

    def merge_grid(self, grid: Grid, layer: Layer) -> Tensor:
        left = thinned(grid, self.config.density, self.config.seed)
        if self.config.then == "linear":
            return weighted_sum(left, self.weights)
        return elected_mean(left, self.weights, self.config.sign)[0]


def thinned(grid: Grid, density: float, seed: int) -> Grid:
    """The grid with each entry kept with probability `density` and divided by it, or zero."""
    columns = grid.shape[1]

    def rows_of(name: str, rows: Rows) -> Rows:
        digest = hashlib.sha256(f"{seed}\n{name}\n{grid.key}".encode()).digest()
        start_of = int.from_bytes(digest[:8], "little", signed=True)

        def left(start: int, stop: int) -> Tensor:
            values = rows(start, stop)
            places = torch.arange(start * columns, stop * columns, device=values.device).view_as(values)
            return torch.where(uniform(start_of, places) < density, values / density, 0.0)

        return left

    return replace(grid, entries={name: rows_of(name, rows) for name, rows in grid.entries.items()})


def uniform(start: int, places: Tensor) -> Tensor:
    """Numbers in [0, 1) by splitmix64, a generator whose n-th number needs none before it (Steele et al., 2014)."""
    state = (places + 1) * _signed(0x9E3779B97F4A7C15) + start
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(state ^ _shifted(state, 31), 11).double() * 2.0**-53


def _signed(constant: int) -> int:
    """64 bits as torch's int64 has them: products wrap around."""
    return constant - (1 << 64)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros, which torch's own does not."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
