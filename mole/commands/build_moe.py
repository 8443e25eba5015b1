"""`mole build-moe`, `mole xlora-train`: experts of a library and a router → a mixture, trained if the router learns."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mole import backbones, data, mixtures
from mole.backbones import Backbone
from mole.commands import continuing, heads, learned
from mole.commands.chosen_experts import chosen_experts
from mole.commands.drawing import draw
from mole.commands.feeding import dry_run, refuse_resuming, show_first_batch, training_data
from mole.commands.listening import TrainingForwards, listening, observing, texts_of
from mole.commands.preparing import kept_in_library, prepare
from mole.commands.sampling import sampled
from mole.commands.static_weights import tell_bound, weights_logged
from mole.config.nodes import LauncherConfig, RunConfig, chosen_datasets
from mole.config.seeds import seed_for
from mole.data import DataSplits, Sample
from mole.evaluation import check_reloaded, mean_loss
from mole.experts import Expert, licences
from mole.mixtures import MultiExpertModel
from mole.mixtures.preparing.prototype_data import flatness, needs_data
from mole.mixtures.two_pass.hidden_store import HiddenStore, store_bytes
from mole.registry import BACKBONES, DATASETS, LIBRARIES, OPTIMIZERS, ROUTERS, SCHEDULES, TRACKERS, config_dataclass
from mole.routers import StaticRouter
from mole.routing.log import RoutingLog
from mole.routing.losses import On, Over, check_losses
from mole.routing.statistics import RoutingStatistics
from mole.run_folder import RunFolder
from mole.training import AnyTraining, FitResult, fit, make_accelerator
from mole.training.metrics import MetricsFile

logger = logging.getLogger(__name__)
Collate = Callable[[list[Sample]], dict[str, Any]]


@config_dataclass
class MixingConfig:
    """What is done with the experts: the fields of `MixtureOptions` but for the kernel and the heads, and `explode`,
    see mole/mixtures/exploding.py. `modules_to_save` auto: train where the data asks for a head, else error.
    """

    modules_to_save: str = "auto"
    pooled_gate: Literal["auto", "first", "last", "mean"] = "auto"
    expert_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    expert_dropout: Literal["auto", "off", "shared", "independent"] = "auto"
    gate_lora_bias: bool = True
    scaling_pass_dropout: bool = False
    explode: Literal["rank_one"] | None = None


@config_dataclass
class BuildMoe:
    """Experts, a router, and what trains it."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    library: LIBRARIES.union()  # type: ignore[valid-type]
    router: ROUTERS.union()  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    training: AnyTraining
    optimizer: OPTIMIZERS.union()  # type: ignore[valid-type]
    schedule: SCHEDULES.union()  # type: ignore[valid-type]
    tracker: TRACKERS.union()  # type: ignore[valid-type]
    launcher: LauncherConfig
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    name: str = "mixture"
    start_from: str | None = None
    experts: tuple[str, ...] | dict[str, str] | str | None = None
    train: Literal["router", "experts", "both"] = "router"
    kernel: Literal["auto", "loop", "stacked", "grouped", "segments", "folded"] = "auto"
    mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
    allow_other_backbone: bool = False
    dry_run: bool = False
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    losses_over: Over = "microbatch"
    losses_on: On = "valid"
    free_bits: Annotated[float, Field(ge=0, le=1)] = 0.0
    keep_hidden_states: Literal["float32", "bfloat16"] | None = None
    log_every: Annotated[int, Field(ge=1)] | None = 20
    log_examples: Annotated[int, Field(ge=0)] = 16
    statistics_every: Annotated[int, Field(ge=1)] | None = 5
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        if (self.learns or needs_data(self.router)) and not self.datasets:
            chosen_datasets(self)
        refuse_resuming(self)
        if self.dry_run and not self.learns:
            raise ValueError(f"dry_run rehearses training, and router={self.router.name} learns nothing: leave it out")
        check_losses(self.losses)
        if self.free_bits and "mutual_information" not in self.losses:
            raise ValueError("free_bits is a limit of the loss mutual_information: set losses.mutual_information")
        if self.losses and not ROUTERS[self.router.name].implementation.learned:  # type: ignore[attr-defined]
            raise ValueError(
                f"losses: router={self.router.name} learns nothing: leave them out, or choose another router"
            )
        if self.start_from is not None and isinstance(self.experts, str | dict):
            raise ValueError("experts: a mixture that starts from another has its experts; give a list of their names")
        if self.keep_hidden_states is not None:
            self._require_constant_hidden_states()

    def _require_constant_hidden_states(self) -> None:
        """Raises ValueError unless the routing pass gives the same for an example in every epoch."""
        if "hidden_states" not in ROUTERS[self.router.name].implementation.needs:  # type: ignore[attr-defined]
            raise ValueError(f"keep_hidden_states: router={self.router.name} has no routing pass: set it to null")
        if self.router.scaling_pass_value != 0:
            raise ValueError("keep_hidden_states needs a routing pass without experts: set router.scaling_pass_value=0")

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return ROUTERS[self.router.name].implementation.learned or self.train != "router"  # type: ignore[attr-defined]


def run(config: BuildMoe) -> float | None:
    """Builds the mixture, trains it if its router learns, leaves `mixture/` (checked) and the routing log.

    Returns the best validation score; None where nothing was trained.
    """
    run = RunFolder(config.run.folder)
    experts, origins = ({}, continuing.origins_of(config)) if config.start_from else chosen_experts(config)
    chosen = chosen_datasets(config) if config.dataset or config.datasets else {}
    accelerator = make_accelerator(config.training, backbones.resolve_device(config.backbone.device))
    backbone = heads.backbone_for(config, chosen)
    model = _mixture(config, backbone, experts)
    datasets = data.load_many(chosen, backbone.tokenizer, seed=config.seed, context_length=backbone.context_length)
    for router in model.routers().values() if config.learns else ():
        router.check_tasks(list(dict.fromkeys(s.task for one in datasets.values() for s in one.train)), training=True)
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    log = RoutingLog(model.sites, model.expert_names)
    if needs_data(config.router):
        samples = data.joined(datasets.values(), "train")
        kept = kept_in_library(config, experts, backbone)
        run.update(prepared=prepare(model, samples, collate, config.training, accelerator, run, kept=kept))
    if ratios := flatness(model):
        run.update(flatness=ratios)
    result, routers = None, learned.weights_of_routers(model)
    if config.learns or model.trained_modules():
        listener = TrainingForwards(log, config.log_every) if accelerator.is_main_process else None
        model.losses = dict(config.losses)
        model.loss_options = {
            "over": config.losses_over,
            "on": config.losses_on,
            "free_bits": config.free_bits,
        }
        statistics = _statistics(config, model) if accelerator.is_main_process else None
        with listening(model, listener), _keeping(model, config, datasets):
            result = _train(config, model, datasets, backbone, accelerator, run, statistics=statistics)
    else:
        run.update(status="running")
    if accelerator.is_main_process and not config.dry_run:
        with observing(model) as seen:
            _log_examples(model, datasets, collate, log, config)
        if result is None and (told := mixtures.own_statistics(model) | seen.read()):
            MetricsFile(run.metrics).write(step=0, phase="evaluation", **told)
        if len(log):
            log.flush(run.scalings / "log", overwrite=True, decode=partial(texts_of, backbone.tokenizer))
        held_out = data.joined(datasets.values(), "validation")
        found = heads.finish(model, held_out, collate, config, backbone, datasets, run)
        parts = {name: expert.card.license for name, expert in experts.items()}
        facts = licences.facts(parts or continuing.licences_of(config))
        facts |= {"head": heads.head_fact(backbone.head), "origins": origins}
        config_of_scores = heads.measured_on(held_out)
        facts["scores"] = heads.score_rows(found, None, "+".join(datasets), len(held_out), config_of_scores)
        _keep(config, run, model, backbone, facts, _some_batch(model, datasets, collate), result, routers=routers)
        if result is not None:
            run.update(result=dataclasses.asdict(result))
        if run.scalings.is_dir():
            draw(run)
    return result.best_score if result else None


@contextmanager
def _keeping(model: MultiExpertModel, config: BuildMoe, datasets: dict[str, DataSplits]) -> Iterator[None]:
    """Inside the body the routing pass of each training example is computed once, if the config says so."""
    if config.keep_hidden_states is None:
        yield
        return
    lengths = [len(sample.input_ids) for splits in datasets.values() for sample in splits.train]
    size = store_bytes(lengths, model.shape.hidden_size, config.keep_hidden_states)
    logger.info("hidden states: up to %.2f GiB in %s", size / 2**30, config.run.folder)
    store = HiddenStore(Path(config.run.folder), config.keep_hidden_states)
    model.hidden_store = store
    try:
        yield
    finally:
        model.hidden_store = None
        store.close()


def _mixture(config: BuildMoe, backbone: Backbone, experts: dict[str, Expert]) -> MultiExpertModel:
    """The mixture of `experts` with a router at its seeded start, or that of `start_from` with all it has learned."""
    if config.start_from is not None:
        parts = continuing.parts_of(config, backbone)
    mixing = dict(vars(config.mixing))
    if mixing["modules_to_save"] == "auto":
        mixing["modules_to_save"] = "train" if backbone.head else "error"
    if backbone.head and mixing["modules_to_save"].startswith("train"):
        mixing["heads"] = backbone.trained_along()
    if (name := mixing["modules_to_save"].partition(":")[2]) in experts:
        heads.check_head(f"expert {name!r}", experts[name].card, backbone.head)
    mixing |= {"kernel": config.kernel, "train": config.train if config.learns else "none"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("init", config.seed))
        if config.start_from is not None:
            model = continuing.mixture_of_parts(config, parts, mixing)
        else:
            other = config.allow_other_backbone
            model = mixtures.mixture_of(experts, backbone, config.router, allow_other_backbone=other, **mixing)
    if model.trained_modules() and not config.learns:  # the head alone
        model.set_trainable(config.train)
    return model


def _train(
    config: BuildMoe,
    model: MultiExpertModel,
    datasets: dict[str, DataSplits],
    backbone: Backbone,
    accelerator: Any,
    run: RunFolder,
    *,
    statistics: RoutingStatistics | None,
) -> FitResult | None:
    train, held_out = (data.joined(datasets.values(), split) for split in ("train", "validation"))
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    fed = training_data(train, backbone.tokenizer.pad_token_id, config.training, config.seed, model)
    if accelerator.is_main_process:
        show_first_batch(fed, config.training, backbone.tokenizer, run)
        tell_bound(model, config, len(fed.train))
    if config.dry_run:
        return dry_run(model, fed, config.training, accelerator) if accelerator.is_main_process else None
    validation = None
    if held_out:
        limit = config.training.validation_examples
        validation = heads.validation_for(model, held_out, collate, config, backbone, datasets, limit=limit)
    looked_at = sampled(validation, model, backbone.tokenizer, config.training, run, accelerator.is_main_process)
    with weights_logged(model, config, run, len(fed.train)) as watch:
        return fit(
            model,
            fed,
            config,
            run,
            accelerator=accelerator,
            seed=config.seed,
            evaluate=looked_at,
            extras=lambda: mixtures.own_statistics(model) | (statistics.read() if statistics else {}),
            watch=watch,
            resume=config.run.resume == "auto",
        )


def _statistics(config: BuildMoe, model: MultiExpertModel) -> RoutingStatistics | None:
    """What listens to the training forwards, and speaks up at every logged step."""
    if config.statistics_every is None:
        return None
    found = RoutingStatistics(
        model.sites,
        model.expert_names,
        model.shape.expert_tasks,
        every=config.statistics_every,
        warns=not isinstance(model.router, StaticRouter),
    )
    model.observers.append(found)
    return found


def _log_examples(
    model: MultiExpertModel, datasets: dict[str, DataSplits], collate: Collate, log: RoutingLog, config: BuildMoe
) -> None:
    """The routing of the first validation examples of each dataset, as the finished mixture routes them."""
    for splits in datasets.values():
        examples = list((splits.validation or splits.train)[: config.log_examples])
        if examples:
            with listening(model, log):
                mean_loss(model, examples, collate, batch_size=config.training.batch_size)


def _keep(
    config: BuildMoe,
    run: RunFolder,
    model: MultiExpertModel,
    backbone: Backbone,
    facts: dict[str, Any],
    batch: dict[str, Any],
    result: FitResult | None,
    *,
    routers: dict[str, Tensor],
) -> None:
    """Writes `mixture/` and checks that it gives what was built, and that training changed the routers.

    `routers` holds their weights at the start. What is not sound is left as `mixture.rejected/`.
    """
    training = {"seed": config.seed}
    if result is not None:
        training |= {"steps": result.steps, "tokens": result.tokens, "learning_rate": config.training.learning_rate}
    mixtures.save_mixture(
        model,
        run.mixture,
        backbone,
        replace=config.run.resume == "auto",
        training=training,
        **facts,
    )
    chosen = chosen_datasets(config) if config.dataset or config.datasets else {}
    again = heads.backbone_for(config, chosen)
    fresh = mixtures.load_mixture(run.mixture, again, kernel=config.kernel, allow_other_backbone=True)
    try:
        if result is not None:
            learned.check_routers(routers, learned.weights_of_routers(model))
        check_reloaded(model, fresh, batch)
    except ValueError:
        learned.reject(run.mixture)
        raise


def _some_batch(model: MultiExpertModel, datasets: dict[str, DataSplits], collate: Collate) -> dict[str, Any]:
    """A few examples to compare logits on; a row of token ids where no dataset was given."""
    for splits in datasets.values():
        return collate(list(splits.train[:4]))
    ids = torch.arange(4)[None]
    return {"input_ids": ids, "prompt_mask": ids >= 0, "task_names": list(_some_task(model)), "texts": [""]}


def _some_task(model: MultiExpertModel) -> tuple[str, ...]:
    return next((tasks[:1] for tasks in model.shape.expert_tasks if tasks), ("",))
