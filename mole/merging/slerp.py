"""SLERP: from one expert to another along the arc between them (Shoemake, 1985, doi 10.1145/325334.325242).

[sin((1 − t) θ) a + sin(t θ) b] / sin θ with cos θ = ⟨a, b⟩ / ‖a‖ ‖b‖; the straight line where they nearly point the
same way or the opposite one. The coefficients are numbers, so the result is an exact concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from mole.experts.similarity import inner_product
from mole.merging.base import Coefficients, Walk
from mole.merging.deltas import Layer
from mole.registry import MERGES, config_dataclass

_NEARLY_PARALLEL = 0.9995


@config_dataclass
class SlerpConfig:
    """`t` 0 is the first expert, 1 the second; the angle is each layer's own or that of the whole updates."""

    name: Literal["slerp"] = "slerp"
    t: float = Field(default=0.5, ge=0, le=1)
    per: Literal["layer", "model"] = "layer"


@MERGES.register("slerp", SlerpConfig)
class Slerp(Coefficients):
    """The point at t on the arc from the first expert's updates to the second's."""

    exactly = 2

    def __init__(self, config: SlerpConfig, names: Sequence[str]):
        super().__init__(config, names)
        self._whole: list[float] | None = None

    def survey(self, walk: Walk) -> None:
        if self.config.per == "model":
            rows = [self._products(layer) for layer in walk()]
            self._whole = [sum(column) for column in zip(*rows, strict=True)]

    def coefficients(self, layer: Layer) -> dict[str, float]:
        aa, ab, bb = self._whole or self._products(layer)
        t = self.config.t
        first, second = 1 - t, t
        cosine = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 1.0
        if abs(cosine) <= _NEARLY_PARALLEL:
            angle = math.acos(cosine)
            first, second = (math.sin(part * angle) / math.sin(angle) for part in (first, second))
        return dict(zip(self.names, (first, second), strict=True))

    def shares(self, names: Sequence[str], path: str) -> dict[str, float]:
        line = dict(zip(self.names, (1 - self.config.t, self.config.t), strict=True))
        return {name: line[name] for name in names}

    def _products(self, layer: Layer) -> list[float]:
        """⟨a, a⟩, ⟨a, b⟩, ⟨b, b⟩ of the layer's updates."""
        parts = [layer.deltas[name].folded() if name in layer.deltas else None for name in self.names]
        pairs = [(parts[i], parts[j]) for i, j in ((0, 0), (0, 1), (1, 1))]
        return [inner_product(x.B, x.A, y.B, y.A) if x and y else 0.0 for x, y in pairs]
