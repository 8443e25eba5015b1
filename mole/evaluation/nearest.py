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
    """Each expert with its loss, in nats per supervised token or text, on `examples` of the samples; best first.

    `backbone` is a transformers model, and as it was afterwards; an expert with a head is tried with it. Raises
    ValueError if there are no samples.
    """
    losses = {}
    for name, adapter in experts.items():
        policy = f"take:{name}" if adapter.full_modules else "error"
        model = MultiExpertModel(backbone, {name: adapter}, UniformConfig(), train="none", modules_to_save=policy)
        try:
            found = mean_loss(model, spread(samples, examples), collate, batch_size=batch_size)
        finally:
            model.unload()
        losses[name] = total(found.values()).loss
    return sorted(losses.items(), key=lambda row: (row[1], row[0]))
