"""Task arithmetic: λ Σ_e w_e ΔW_e; negative weights take abilities away (Ilharco et al., 2022, arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mole.merging.base import Coefficients, Weighted, checked_weights
from mole.merging.deltas import Layer
from mole.registry import MERGES, config_dataclass


@config_dataclass
class TaskArithmeticConfig(Weighted):
    """Weights 1 unless given, of any sign; `scale` is λ."""

    name: Literal["task_arithmetic"] = "task_arithmetic"
    scale: float = 1.0


@MERGES.register("task_arithmetic", TaskArithmeticConfig)
class TaskArithmetic(Coefficients):
    """λ Σ w_e ΔW_e."""

    def __init__(self, config: TaskArithmeticConfig, names: Sequence[str]):
        super().__init__(config, names)
        self.weights = checked_weights(config.weights, self.names, 1.0)

    def coefficients(self, layer: Layer) -> dict[str, float]:
        return self.shares(list(layer.deltas), layer.path)

    def shares(self, names: Sequence[str], path: str) -> dict[str, float]:
        return {name: self.config.scale * self.weights[name] for name in names}
