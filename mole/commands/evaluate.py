"""`mole evaluate`: a table of tasks × the backbone, each expert, their uniform mixture, the oracle, and the mixture."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console

from mole import data, mixtures
from mole.backbones import Backbone
from mole.commands import heads
from mole.commands.library.opening import open_library
from mole.commands.listening import observing
from mole.commands.moe_models import on_its_backbone, open_any, without_blocks
from mole.config.nodes import RunConfig, chosen_datasets
from mole.data import DataSplits, Sample
from mole.evaluation import Table, exact_match, mean_loss, predict, scores, total, write_predictions
from mole.experts import ExpertLibrary
from mole.experts.scores import with_score
from mole.mixtures import MultiExpertModel
from mole.moe import MoEModel
from mole.registry import BACKBONES, DATASETS, config_dataclass
from mole.routers import TaskConfig, TaskRouter, UniformConfig, UniformRouter
from mole.run_folder import RunFolder, write_atomically

Row = Literal["base", "experts", "uniform", "oracle", "mixture"]
Model = MultiExpertModel | MoEModel
Routed = Callable[[], AbstractContextManager[Any]]


@config_dataclass
class Evaluate:
    """What is compared, on what, by which metric."""

    backbone: BACKBONES.union()  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    datasets: dict[str, DATASETS.union()] = dataclasses.field(default_factory=dict)  # type: ignore[valid-type]
    model: str
    name: str = "evaluation"
    rows: tuple[Row, ...] | None = None
    metric: Literal["auto", "loss", "exact_match", "score"] = "auto"
    split: Literal["train", "validation", "test"] = "test"
    batch_size: Annotated[int, Field(ge=1)] = 64
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    allow_other_backbone: bool = False
    publish_scores: bool = False
    seed: int = 0
    run: RunConfig

    def __post_init__(self):
        chosen_datasets(self)
        if self.publish_scores and self.rows is not None and "experts" not in self.rows:
            raise ValueError("publish_scores writes scores of experts: take them into rows, or leave rows=null")


def run(config: Evaluate) -> float | None:
    """Evaluates every row on every dataset; prints the table, writes evaluation.json, table.md and table.csv.

    evaluation.json has statistics of a mixture's routing over these datasets under `routing`. A run that was stopped
    goes on with the first score it lacks. Returns the mean of the last row.
    """
    run, config = RunFolder(config.run.folder), on_its_backbone(config)
    backbone = heads.backbone_for(config, chosen_datasets(config))
    cards = mixtures.cards_at(config.model) if mixtures.blocks_in(config.model) is None else {}
    for name, card in cards.items():
        heads.check_head(name, card, backbone.head)
    model = open_any(config.model, backbone, allow_other_backbone=config.allow_other_backbone)
    library = _library(config, model) if config.publish_scores else None
    datasets = data.load_many(
        chosen_datasets(config), backbone.tokenizer, seed=config.seed, context_length=backbone.context_length
    )
    splits = {name: _samples(name, one, config) for name, one in datasets.items()}
    metric = _metric(config, backbone, datasets)
    compared = dict(_rows(model, config, splits, with_base=backbone.head is None))
    known = dict(Table.read(run.cells).rows) if config.run.resume == "auto" and run.cells.is_file() else {}
    run.update(status="running")
    rows: dict[str, dict[str, float]] = {}
    routing: dict[str, Any] = {}
    for row, routed in compared.items():
        rows[row] = dict(known.get(row, {}))
        if row == "mixture" and rows[row]:
            rows[row] = {}  # its routing is told of all data, or of none
        with routed(), observing(model) if row == "mixture" else nullcontext() as seen:
            for name, samples in splits.items():
                if name not in rows[row] and (row != "oracle" or _all_have_experts(model, samples)):
                    rows[row][name] = _score(model, samples, backbone, config, metric)
                    write_atomically(run.cells, Table(metric, rows).as_json())
        if seen is not None:
            own = {} if isinstance(model, MoEModel) else mixtures.own_statistics(model)
            routing = own | seen.read()
    table = Table(metric, rows, routing=routing)
    table.write(run)
    run.cells.unlink(missing_ok=True)
    Console().print(table.rendered())
    if backbone.head is not None:
        _keep_predictions(model, compared, splits, backbone, config, run)
    if library is not None:
        _publish(library, table, model.expert_names, splits, config, backbone)
    return table.mean(list(rows)[-1])


def _metric(config: Evaluate, backbone: Backbone, datasets: Mapping[str, DataSplits]) -> str:
    """What is measured, by its own name: of `score` that of the data's main score.

    Raises ValueError for one that the data has not.
    """
    if config.metric == "loss" or (config.metric == "auto" and backbone.head is None):
        return "loss"
    if (config.metric == "exact_match") != (backbone.head is None):
        wanted = "loss or exact_match" if backbone.head is None else "loss or score"
        raise ValueError(f"metric={config.metric} does not go with this data: use {wanted}")
    return config.metric if backbone.head is None else str(data.metric_of(datasets.values()))


def _keep_predictions(
    model: Model,
    rows: Mapping[str, Routed],
    splits: Mapping[str, Sequence[Sample]],
    backbone: Backbone,
    config: Evaluate,
    run: RunFolder,
) -> None:
    """predictions.jsonl: what the last row says of every text."""
    assert backbone.head is not None
    samples = [sample for part in splits.values() for sample in part]
    collate = partial(data.collate, pad_token_id=backbone.tokenizer.pad_token_id)
    with list(rows.values())[-1]():
        logits = predict(model, samples, collate, batch_size=config.batch_size)
    write_predictions(run.predictions, samples, logits, backbone.head)


def _library(config: Evaluate, model: Model) -> ExpertLibrary:
    """The library that `model` is. Raises ValueError if it is none, LibraryError if it cannot be written."""
    if isinstance(model, MoEModel):
        raise ValueError(f"publish_scores: {config.model} has blocks of mole moefy and no experts: leave it out")
    library = open_library(config.model)
    if not library.exists() or not set(model.expert_names) <= set(library.names()):
        raise ValueError(
            f"publish_scores: {config.model} is no library; give one as the model, or leave the scores out"
        )
    library.check_writable()
    return library


def _publish(
    library: ExpertLibrary,
    table: Table,
    names: Sequence[str],
    splits: Mapping[str, Sequence[Sample]],
    config: Evaluate,
    backbone: Backbone,
) -> None:
    """Each expert's scores into its card, all in one batch; one of the same metric, task, split and config is replaced.

    `config` is the digest of what a score depended on: the samples, the backbone, the length of what was written.
    """
    facts = {"metric": table.metric, "split": config.split, "higher_is_better": table.higher_is_better}
    on = [backbone.name, backbone.revision, config.max_new_tokens if table.metric == "exact_match" else None]
    digests = {name: heads.measured_on(samples, *on) for name, samples in splits.items()}
    with library.batch(f"{table.metric} on {', '.join(splits)}") as batch:
        for name in names:
            card = library.card(name)
            rows: Sequence[Mapping[str, Any]] = card.scores
            for dataset, samples in splits.items():
                value = table.rows[name][dataset]
                if math.isfinite(value):
                    one = {**facts, "value": value, "task": dataset, "dataset": dataset, "examples": len(samples)}
                    one["config"] = digests[dataset]
                    rows = with_score(rows, one)
            batch.edit_card(name, expect=card.revision, scores=list(rows))
    print(f"{len(names)} cards of {library.url} have the scores")


def _samples(name: str, splits: DataSplits, config: Evaluate) -> Sequence[Sample]:
    samples = getattr(splits, config.split)
    if not samples:
        known = [split for split in ("train", "validation", "test") if getattr(splits, split)]
        raise ValueError(f"dataset {name} has no {config.split} split: choose split={' or '.join(known)}")
    return data.spread(samples, config.limit)


def _rows(
    model: Model, config: Evaluate, splits: Mapping[str, Sequence[Sample]], *, with_base: bool
) -> Iterator[tuple[str, Routed]]:
    """Row name → the context in which the model is that row. Raises ValueError for rows that this model cannot give.

    Under a head the backbone by itself says nothing: there is no row for it then (`with_base` False). The oracle needs
    a dataset of whose tasks there are experts; of the others it has no score.
    """
    wanted = config.rows
    if isinstance(model, MoEModel):
        for row in _chosen_rows(["base", "mixture"] if with_base else ["mixture"], wanted):
            yield row, nullcontext if row == "mixture" else partial(without_blocks, model, config.backbone)
        return
    several = len(model.expert_names) > 1
    can: list[str] = ["base", "experts"] if with_base else ["experts"]
    if several:
        can += ["uniform", *(["oracle"] if any(_all_have_experts(model, s) for s in splits.values()) else [])]
        can += ["mixture"] if model.router_config.name != "uniform" else []
    for row in _chosen_rows(can, wanted):
        if row == "base":
            yield "base", model.experts_off
        elif row == "experts":
            for name in model.expert_names:
                yield name, partial(model.fixed_routing, {name: 1.0})
        elif row == "uniform":
            yield "uniform", partial(model.routed_by, UniformRouter(UniformConfig(), model.shape))
        elif row == "oracle":
            yield "oracle", partial(model.routed_by, TaskRouter(TaskConfig(ambiguous="mean"), model.shape))
        else:
            _check_tasks(model, splits)
            yield "mixture", nullcontext


def _all_have_experts(model: Model, samples: Sequence[Sample]) -> bool:
    """Whether each sample is of a task that an expert lists."""
    known = set() if isinstance(model, MoEModel) else set().union(*model.shape.expert_tasks)
    return all(sample.task in known for sample in samples)


def _check_tasks(model: MultiExpertModel, splits: Mapping[str, Sequence[Sample]]) -> None:
    """Raises ValueError if the mixture's router goes by tasks, and the data has one that it cannot route."""
    tasks = list(dict.fromkeys(sample.task for samples in splits.values() for sample in samples))
    for router in model.routers().values():
        try:
            router.check_tasks(tasks, training=False)
        except ValueError as error:
            raise ValueError(
                f"{error} when the mixture is built; or leave its row out here: rows=[base,experts,uniform]"
            ) from None


def _chosen_rows(can: Sequence[str], wanted: Sequence[Row] | None) -> list[str]:
    """Those of the rows that this model can give which are wanted. Raises ValueError for one that it cannot."""
    for row in wanted or ():
        if row not in can:
            raise ValueError(f"rows: this model has no row {row!r} (it has {', '.join(can)})")
    return [row for row in can if wanted is None or row in wanted]


def _score(model: Model, samples: Sequence[Sample], backbone: Backbone, config: Evaluate, metric: str) -> float:
    tokenizer = backbone.tokenizer
    collate = partial(data.collate, pad_token_id=tokenizer.pad_token_id)
    if metric not in ("loss", "exact_match"):
        assert backbone.head is not None
        logits = predict(model, samples, collate, batch_size=config.batch_size)
        return scores(metric, backbone.head, logits, [sample.target for sample in samples])["score"]
    if metric == "loss":
        return total(mean_loss(model, samples, collate, batch_size=config.batch_size).values()).loss
    return exact_match(
        model,
        samples,
        tokenizer,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        inputs=lambda chosen: {
            "task_names": [sample.task for sample in chosen],
            "texts": [sample.prompt for sample in chosen],
        },
    )
