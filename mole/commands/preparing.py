"""Prepare a router from data of the experts' tasks before the mixture is used or trained: what needs training, by
the one loop; the rest is in mixtures/preparing/prototype_data.py.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mole.backbones import Backbone
from mole.commands.library.opening import library_of
from mole.config.seeds import seed_for
from mole.data import IGNORED, Sample, epoch_order, spread
from mole.evaluation import mean_loss, total
from mole.experts import Expert
from mole.experts.card import digest_of
from mole.mixtures import MultiExpertModel
from mole.mixtures.preparing.gating import MeanGate, gated
from mole.mixtures.preparing.kept import KeptPrototypes, routed
from mole.mixtures.preparing.prototype_data import (
    give_prototypes,
    prepare_average_activations,
    prepare_calibration,
    prepare_texts,
    prepare_token_counts,
    samples_of,
    unprepared,
)
from mole.routers.text_encoders import TextClassifier
from mole.run_folder import RunFolder
from mole.training import Recipe, TrainingConfig, TrainingData, fit
from mole.training.schedules import LinearConfig

logger = logging.getLogger(__name__)
LOOKED_AT = 32  # samples of each expert that its gates are judged by, before and after
Collate = Callable[[list[Sample]], dict[str, Any]]


def prepare(
    model: MultiExpertModel,
    samples: Sequence[Sample],
    collate: Collate,
    training: TrainingConfig,
    accelerator: Any,
    run: RunFolder,
    *,
    kept: KeptPrototypes | None = None,
) -> dict[str, Any]:
    """Gives the model's routers what they are made of, for the experts that they do not know yet; returns facts of it.

    `training` says how to compute (precision, clipping, checkpointing), not how long. `kept`: where gates and average
    activations are looked for and stored; several processes make them anew, as each could find something else there.
    Raises ValueError for an expert of whose tasks there is no sample.
    """
    config = model.router_config
    if kept is not None and accelerator.num_processes > 1:
        kept = None
    if config.name == "phatgoose":
        return _train_gates(model, samples, collate, training, accelerator, run, kept)
    if config.name == "average_activation":
        return prepare_average_activations(model, samples, kept)
    if config.name == "predictor":
        texts = prepare_texts(model, samples)
        if config.head == "classifier" and texts:
            return _train_classifier(model, texts, training, accelerator, run)
        return {"texts": {task: len(vectors) for task, vectors in texts.items()}}
    if config.name == "hash":
        return prepare_token_counts(model, samples)
    return prepare_calibration(model, samples)


def kept_in_library(config: Any, experts: Mapping[str, Expert], backbone: Backbone) -> KeptPrototypes | None:
    """The library that all of `experts` are of; None for experts from other places."""
    if config.start_from or not (config.experts is None or isinstance(config.experts, tuple)):
        return None
    cards = {name: expert.card for name, expert in experts.items()}
    return KeptPrototypes(
        library_of(config.library), cards, digest_of([backbone.name, backbone.revision, backbone.shapes])
    )


def _train_gates(
    model: MultiExpertModel,
    samples: Sequence[Sample],
    collate: Collate,
    training: TrainingConfig,
    accelerator: Any,
    run: RunFolder,
    kept: KeptPrototypes | None,
) -> dict[str, Any]:
    """PHATGOOSE: each expert alone and unchanged, on its own data; → loss and mean gate before and after.

    Gates that `kept` has already are not trained, and nothing but their samples is told of them.
    """
    config, facts = model.router_config, {}
    recipe = _recipe(training, config.gate_steps, config.gate_batch, config.gate_lr, config.gate_warmup)
    on = {key: getattr(config, key) for key in ("gate_steps", "gate_lr", "gate_warmup", "gate_batch", "seed")}
    on |= {"precision": training.precision, "clip_norm": training.clip_norm, "routed": routed(model)}
    for name, own in samples_of(model, samples, unprepared(model)).items():
        facts[name] = {"samples": len(own)}
        data = TrainingData(own, collate, _orders(len(own), config.seed))
        place = RunFolder(run.preparing / name)
        compute = partial(_gates, model, name, data, recipe, accelerator, place, facts[name])
        give_prototypes(model, name, compute() if kept is None else kept.get("phatgoose", name, own, on, compute))
        if "after" not in facts[name]:
            logger.info("gates of %s: as they are kept in the library", name)
    return {"gates": facts}


def _gates(
    model: MultiExpertModel,
    name: str,
    data: TrainingData,
    recipe: Recipe,
    accelerator: Any,
    run: RunFolder,
    facts: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Path of a routed module → the gate of that expert there, trained; tells `facts` of it."""
    config = model.router_config
    looked_at = spread(list(data.train), LOOKED_AT)
    with gated(model, name) as gates:
        if not any(gate.v.requires_grad for gate in gates.values()):
            raise ValueError(f"router=phatgoose: {name!r} adapts no module that a gate can stand before")
        before = _judged(model, name, looked_at, data.collate, config.gate_batch)
        _fit(model, data, recipe, run, accelerator, config.seed)
        after = _judged(model, name, looked_at, data.collate, config.gate_batch)
        found = {site: gate.v.detach()[0] for site, gate in gates.items() if gate.v.requires_grad}
    facts |= {"before": before, "after": after}
    logger.info("gates of %s: loss %.4g → %.4g", name, before["loss"], after["loss"])
    return found


def _judged(
    model: MultiExpertModel, name: str, samples: Sequence[Sample], collate: Collate, batch_size: int
) -> dict[str, float]:
    """The loss on these samples in nats per token, and the mean gate over their tokens and its modules."""
    index = model.expert_names.index(name)
    gate = MeanGate(site for site, layer in model.layers.items() if index in layer.bank.present)
    listeners, observers = model.listeners, model.observers
    model.listeners, model.observers = [], [gate]
    try:
        loss = total(mean_loss(model, samples, collate, batch_size=batch_size).values()).loss
    finally:
        model.listeners, model.observers = listeners, observers
    return {"loss": loss, "mean_gate": gate.mean}


def _train_classifier(
    model: MultiExpertModel, texts: dict[str, torch.Tensor], training: TrainingConfig, accelerator: Any, run: RunFolder
) -> dict[str, Any]:
    """A small network over the embeddings of each task's texts; → its loss and its hits on them."""
    router: Any = model.router
    config = router.config
    rows = [(vector.cpu(), router.tasks.index(task)) for task, vectors in texts.items() for vector in vectors]
    random.Random(config.seed).shuffle(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("init", config.seed))
        classifier = TextClassifier(rows[0][0].shape[-1], config.hidden, len(router.tasks))
    recipe = _recipe(training, config.classifier_steps, min(32, len(rows)), config.classifier_lr, 0.1)
    data = TrainingData(rows, _labelled, _orders(len(rows), config.seed))
    result = _fit(classifier, data, recipe, RunFolder(run.preparing / "classifier"), accelerator, config.seed)
    with torch.no_grad():
        classifier.cpu()
        scores = classifier(torch.stack([vector for vector, _ in rows])).logits[:, 0]
    hits = sum(int(row.argmax()) == label for row, (_, label) in zip(scores, rows, strict=True))
    router.take_classifier(classifier.layers())
    return {"texts": {task: len(vectors) for task, vectors in texts.items()}, "loss": result.loss, "hits": hits}


def _labelled(rows: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """Embeddings [B, D] and labels [B, 2]: the class, as the second token of a sequence."""
    labels = torch.tensor([[IGNORED, label] for _, label in rows])
    return {"embeddings": torch.stack([vector for vector, _ in rows]), "labels": labels}


def _recipe(training: TrainingConfig, steps: int, batch_size: int, rate: float, warmup: float) -> Recipe:
    return Recipe(
        training=TrainingConfig(
            max_steps=steps,
            epochs=None,
            batch_size=batch_size,
            learning_rate=rate,
            clip_norm=training.clip_norm,
            precision=training.precision,
            gradient_checkpointing=False,
            log_every=10,
            evaluate_every=None,
            checkpoint_every=None,
            best_metric=None,
        ),
        schedule=LinearConfig(warmup=warmup),
    )


def _orders(length: int, seed: int) -> Callable[[int], list[int]]:
    return lambda epoch: epoch_order(length, epoch, seed_for("data", seed))


def _fit(model: Any, data: TrainingData, recipe: Recipe, run: RunFolder, accelerator: Any, seed: int) -> Any:
    """A run of its own beside the main one; it leaves its metrics, no checkpoints, and starts anew each time."""
    if accelerator.is_main_process:
        shutil.rmtree(run.path, ignore_errors=True)
        run.path.mkdir(parents=True)
    accelerator.wait_for_everyone()
    result = fit(model, data, recipe, run, accelerator=accelerator, seed=seed)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return result
