"""`mole lorahub`: weights of a library's experts for a new task from a few examples of it, by black-box search."""

import dataclasses
import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from mole import backbones, data, merging, mixtures
from mole.backbones import Backbone
from mole.commands.library.opening import library_of
from mole.config.nodes import RunConfig, chosen_datasets
from mole.data import Sample
from mole.evaluation import check_reloaded, mean_loss, total
from mole.experts import Expert, describe, licences
from mole.experts.retrieval import by_chance
from mole.mixtures import MultiExpertModel
from mole.mixtures.preparing.weight_search import BlackBox, Nevergrad, Probe, best_of, search
from mole.registry import BACKBONES, DATASETS, LIBRARIES, config_dataclass
from mole.routers import StaticConfig
from mole.run_folder import RunFolder

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


@config_dataclass
class Lorahub:
    """Experts, the task's examples, and the search."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    library: LIBRARIES.union()  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    name: str = "lorahub"
    experts: tuple[str, ...] | None = None
    pool: Count | None = 20
    pool_by: Literal["chance", "loss"] = "chance"
    examples: Count = 5
    budget: Annotated[int, Field(ge=2)] = 40
    l1: Annotated[float, Field(ge=0)] = 0.05
    bound: Positive = 1.5
    space: Literal["delta", "factors"] = "delta"
    optimizer: str = "NGOpt"
    output: Literal["mixture", "expert", "both"] = "mixture"
    batch_size: Count = 16
    allow_other_backbone: bool = False
    seed: int = 42
    run: RunConfig

    def __post_init__(self):
        chosen_datasets(self)


def run(config: Lorahub) -> float:
    """Searches, writes every probe to probes.jsonl, keeps the best weights as `mixture/`, `expert/` or both.

    Returns the best objective.
    """
    run = RunFolder(config.run.folder)
    experts = mixtures.experts_of(library_of(config.library), config.experts)
    backbone = backbones.load(config.backbone)
    few = _few(config, backbone)
    if config.pool is not None and config.pool < len(experts):
        experts = {name: experts[name] for name in _pool(config, experts, backbone, few)}
    optimizer = optimizer_for(config, len(experts))
    model = _mixture(config, experts, backbone)
    run.update(status="running", experts=list(experts), examples=[sample.prompt for sample in few])
    probes: list[Probe] = []
    with run.probes.open("w", encoding="utf-8") as file:
        score = partial(_loss, model, few, config, backbone)
        for probe in search(score, optimizer, len(experts), budget=config.budget, l1=config.l1, bound=config.bound):
            probes.append(probe)
            file.write(json.dumps(_row(probe, experts)) + "\n")
            file.flush()
    best = best_of(probes)
    router: Any = model.router
    router.theta.data.copy_(torch.tensor([best.weights]))
    _keep(config, run, model, backbone, experts, few)
    first = probes[0]
    run.update(result={"backbone_loss": first.loss, **_row(best, experts)})
    print(f"loss {first.loss:.4g} → {best.loss:.4g} at probe {best.number} of {len(probes)}:")
    for name, weight in zip(experts, best.weights, strict=True):
        print(f"  {name:30} {weight:+.3f}")
    return best.objective


def optimizer_for(config: Lorahub, num_experts: int) -> BlackBox:
    """What searches."""
    return Nevergrad(config.optimizer, num_experts, bound=config.bound, budget=config.budget, seed=config.seed)


def _few(config: Lorahub, backbone: Backbone) -> list[Sample]:
    """The examples that weights are judged by: drawn from the training split."""
    datasets = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    samples = list(data.joined(datasets.values(), "train"))
    if len(samples) < config.examples:
        raise ValueError(f"examples={config.examples}, and the training split has {len(samples)}: lower examples")
    return random.Random(f"lorahub examples {config.seed}").sample(samples, config.examples)


def _pool(config: Lorahub, experts: dict[str, Expert], backbone: Backbone, few: Sequence[Sample]) -> list[str]:
    """The experts that take part: drawn, or those that do best on the examples, each alone."""
    assert config.pool is not None
    if config.pool_by == "chance":
        return by_chance(list(experts), config.pool, seed=config.seed)
    model = _mixture(config, experts, backbone)
    names = list(experts)
    alone = [tuple(float(name == other) for other in names) for name in names]
    losses = {name: _loss(model, few, config, backbone, w) for name, w in zip(names, alone, strict=True)}
    model.unload()
    best = sorted(names, key=lambda name: (losses[name], name))[: config.pool]
    return [name for name in names if name in best]


def _mixture(config: Lorahub, experts: dict[str, Expert], backbone: Backbone) -> MultiExpertModel:
    """One weight per expert for the whole model, at 0."""
    combine = "parameters" if config.space == "factors" else "outputs"
    router = StaticConfig(normalise="none", num_groups=1, init=0.0, combine=combine)
    return mixtures.mixture_of(
        experts, backbone, router, train="none", allow_other_backbone=config.allow_other_backbone
    ).eval()


def _loss(
    model: MultiExpertModel,
    samples: Sequence[Sample],
    config: Lorahub,
    backbone: Backbone,
    weights: tuple[float, ...],
) -> float:
    """Nats per supervised token of the examples under these weights."""
    router: Any = model.router
    router.theta.data.copy_(torch.tensor([weights]))
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    return total(mean_loss(model, samples, collate, batch_size=config.batch_size).values()).loss


def _row(probe: Probe, experts: dict[str, Expert]) -> dict[str, Any]:
    """A line of probes.jsonl."""
    weights = dict(zip(experts, probe.weights, strict=True))
    return {"probe": probe.number, "loss": probe.loss, "objective": probe.objective, "weights": weights}


def _keep(
    config: Lorahub,
    run: RunFolder,
    model: MultiExpertModel,
    backbone: Backbone,
    experts: dict[str, Expert],
    few: Sequence[Sample],
) -> None:
    """Writes what the weights found make: `mixture/`, checked by loading it, and `expert/`, if asked for."""
    tasks = list(dict.fromkeys(sample.task for sample in few))
    training = {"method": "lorahub", "examples": len(few), "probes": config.budget, "seed": config.seed}
    origins = mixtures.pinned(experts, config.library.url)
    licence = licences.facts({name: expert.card.license for name, expert in experts.items()})
    if config.output != "expert":
        mixtures.save_mixture(model, run.mixture, backbone, origins=origins, training=training, **licence)
        fresh = mixtures.load_mixture(run.mixture, backbones.load(config.backbone), allow_other_backbone=True)
        batch = data.collate(list(few), pad_token_id=backbone.tokenizer.pad_token_id)
        check_reloaded(model, fresh, batch)
    if config.output != "mixture":
        adapters, routers = model.adapters(), model.routers()
        model.unload()
        merged = merging.one_expert(adapters, routers, backbone=backbone.model)
        parents = [
            {"relation": "merged", "source": o.library, "name": o.name, "revision": o.revision, "content": o.content}
            for o in origins.values()
        ]
        facts = {"tasks": tasks[:64], "training": training, "derived_from": parents, **licence}
        Expert(describe(merged.adapter, backbone, **facts), merged.adapter).save(run.expert)
