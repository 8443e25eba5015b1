"""Linear: the weighted mean of the experts' updates, ΔW = Σ w_e ΔW_e, exact by concatenation of factors.

`space` says what is added up:
delta          the updates (the default; the only one that does not depend on how an expert's factors are rotated)
factors        (Σ w_e s_e B_e)(Σ w_e A_e), quadratic in the weights: LoraHub (Huang et al., 2023, arXiv 2307.13269)
split_factors  (Σ √|w_e s_e| B_e)(Σ ±√|w_e s_e| A_e), as PEFT's `linear`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mole.merging.base import Coefficients, Weighted, checked_weights
from mole.merging.deltas import Layer
from mole.merging.products import Product
from mole.merging.spaces import opened, weighted_sum
from mole.registry import MERGES, config_dataclass


@config_dataclass
class LinearConfig(Weighted):
    """Weights 1/E unless given. A module that an expert does not adapt counts as ΔW = 0, or not at all."""

    name: Literal["linear"] = "linear"
    space: Literal["delta", "factors", "split_factors"] = "delta"
    missing: Literal["zero", "mean_present"] = "zero"


@MERGES.register("linear", LinearConfig)
class Linear(Coefficients):
    """Σ w_e ΔW_e. Raises ValueError for factors of unlike ranks in another space than delta."""

    def __init__(self, config: LinearConfig, names: Sequence[str]):
        super().__init__(config, names)
        self.weights = checked_weights(config.weights, self.names, 1.0 / len(self.names))

    def coefficients(self, layer: Layer) -> dict[str, float]:
        return self.shares(list(layer.deltas), layer.path)

    def shares(self, names: Sequence[str], path: str) -> dict[str, float]:
        present = {name: self.weights[name] for name in names}
        if self.config.missing == "zero" or len(present) == len(self.names):
            return present
        whole, here = sum(self.weights.values()), sum(present.values())
        if here == 0:
            raise ValueError(
                f"missing=mean_present: the weights of {', '.join(names)} add up to 0, so there is no mean of them"
            )
        return {name: weight * whole / here for name, weight in present.items()}

    def merge(self, layer: Layer) -> Product:
        if self.config.space == "delta" or layer.part:
            return super().merge(layer)
        space = opened(self.config.space, layer)
        weights = self.coefficients(layer)
        return space.close([weighted_sum(grid, weights) for grid in space.grids])
