"""What a way of merging is: one file each, joined to the registry with its config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from mole.merging.deltas import Layer
from mole.merging.products import LowRank, Product
from mole.registry import config_dataclass, unknown

Space = Literal["delta", "core", "knots", "factors", "split_factors"]
Walk = Callable[[], Iterator[Layer]]

logger = logging.getLogger(__name__)


@config_dataclass
class Weighted:
    """Weights by the experts' names; None: what the method says where none are given."""

    name: str
    weights: dict[str, float] | None = None


class Merge:
    """One way of merging, for the experts `names` in the order given. Base of all methods.

    `exactly` says how many experts it takes (None: one or more), `vectors` whether it means anything for a matrix of
    one column, `keeps_rank` that a result of lower rank would be another method's.
    """

    exactly: ClassVar[int | None] = None
    vectors: ClassVar[bool] = False
    keeps_rank: ClassVar[bool] = False

    def __init__(self, config: Any, names: Sequence[str]):
        self.config = config
        self.names = tuple(names)
        if not self.names:
            raise ValueError("nothing to merge: name at least one expert")
        if self.exactly is not None and len(self.names) != self.exactly:
            raise ValueError(
                f"method={config.name} merges {self.exactly} experts, got {len(self.names)}: name them with experts=[…]"
            )

    def survey(self, walk: Walk) -> None:
        """Looks at all layers before the first is merged, for methods that need to; `walk` starts over at each call."""

    def merge(self, layer: Layer) -> Product:
        """The merged update of one module."""
        raise NotImplementedError

    def shares(self, names: Sequence[str], path: str) -> dict[str, float]:
        """Weights, of those that have it, for what any method merges linearly: a head or a bias at `path`."""
        return dict.fromkeys(names, 1.0 / len(self.names))

    def facts(self, layer: Layer) -> dict[str, float]:
        """What the report tells of the layer that was merged last, beside rank and error."""
        return {}


class Coefficients(Merge):
    """Base of the methods that give each expert of a layer a number c_e: ΔW = Σ c_e ΔW_e, exact by concatenation.

    B' = [c_1 s_1 B_1 … c_E s_E B_E], A' = [A_1; …; A_E].
    """

    vectors = True

    def coefficients(self, layer: Layer) -> dict[str, float]:
        """Name → c_e, for the experts that adapt the module."""
        raise NotImplementedError

    def merge(self, layer: Layer) -> Product:
        return concatenated(layer, self.coefficients(layer))


def concatenated(layer: Layer, coefficients: Mapping[str, float]) -> LowRank:
    """Σ c_e ΔW_e as one product; experts with c_e = 0 take no rank."""
    parts = [(c, layer.deltas[name]) for name, c in sorted(coefficients.items()) if c != 0 and name in layer.deltas]
    if not parts:
        d_out, d_in = layer.shape
        like = next(iter(layer.deltas.values())).A
        return LowRank(like.new_zeros(d_out, 0), like.new_zeros(0, d_in))
    B = torch.cat([c * delta.scale * delta.B for c, delta in parts], dim=1)
    return LowRank(B, torch.cat([delta.A for _, delta in parts]))


def checked_weights(given: Mapping[str, float] | None, names: Sequence[str], default: float) -> dict[str, float]:
    """Name → weight for every expert. Raises ValueError for a name that is no expert's, and for one left out."""
    if given is None:
        return dict.fromkeys(names, default)
    for name in given:
        if name not in names:
            raise ValueError(f"weights: {unknown('expert', name, names)}")
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"weights: none for {', '.join(missing)}: give every expert its weight, 0 to leave one out")
    return {name: float(given[name]) for name in names}


def settings_without_effect(config: Any, names: Sequence[str], beside: str) -> None:
    """Raises ValueError for a setting that differs from its default where `beside` keeps it from acting."""
    fields = type(config).__pydantic_fields__
    if changed := [name for name in names if getattr(config, name) != fields[name].default]:
        raise ValueError(f"{', '.join(changed)}: cannot act with {beside}: leave it at its default")
