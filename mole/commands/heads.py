"""What commands do where data is to be classified: a backbone under the head that it asks for, scores, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mole import backbones, data
from mole.backbones import Backbone
from mole.config.seeds import seed_for
from mole.data import DataSplits, Sample
from mole.evaluation import HIGHER_IS_BETTER, Validation, predict, write_predictions
from mole.experts import Card, LibraryError
from mole.experts.card import digest_of
from mole.head import Head
from mole.run_folder import RunFolder

Collate = Callable[[list[Sample]], dict[str, Any]]


def backbone_for(config: Any, datasets: Mapping[str, Any]) -> Backbone:
    """The backbone of a command's config, with a new head, made by the run's seed, if `datasets` (configs) want one."""
    head = data.head_of(dict(datasets)) if datasets else None
    return backbones.load(config.backbone, head=head, seed=seed_for("head", config.seed))


def validation_for(
    model: Any,
    samples: Sequence[Sample],
    collate: Collate,
    config: Any,
    backbone: Backbone,
    datasets: Mapping[str, DataSplits],
    *,
    limit: int | None = None,
) -> Validation:
    """What training looks at: the loss, and where the backbone has a head the scores that its data names."""
    metric = data.metric_of(datasets.values()) if backbone.head else None
    size = config.training.batch_size
    return Validation(model, samples, collate, size, head=backbone.head, metric=metric, limit=limit)


def finish(
    model: Any,
    samples: Sequence[Sample],
    collate: Collate,
    config: Any,
    backbone: Backbone,
    datasets: Mapping[str, DataSplits],
    run: RunFolder,
) -> dict[str, float]:
    """Scores of the finished model on all validation samples, by name, the main one first; leaves predictions.jsonl.

    Nothing without a head.
    """
    if backbone.head is None or not samples:
        return {}
    logits = predict(model, samples, collate, batch_size=config.training.batch_size)
    write_predictions(run.predictions, samples, logits, backbone.head)
    whole = validation_for(model, samples, collate, config, backbone, datasets)
    found = {n.removeprefix("validation_"): value for n, value in whole.scored(logits, backbone.head).items()}
    run.update(validation=found)
    main = str(data.metric_of(datasets.values()))
    return {main: found["score"], **{name: value for name, value in found.items() if name not in (main, "score")}}


def head_fact(head: Head | None) -> dict[str, Any] | None:
    """A head as a card tells of it."""
    return None if head is None else {"type": head.kind, "labels": list(head.labels)}


def measured_on(samples: Sequence[Sample], *more: Any) -> str:
    """The digest that a row of scores has as its `config`: of the samples, and of what else the score depended on."""
    return digest_of([[[list(s.input_ids), list(s.labels), s.target] for s in samples], *more])[:16]


def score_rows(
    found: Mapping[str, float], task: str | None, dataset: str, examples: int, config: str | None = None
) -> list[dict[str, Any]]:
    """Scores on the validation samples as rows of a card; those of single tasks are left out.

    `config` is what `measured_on` gives.
    """
    return [
        {
            "metric": name,
            "value": value,
            "task": task,
            "dataset": dataset,
            "split": "validation",
            "examples": examples,
            "higher_is_better": HIGHER_IS_BETTER[name],
            "config": config,
        }
        for name, value in found.items()
        if name in HIGHER_IS_BETTER
    ]


def check_head(name: str, card: Card, head: Head | None) -> None:
    """Raises LibraryError unless the head that came with `name` says what the data asks for."""
    if card.head is None:
        return
    if head is None:
        raise LibraryError(
            f"{name} has a head for {card.head['type']} ({', '.join(card.head['labels']) or 'a number'}), and no data "
            "to classify was given: choose such a dataset"
        )
    if head_fact(head) != card.head:
        wanted = ", ".join(head.labels) or "a number"
        raise LibraryError(
            f"{name} has a head for {', '.join(card.head['labels']) or 'a number'}, and the data asks for {wanted}: "
            "labels and their order have to be the same"
        )
