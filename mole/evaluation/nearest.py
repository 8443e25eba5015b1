"""Which expert of a library is nearest to new data: the one whose loss on a sample of it is the lowest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mole.adapters import Adapter
from mole.data import Sample
from mole.data.samples import spread
from mole.evaluation.loss import mean_loss, total
from mole.mixtures import MultiExpertModel
from mole.routers import UniformConfig


def nearest_experts(
    backbone: Any,
    experts: Mapping[str, Adapter],
    samples: Sequence[Sample],
    collate: Callable[[list[Sample]], dict[str, Any]],
    *,
    examples: int,
    batch_size: int,
) -> list[tuple[str, float]]:
    """Each expert with its loss in nats per supervised token on `examples` of the samples, evenly spread; best first.

    `backbone` is a transformers model, and as it was afterwards. Raises ValueError if there are no samples.
    """
    model = MultiExpertModel(backbone, experts, UniformConfig(), train="none")
    losses = {}
    try:
        for name in experts:
            with model.fixed_routing({name: 1.0}):
                found = mean_loss(model, spread(samples, examples), collate, batch_size=batch_size)
            losses[name] = total(found.values()).loss
    finally:
        model.unload()
    return sorted(losses.items(), key=lambda row: (row[1], row[0]))
