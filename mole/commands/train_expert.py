"""`mole train-expert`: train one adapter on a frozen backbone and keep it as an expert."""

import dataclasses
import shutil
from functools import partial
from typing import Any

from mole import adapters, backbones, data
from mole.backbones import Backbone
from mole.config.nodes import LauncherConfig, RunConfig, chosen_datasets
from mole.config.seeds import seed_for
from mole.data import DataSplits
from mole.evaluation import Validation, check_reloaded
from mole.experts import Expert, ExpertLibrary, check_backbone, check_name, describe, load_expert
from mole.registry import ADAPTERS, BACKBONES, DATASETS, LIBRARIES, OPTIMIZERS, SCHEDULES, TRACKERS, config_dataclass
from mole.run_folder import RunFolder
from mole.training import FitResult, TrainingConfig, TrainingData, fit, make_accelerator


@config_dataclass
class TrainExpert:
    """One adapter, one backbone, one or several datasets."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    adapter: ADAPTERS.union()  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    library: LIBRARIES.union() | None = None  # type: ignore[valid-type]
    training: TrainingConfig
    optimizer: OPTIMIZERS.union()  # type: ignore[valid-type]
    schedule: SCHEDULES.union()  # type: ignore[valid-type]
    tracker: TRACKERS.union()  # type: ignore[valid-type]
    launcher: LauncherConfig
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    name: str = "expert"
    expert: str | None = None
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


def run(config: TrainExpert) -> float | None:
    """Trains, keeps the best weights as `expert/`, checks what was written, adds it to the library if one is named.

    Returns the best validation score; None without validation data.
    """
    run = RunFolder(config.run.folder)
    library = _library_with_room(config)
    start = load_expert(config.expert) if config.expert else None
    accelerator = make_accelerator(config.training, backbones.resolve_device(config.backbone.device))
    backbone = backbones.load(config.backbone)
    _attach(config, backbone, start)
    datasets = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    train, held_out = (data.joined(datasets.values(), split) for split in ("train", "validation"))
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
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
        expert = Expert(describe(adapter, backbone, **_facts(config, datasets, result, start)), adapter)
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


def _attach(config: TrainExpert, backbone: Backbone, start: Expert | None) -> None:
    """A new adapter, or the one to go on from."""
    if start is None:
        adapters.attach(backbone.model, config.adapter, seed=seed_for("init", config.seed))
        return
    check_backbone(start.card, backbone.name, backbone.shapes, allow_other_backbone=config.allow_other_backbone)
    adapters.attach_weights(backbone.model, start.adapter)


def _facts(
    config: TrainExpert, datasets: dict[str, DataSplits], result: FitResult, start: Expert | None
) -> dict[str, Any]:
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
    origin = []
    if start is not None:
        known = {"name": config.name, "revision": start.revision, "content": start.card.content}
        origin = [{"relation": "continued", "source": None, **known}]
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
        "derived_from": origin,
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
