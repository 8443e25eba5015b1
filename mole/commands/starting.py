"""What `mole train-expert` starts from: a new adapter, an expert, the nearest of a library, or the mean of all."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mole import adapters, merging
from mole.adapters import Adapter
from mole.backbones import Backbone
from mole.commands import publishing
from mole.commands.library.opening import open_library
from mole.commands.publishing import Goal
from mole.data import Sample
from mole.evaluation import nearest_experts
from mole.experts import Expert, load_expert
from mole.mixtures import experts_of
from mole.registry import ADAPTERS

logger = logging.getLogger(__name__)
NONE_CHOSEN = "lora"  # the adapter that the command starts with unless one is chosen
LOW_RANK = ("lora", "dora", "rslora", "pissa")
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel")
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
        _require_own(config.adapter, merged.adapter, "the mean of the experts", backbone, acts=("name", "rank"))
        return Start(merged.adapter, "merged", candidates)
    if config.start == "new":
        (name,) = candidates
        _require_own(config.adapter, weights[name], f"expert={config.expert}", backbone)
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
    _require_own(config.adapter, weights[name], f"the expert {name}", backbone)
    return Start(weights[name], "continued", {name: candidates[name]})


def _require_own(settings: Any, adapter: Adapter, whose: str, backbone: Backbone, acts: Sequence[str] = ()) -> None:
    """Raises ValueError for settings of a new adapter that are not the defaults and not what `adapter` has.

    The group's default, lora, stands for none chosen; the settings `acts` do act.
    """
    default: Any = ADAPTERS[settings.name].config()
    changed = {
        name: value
        for name, value in vars(settings).items()
        if name not in ("name", *acts) and value != getattr(default, name)
    }
    wrong = [] if settings.name == NONE_CHOSEN or "name" in acts else _other_method(settings.name, adapter)
    if not wrong and settings.name in LOW_RANK and adapter.method == "lora":
        known = _known(adapter)
        wrong = [
            f"adapter.{name}={_said(value)} ({'it has ' + _said(known[name]) if name in known else 'for new weights'})"
            for name, value in changed.items()
            if name not in known or (sorted(value) if isinstance(value, tuple) else value) != known[name]
        ]
    elif not wrong and changed and not _is_alike(settings, adapter, backbone):
        wrong = [f"adapter.{name}={_said(value)}" for name, value in changed.items()]
    if wrong:
        raise ValueError(
            f"training goes on with the adapter of {whose}, so that these settings differ from it and cannot act: "
            f"{', '.join(wrong)}; leave them out, or start a new adapter: without expert=, start=new"
        )


def _other_method(name: str, adapter: Adapter) -> list[str]:
    """The choice of a method that the adapter is not of, as an error says it."""
    parts = list(adapter.modules.values())
    if name in LOW_RANK and adapter.method == "lora":
        is_dora, is_rslora = (all(part.magnitude is not None for part in parts), all(part.rslora for part in parts))
        is_it = {"dora": is_dora, "rslora": is_rslora and not is_dora, "pissa": False}[name]
    else:
        is_it = name == adapter.method or (name in BOTTLENECKS and adapter.method == "bottleneck")
    return [] if is_it else [f"adapter={name} (it is {adapter.method})"]


def _known(adapter: Adapter) -> dict[str, Any]:
    """What LoRA's weights tell of their settings; None where modules differ."""
    parts = list(adapter.modules.values())
    of_parts = {name: {getattr(part, name) for part in parts} for name in ("rank", "alpha", "rslora")}
    one = {name: values.pop() if len(values) == 1 else None for name, values in of_parts.items()}
    ends = adapter.targets or {path.rpartition(".")[2] for path in adapter.modules}
    return {**one, "dropout": adapter.dropout, "targets": sorted(ends)}


def _is_alike(settings: Any, adapter: Adapter, backbone: Backbone) -> bool:
    """Whether these settings would make an adapter of the same tensors on this backbone."""
    adapters.attach(backbone.model, settings, seed=0)
    made = adapters.detach(backbone.model)
    shapes = [
        {path: {n: t.shape for n, t in part.tensors().items()} for path, part in a.modules.items()}
        for a in (made, adapter)
    ]
    return shapes[0] == shapes[1]


def _said(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{','.join(map(str, value))}]"
    return "several" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


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
