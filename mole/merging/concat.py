"""Concatenation: the weighted sum of the experts' updates with every rank kept, r = Σ r_e.

Equals the mixture with these constant weights to float noise, and PEFT's `cat`.
"""

from __future__ import annotations

from typing import Literal

from mole.merging.base import Weighted
from mole.merging.linear import Linear
from mole.registry import MERGES, config_dataclass


@config_dataclass
class ConcatConfig(Weighted):
    """Weights 1/E unless given. A module that an expert does not adapt counts as ΔW = 0, or not at all."""

    name: Literal["concat"] = "concat"
    missing: Literal["zero", "mean_present"] = "zero"

    @property
    def space(self) -> str:
        """The one space in which concatenation is what it says."""
        return "delta"


@MERGES.register("concat", ConcatConfig)
class Concat(Linear):
    """Σ w_e ΔW_e as [w_1 s_1 B_1 … w_E s_E B_E] [A_1; …; A_E]."""

    keeps_rank = True
