"""`mole train-expert`: train one adapter on a frozen backbone and keep it as an expert."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from mole import adapters, backbones, data, merging
from mole.adapters import Adapter
from mole.backbones import Backbone
from mole.config.nodes import LauncherConfig, RunConfig, chosen_datasets
from mole.config.seeds import seed_for
from mole.data import DataSplits, Sample
from mole.evaluation import Validation, check_reloaded, nearest_experts
from mole.experts import Expert, ExpertLibrary, check_backbone, check_name, describe, load_expert
from mole.mixtures import experts_of
from mole.registry import ADAPTERS, BACKBONES, DATASETS, LIBRARIES, OPTIMIZERS, SCHEDULES, TRACKERS, config_dataclass
from mole.run_folder import RunFolder
from mole.training import AnyTraining, FitResult, TrainingData, fit, make_accelerator

logger = logging.getLogger(__name__)
Collate = Callable[[list[Sample]], dict[str, Any]]


@config_dataclass
class TrainExpert:
    """One adapter, one backbone, one or several datasets."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    adapter: ADAPTERS.union()  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    library: LIBRARIES.union() | None = None  # type: ignore[valid-type]
    training: AnyTraining
    optimizer: OPTIMIZERS.union()  # type: ignore[valid-type]
    schedule: SCHEDULES.union()  # type: ignore[valid-type]
    tracker: TRACKERS.union()  # type: ignore[valid-type]
    launcher: LauncherConfig
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    name: str = "expert"
    expert: str | None = None
    start: Literal["new", "nearest", "mean"] = "new"
    start_library: str | None = None
    start_experts: tuple[str, ...] | None = None
    start_examples: Annotated[int, Field(ge=1)] = 64
    tasks: tuple[str, ...] | None = None
    tags: tuple[str, ...] = ()
    license: str | None = None
    description: str = ""
    allow_other_backbone: bool = False
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        chosen_datasets(self)
        check_name(self.name)
        problems = []
        if self.start != "new" and self.start_library is None:
            problems.append(f"start={self.start} needs start_library: the library whose experts it starts from")
        if self.start == "new" and (self.start_library is not None or self.start_experts is not None):
            problems.append("start_library and start_experts need start=nearest or start=mean")
        if self.start != "new" and self.expert is not None:
            problems.append(f"expert and start={self.start} are both given: choose one start")
        if problems:
            raise ValueError("; ".join(problems))


def run(config: TrainExpert) -> float | None:
    """Trains, keeps the best weights as `expert/`, checks what was written, adds it to the library if one is named.

    Returns the best validation score; None without validation data.
    """
    run = RunFolder(config.run.folder)
    library = _library_with_room(config)
    candidates = _candidates(config)
    accelerator = make_accelerator(config.training, backbones.resolve_device(config.backbone.device))
    backbone = backbones.load(config.backbone)
    for expert in candidates.values():
        check_backbone(expert.card, backbone.name, backbone.shapes, allow_other_backbone=config.allow_other_backbone)
    datasets = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    train, held_out = (data.joined(datasets.values(), split) for split in ("train", "validation"))
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    start = _start(config, backbone, candidates, train, collate)
    if start is None:
        adapters.attach(backbone.model, config.adapter, seed=seed_for("init", config.seed))
    else:
        adapters.attach_weights(backbone.model, start.adapter)
    result = fit(
        backbone.model,
        TrainingData(train, collate, lambda epoch: data.epoch_order(len(train), epoch, seed_for("data", config.seed))),
        config,
        run,
        accelerator=accelerator,
        seed=config.seed,
        evaluate=Validation(backbone.model, held_out, collate, config.training.batch_size) if held_out else None,
        resume=config.run.resume == "auto",
    )
    if accelerator.is_main_process:
        adapter = adapters.extract(backbone.model)
        expert = Expert(
            describe(adapter, backbone, **_facts(config, datasets, result), **_origin(config, start)), adapter
        )
        _keep(expert, config, run, backbone, collate(list(train[:4])))
        if library is not None and not _is_there(library, config.name, expert):
            library.add_expert(expert, expert_name=config.name)
        run.update(result=dataclasses.asdict(result), datasets={n: d.fingerprint for n, d in datasets.items()})
    return result.best_score


def _library_with_room(config: TrainExpert) -> ExpertLibrary | None:
    """The library that takes the expert: a taken name is found before hours of training, not after them."""
    if config.library is None:
        return None
    library = ExpertLibrary.open(config.library.url)
    if config.run.resume == "never":
        library.check_free(config.name)
    return library


def _is_there(library: ExpertLibrary, name: str, expert: Expert) -> bool:
    """Whether a run that is resumed after it was killed at its very end has added its expert already."""
    return library.exists() and name in library and library.card(name).content == expert.card.content


@dataclasses.dataclass(frozen=True)
class Start:
    """What training goes on from: an adapter, and where it comes from."""

    adapter: Adapter
    relation: str
    parents: dict[str, Expert]


def _candidates(config: TrainExpert) -> dict[str, Expert]:
    """The experts that a run may start from; none for a new adapter."""
    if config.expert is not None:
        return {config.name: load_expert(config.expert)}
    if config.start_library is None:
        return {}
    return experts_of(ExpertLibrary.open(config.start_library), config.start_experts)


def _start(
    config: TrainExpert, backbone: Backbone, candidates: dict[str, Expert], train: Sequence[Sample], collate: Collate
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


def _origin(config: TrainExpert, start: Start | None) -> dict[str, Any]:
    """What the card says of the start."""
    if start is None:
        return {"derived_from": []}
    place = config.start_library
    source = place if place and "://" in place else None
    rows = [
        {"relation": start.relation, "source": source, "name": name, "revision": e.revision, "content": e.card.content}
        for name, e in start.parents.items()
    ]
    return {"derived_from": rows[:256]}


def _facts(config: TrainExpert, datasets: dict[str, DataSplits], result: FitResult) -> dict[str, Any]:
    """What the card says of the training."""
    tasks = config.tasks
    if tasks is None:
        tasks = tuple(dict.fromkeys(sample.task for splits in datasets.values() for sample in splits.train))
    rows = [
        {"name": name, "split": "train", "examples": len(splits.train), "sha256": splits.fingerprint}
        for name, splits in datasets.items()
    ]
    scores = []
    if "validation_loss" in result.metrics:
        examples = sum(len(splits.validation or ()) for splits in datasets.values())
        scores.append(
            {
                "metric": "loss",
                "value": result.metrics["validation_loss"],
                "task": tasks[0] if len(tasks) == 1 else None,
                "dataset": "+".join(datasets),
                "split": "validation",
                "examples": examples,
                "higher_is_better": False,
                "config": None,
            }
        )
    return {
        "tasks": tasks[:64],
        "tags": config.tags,
        "license": config.license,
        "description": config.description,
        "data": rows,
        "training": {
            "steps": result.steps,
            "best_step": result.best_step,
            "tokens": result.tokens,
            "learning_rate": config.training.learning_rate,
            "seed": config.seed,
        },
        "scores": scores,
    }


def _keep(expert: Expert, config: TrainExpert, run: RunFolder, backbone: Backbone, batch: dict[str, Any]) -> None:
    """Writes `expert/` and checks that it gives what was trained; `expert.rejected/` holds what does not."""
    if config.run.resume == "auto" and run.expert.exists():
        shutil.rmtree(run.expert)
    expert.save(run.expert)
    fresh = backbones.load(config.backbone)
    adapters.attach_weights(fresh.model, load_expert(run.expert).adapter)
    try:
        check_reloaded(backbone.model, fresh.model, batch)
    except ValueError:
        run.expert.rename(run.expert.with_name("expert.rejected"))
        raise
