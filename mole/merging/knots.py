"""KnOTS: TIES on the experts' coordinates in one common basis (Stoica et al., 2024, arXiv 2410.19735).

[ΔW_1 … ΔW_E] = U Σ [V_1ᵀ … V_Eᵀ]; the Σ V_eᵀ are merged entry by entry and multiplied by U. The rank is at most Σ r_e.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mole.merging.base import Walk, checked_weights, settings_without_effect
from mole.merging.deltas import Layer
from mole.merging.spaces import Grid, weighted_sum
from mole.merging.ties import Ties, Trimming
from mole.registry import MERGES, config_dataclass


@config_dataclass
class KnotsConfig(Trimming):
    """As TIES; `then` linear adds up instead, with weights 1/E unless given."""

    name: Literal["knots"] = "knots"
    then: Literal["ties", "linear"] = "ties"

    def __post_init__(self):
        if self.then == "linear":
            settings_without_effect(self, ("density", "threshold", "sign"), "then=linear")


@MERGES.register("knots", KnotsConfig)
class Knots(Ties):
    """U times the merged Σ V_eᵀ."""

    vectors = False

    def __init__(self, config: KnotsConfig, names: Sequence[str]):
        super().__init__(config, names)
        if config.then == "linear":
            self.weights = checked_weights(config.weights, self.names, 1.0 / len(self.names))

    def survey(self, walk: Walk) -> None:
        if self.config.then == "ties":
            super().survey(walk)

    def merge_grid(self, grid: Grid, layer: Layer) -> Tensor:
        return weighted_sum(grid, self.weights) if self.config.then == "linear" else super().merge_grid(grid, layer)
