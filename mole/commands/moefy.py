"""`mole moefy`: modules of a backbone become mixtures of experts, which train."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from mole import backbones, data, moe
from mole.analysis import MissingExtra, plot_run
from mole.backbones import Backbone
from mole.commands.feeding import show_first_batch, training_data
from mole.commands.listening import TrainingForwards, listening, texts_of
from mole.commands.sampling import sampled
from mole.config.nodes import LauncherConfig, RunConfig, chosen_datasets
from mole.config.seeds import seed_for
from mole.data import DataSplits, Sample
from mole.evaluation import Validation, check_reloaded, mean_loss, total
from mole.moe import MoEModel, SurgeryReport
from mole.moe.presets import AnySurgery, block_config
from mole.registry import BACKBONES, DATASETS, OPTIMIZERS, SCHEDULES, TRACKERS, config_dataclass
from mole.routing.log import RoutingLog
from mole.routing.statistics import RoutingStatistics
from mole.run_folder import RunFolder
from mole.training import AnyTraining, FitResult, fit, make_accelerator

logger = logging.getLogger(__name__)
Collate = Callable[[list[Sample]], dict[str, Any]]


@config_dataclass
class Moefy:
    """A backbone, what becomes of which of its modules, and what trains them."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    moe: AnySurgery
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    training: AnyTraining
    optimizer: OPTIMIZERS.union()  # type: ignore[valid-type]
    schedule: SCHEDULES.union()  # type: ignore[valid-type]
    tracker: TRACKERS.union()  # type: ignore[valid-type]
    launcher: LauncherConfig
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    name: str = "moe"
    train: Literal["all", "experts", "router", "none"] = "all"
    log_every: Annotated[int, Field(ge=1)] | None = 20
    log_examples: Annotated[int, Field(ge=0)] = 16
    statistics_every: Annotated[int, Field(ge=1)] | None = 5
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        if self.train != "none" or self.dataset is not None or self.datasets:
            chosen_datasets(self)
        if self.training.packing:
            raise ValueError(
                "training.packing: the blocks route whole rows, so samples would share them: leave it null"
            )
        if self.train == "none" and self.run.resume == "auto":
            raise ValueError("run.resume=auto goes on with a training, and train=none has none: leave it at never")


def run(config: Moefy) -> float | None:
    """Does the surgery, trains what it made, leaves `mixture/` (checked), the routing log and plots.

    Returns the best validation score; None where nothing was trained.
    """
    run = RunFolder(config.run.folder)
    accelerator = make_accelerator(config.training, backbones.resolve_device(config.backbone.device))
    backbone = backbones.load(config.backbone)
    chosen = chosen_datasets(config) if config.dataset or config.datasets else {}
    datasets = data.load_many(chosen, backbone.tokenizer, seed=config.seed, context_length=backbone.context_length)
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    dense = _dense_loss(config, backbone, datasets, collate)
    report = surgery(config, backbone)
    model = MoEModel(backbone.model)
    log = RoutingLog(model.sites, model.expert_names)
    result = None
    if config.train != "none":
        model.set_trainable(config.train)
        result = _train(config, model, datasets, backbone, accelerator, run, log)
    else:
        run.update(status="running")
    if accelerator.is_main_process:
        run.update(surgery=_facts(report), dense_loss=dense)
        _log_examples(config, model, datasets, collate, log)
        if len(log):
            log.flush(run.scalings / "log", overwrite=True, decode=partial(texts_of, backbone.tokenizer))
        _keep(config, run, model, _some_batch(datasets, collate))
        if result is not None:
            run.update(result=dataclasses.asdict(result), datasets={n: d.fingerprint for n, d in datasets.items()})
        _draw(run)
    return result.best_score if result else None


def surgery(config: Moefy, backbone: Backbone) -> SurgeryReport:
    """Puts the blocks in, and tells of them."""
    report = moe.moefy(
        backbone.model,
        config.moe.pattern,
        config=block_config(config.moe),
        init=config.moe.init,
        init_noise=config.moe.init_noise,
        seed=seed_for("init", config.seed) % 2**31,
    )
    for line in str(report).splitlines():
        logger.info("%s", line)
    return report


def _facts(report: SurgeryReport) -> dict[str, Any]:
    parameters = {what: report.total(what) for what in ("before", "after", "active")}
    return {"blocks": report.names, "parameters": parameters, "equals_dense": report.equals_dense}


def _dense_loss(
    config: Moefy, backbone: Backbone, datasets: dict[str, DataSplits], collate: Collate
) -> dict[str, float] | None:
    """The validation loss of the backbone as it was, over all tokens and by task; None without validation data."""
    held_out = data.joined(datasets.values(), "validation") if datasets else []
    if not held_out:
        return None
    losses = mean_loss(backbone.model, held_out, collate, batch_size=config.training.batch_size)
    found = {"validation_loss": total(losses.values()).loss}
    return found | {f"validation_loss/{task}": loss.loss for task, loss in losses.items() if len(losses) > 1}


def _train(
    config: Moefy,
    model: MoEModel,
    datasets: dict[str, DataSplits],
    backbone: Backbone,
    accelerator: Any,
    run: RunFolder,
    log: RoutingLog,
) -> FitResult:
    train, held_out = (data.joined(datasets.values(), split) for split in ("train", "validation"))
    main = accelerator.is_main_process
    fed = training_data(train, backbone.tokenizer.pad_token_id, config.training, config.seed)
    if main:
        show_first_batch(fed, config.training, backbone.tokenizer, run)
    limit, validation = config.training.validation_examples, None
    if held_out:
        validation = Validation(model, held_out, fed.collate, config.training.batch_size, limit=limit)
    statistics = None
    if main and config.statistics_every is not None:
        statistics = RoutingStatistics(model.sites, model.expert_names, every=config.statistics_every)
        model.observers.append(statistics)
    with listening(model, TrainingForwards(log, config.log_every) if main else None):
        return fit(
            model,
            fed,
            config,
            run,
            accelerator=accelerator,
            seed=config.seed,
            evaluate=sampled(validation, model, backbone.tokenizer, config.training, run, main),
            extras=statistics.read if statistics else None,
            after_step=model.after_step,
            resume=config.run.resume == "auto",
        )


def _log_examples(
    config: Moefy, model: MoEModel, datasets: dict[str, DataSplits], collate: Collate, log: RoutingLog
) -> None:
    """The routing of the first validation examples of each dataset, as the finished model routes them."""
    model.observers.clear()
    for splits in datasets.values():
        examples = list((splits.validation or splits.train)[: config.log_examples])
        if examples:
            with listening(model, log):
                mean_loss(model, examples, collate, batch_size=config.training.batch_size)


def _keep(config: Moefy, run: RunFolder, model: MoEModel, batch: dict[str, Any]) -> None:
    """Writes `mixture/` and checks that it gives what was trained; `mixture.rejected/` holds what does not."""
    moe.save(model.model, run.mixture, whole=False, replace=config.run.resume == "auto")
    fresh = moe.load(backbones.load(config.backbone).model, run.mixture)
    try:
        check_reloaded(model, MoEModel(fresh), batch)
    except ValueError:
        run.mixture.rename(run.mixture.with_name("mixture.rejected"))
        raise


def _some_batch(datasets: dict[str, DataSplits], collate: Collate) -> dict[str, Any]:
    """A few examples to compare logits on; a row of token ids where no dataset was given."""
    import torch

    for splits in datasets.values():
        batch = collate(list(splits.train[:4]))
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {"input_ids": torch.arange(4)[None]}


def _draw(run: RunFolder) -> None:
    """Leaves plots/ where there is a log to draw and matplotlib to draw it with."""
    if not run.scalings.is_dir():
        return
    try:
        plot_run(run.path)
    except MissingExtra as missing:
        logger.warning("no plots: %s; then mole plot %s", missing, run.path)
