"""`mole train-expert`: train one adapter on a frozen backbone and keep it as an expert."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from mole import adapters, backbones, data
from mole.adapters import Adapter
from mole.backbones import Backbone
from mole.commands import heads, learned, publishing, starting
from mole.commands.drawing import draw
from mole.commands.feeding import dry_run, refuse_resuming, show_first_batch, training_data
from mole.commands.sampling import sampled
from mole.config.nodes import LauncherConfig, RunConfig, chosen_datasets
from mole.config.seeds import seed_for
from mole.data import DataSplits, Sample
from mole.evaluation import Validation, check_reloaded, exact_match
from mole.experts import Expert, check_backbone, check_name, describe, load_expert
from mole.registry import ADAPTERS, BACKBONES, DATASETS, LIBRARIES, OPTIMIZERS, SCHEDULES, TRACKERS, config_dataclass
from mole.run_folder import RunFolder
from mole.training import AnyTraining, FitResult, fit, make_accelerator

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
    train: Literal["adapter", "head"] = "adapter"
    expert: str | None = None
    start: Literal["new", "nearest", "mean"] = "new"
    start_library: str | None = None
    start_experts: tuple[str, ...] | None = None
    start_examples: Annotated[int, Field(ge=1)] = 64
    tasks: tuple[str, ...] | None = None
    tags: tuple[str, ...] = ()
    license: str | None = None
    description: str = ""
    message: str | None = None
    publish: Literal["always", "if-better"] = "always"
    metric: Literal["loss", "exact_match", "score"] = "loss"
    allow_other_backbone: bool = False
    dry_run: bool = False
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        chosen_datasets(self)
        refuse_resuming(self)
        check_name(self.name)
        problems = []
        if self.start != "new" and self.start_library is None:
            problems.append(f"start={self.start} needs start_library: the library whose experts it starts from")
        if self.start == "new" and (self.start_library is not None or self.start_experts is not None):
            problems.append("start_library and start_experts need start=nearest or start=mean")
        if self.start != "new" and self.expert is not None:
            problems.append(f"expert and start={self.start} are both given: choose one start")
        if self.publish != "always" and (self.expert is None or self.library is None):
            problems.append(
                f"publish={self.publish} compares with the expert that is trained further: it needs "
                "expert=<library>/<name> and library=<library>"
            )
        if self.metric != "loss" and self.publish == "always":
            problems.append("metric says what publish=if-better compares: set both or neither")
        if self.train == "head" and (self.library is not None or self.expert is not None or self.start != "new"):
            problems.append(
                "train=head trains a head alone, for comparison, and leaves no expert: leave library, "
                "expert and start out"
            )
        if problems:
            raise ValueError("; ".join(problems))


def run(config: TrainExpert) -> float | None:
    """Trains, keeps the best weights as `expert/`, checks what was written, publishes it if a library is named.

    With train=head there is no adapter and no expert: scores and predictions alone. Returns the best validation score;
    None without validation data.
    """
    run = RunFolder(config.run.folder)
    goal = publishing.goal(config, run)
    candidates = starting.candidates(config, goal)
    accelerator = make_accelerator(config.training, backbones.resolve_device(config.backbone.device))
    backbone = heads.backbone_for(config, chosen_datasets(config))
    for name, expert in candidates.items():
        check_backbone(expert.card, backbone.name, backbone.shapes, allow_other_backbone=config.allow_other_backbone)
        heads.check_head(f"expert {name!r}", expert.card, backbone.head)
    datasets = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    train, held_out = (data.joined(datasets.values(), split) for split in ("train", "validation"))
    if config.publish == "if-better" and not held_out:
        raise ValueError("publish=if-better compares on validation samples, and there are none: hold some out")
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    start = starting.start_of(config, backbone, candidates, train, collate)
    along = backbone.trained_along(pooler=getattr(config.adapter, "train_pooler", True))
    if config.train == "head":
        _train_head(backbone, along)
    elif start is None:
        adapters.attach(backbone.model, config.adapter, seed=seed_for("init", config.seed), trained=along)
    else:
        adapters.attach_weights(backbone.model, start.adapter, trained=along)
    first = adapters.extract(backbone.model, full=along) if config.train == "adapter" else None
    publishing.begin(goal, run)
    validation = _validation(config, backbone, held_out, collate, datasets)
    before = _measured(config, backbone, validation) if config.publish == "if-better" else None
    fed = training_data(train, backbone.tokenizer.pad_token_id, config.training, config.seed, backbone.model)
    if accelerator.is_main_process:
        show_first_batch(fed, config.training, backbone.tokenizer, run)
    if config.dry_run:
        return dry_run(backbone.model, fed, config.training, accelerator) if accelerator.is_main_process else None
    looked_at = sampled(
        validation, backbone.model, backbone.tokenizer, config.training, run, accelerator.is_main_process
    )
    again = config.run.resume == "auto"
    result = fit(
        backbone.model, fed, config, run, accelerator=accelerator, seed=config.seed, evaluate=looked_at, resume=again
    )
    if accelerator.is_main_process:
        found = heads.finish(backbone.model, held_out, collate, config, backbone, datasets, run)
        run.update(result=dataclasses.asdict(result), datasets={n: d.fingerprint for n, d in datasets.items()})
    if accelerator.is_main_process and first is not None:
        adapter = adapters.extract(backbone.model, full=along)
        after = None if before is None else _measured(config, backbone, validation)
        facts = _facts(config, datasets, result, after, found, held_out) | {"head": heads.head_fact(backbone.head)}
        card = describe(adapter, backbone, **facts, **starting.origin(config, goal, start))
        message = config.message or (f"{result.steps} more steps" if goal and goal.base else "")
        expert = publishing.following(Expert(card, adapter), goal, message)
        _keep(expert, first, config, run, backbone, collate(list(train[:4])))
        publishing.publish(goal, expert, run, against=_worse(config, before, after))
    if accelerator.is_main_process:
        draw(run, ["loss"])
    return result.best_score


def _train_head(backbone: Backbone, along: Sequence[str]) -> None:
    """The head and what it reads through are all that trains. Raises ValueError without a head."""
    if not along:
        raise ValueError("train=head: this data asks for no head: give data to classify, or leave train=adapter")
    for path in along:
        backbone.model.get_submodule(path).requires_grad_(True)


def _validation(
    config: TrainExpert,
    backbone: Backbone,
    samples: Sequence[Sample],
    collate: Collate,
    datasets: dict[str, DataSplits],
) -> Validation | None:
    if not samples:
        return None
    limit = config.training.validation_examples
    return heads.validation_for(backbone.model, samples, collate, config, backbone, datasets, limit=limit)


def _measured(config: TrainExpert, backbone: Backbone, validation: Validation | None) -> float:
    """`metric` of the model as it is, on all validation samples."""
    assert validation is not None
    if config.metric != "exact_match":
        return validation(0)[f"validation_{config.metric}"]
    samples, batch_size = validation.samples, config.training.batch_size
    return exact_match(backbone.model, samples, backbone.tokenizer, batch_size=batch_size)


def _worse(config: TrainExpert, before: float | None, after: float | None) -> str | None:
    """Why the expert is not published: it is no better than what it started from. None: it is, or may be worse."""
    if before is None or after is None or (after < before if config.metric == "loss" else after > before):
        return None
    return f"{config.metric} {after:.6g} on the validation samples is no better than {before:.6g} at the start"


def _facts(
    config: TrainExpert,
    datasets: dict[str, DataSplits],
    result: FitResult,
    after: float | None,
    found: dict[str, float],
    held_out: Sequence[Sample],
) -> dict[str, Any]:
    """What the card says of the training; `after` is the metric that was compared, if one was.

    `found` are the scores under a head, of all validation samples `held_out`; without a head there are none, and the
    card has what training saw of the first of them, those that `training.validation_examples` allows.
    """
    tasks = config.tasks
    if tasks is None:
        tasks = tuple(dict.fromkeys(sample.task for splits in datasets.values() for sample in splits.train))
    rows = [
        {"name": name, "split": "train", "examples": len(splits.train), "sha256": splits.fingerprint}
        for name, splits in datasets.items()
    ]
    measured, on = dict(found), held_out
    if not found:
        on = held_out[: config.training.validation_examples]
        measured = {"loss": result.metrics["validation_loss"]} if "validation_loss" in result.metrics else {}
        measured |= {} if after is None else {config.metric: after}
    task = tasks[0] if len(tasks) == 1 else None
    scores = heads.score_rows(measured, task, "+".join(datasets), len(on), heads.measured_on(on))
    chosen = {} if result.best_step is None else {"best_step": result.best_step}
    return {
        "tasks": tasks[:64],
        "tags": config.tags,
        "description": config.description,
        "data": rows,
        "training": {
            "steps": result.steps,
            **chosen,
            "tokens": result.tokens,
            "learning_rate": config.training.learning_rate,
            "seed": config.seed,
        },
        "scores": scores,
    }


def _keep(
    expert: Expert, first: Adapter, config: TrainExpert, run: RunFolder, backbone: Backbone, batch: dict[str, Any]
) -> None:
    """Writes `expert/` and checks that it gives what was trained and differs from `first`, the adapter at the start.

    What does not is left as `expert.rejected/`.
    """
    if config.run.resume == "auto" and run.expert.exists():
        shutil.rmtree(run.expert)
    expert.save(run.expert)
    fresh = heads.backbone_for(config, chosen_datasets(config))
    adapters.attach_weights(fresh.model, load_expert(run.expert).adapter)
    try:
        learned.check_adapter(first, expert.adapter)
        check_reloaded(backbone.model, fresh.model, batch)
    except ValueError:
        learned.reject(run.expert)
        raise
