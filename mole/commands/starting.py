"""What `mole train-expert` starts from: a new adapter, an expert, the nearest of a library, or the mean of all."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mole import merging
from mole.adapters import Adapter
from mole.backbones import Backbone
from mole.commands import publishing
from mole.commands.library.opening import open_library
from mole.commands.publishing import Goal
from mole.data import Sample
from mole.evaluation import nearest_experts
from mole.experts import Expert, load_expert
from mole.mixtures import experts_of

logger = logging.getLogger(__name__)
Collate = Callable[[list[Sample]], dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """What training goes on from: an adapter, and where it comes from."""

    adapter: Adapter
    relation: str
    parents: dict[str, Expert]


def candidates(config: Any, goal: Goal | None) -> dict[str, Expert]:
    """The experts that a run may start from; none for a new adapter."""
    if goal is not None and goal.base is not None:
        return {goal.name: goal.base}
    if config.expert is not None:
        return {config.name: load_expert(config.expert)}
    if config.start_library is None:
        return {}
    return experts_of(open_library(config.start_library), config.start_experts)


def start_of(
    config: Any, backbone: Backbone, candidates: dict[str, Expert], train: Sequence[Sample], collate: Collate
) -> Start | None:
    """The expert that was named, the one nearest to the new data, or the mean of all; None for a new adapter."""
    if not candidates:
        return None
    weights = {name: expert.adapter for name, expert in candidates.items()}
    if config.start == "mean":
        rank = getattr(config.adapter, "rank", "auto")
        merged = merging.merge(weights, merging.LinearConfig(), rank=rank, backbone=backbone.model)
        logger.info("starting from the mean of %s", ", ".join(weights))
        return Start(merged.adapter, "merged", candidates)
    if config.start == "new":
        (name,) = candidates
        return Start(weights[name], "continued", candidates)
    ranked = nearest_experts(
        backbone.model,
        weights,
        train,
        collate,
        examples=config.start_examples,
        batch_size=config.training.batch_size,
    )
    logger.info("loss on the new data: %s", ", ".join(f"{name} {loss:.4f}" for name, loss in ranked))
    name = ranked[0][0]
    logger.info("starting from %s", name)
    return Start(weights[name], "continued", {name: candidates[name]})


def origin(config: Any, goal: Goal | None, start: Start | None) -> dict[str, Any]:
    """What the card says of the start: where it comes from, and the licence that follows from it."""
    if start is None:
        return {"derived_from": [], "license": config.license}
    place = goal.library.url if goal is not None and goal.base is not None else config.start_library
    source = place if place and "://" in place else None
    rows = [
        {"relation": start.relation, "source": source, "name": name, "revision": e.revision, "content": e.card.content}
        for name, e in start.parents.items()
    ]
    return {"derived_from": rows[:256], **publishing.license_of(config, start.parents)}
