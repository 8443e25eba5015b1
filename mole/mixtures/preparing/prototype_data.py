"""Prepare routers from data of the experts' tasks: average activations, calibration, token counts, texts.

What needs training (PHATGOOSE's gates, a text classifier) is prepared by the commands; see commands/preparing.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mole.data import Sample, spread
from mole.mixtures.preparing.activations import mean_inputs, norm_statistics
from mole.mixtures.preparing.kept import KeptPrototypes, routed
from mole.registry import ROUTERS
from mole.routers import PrototypeRouter
from mole.routers.arrow import LowRankRouter
from mole.routers.predictor import mean_direction

CALIBRATION_SAMPLES = 64
FLAT = 0.9
logger = logging.getLogger(__name__)


def needs_data(config: Any) -> bool:
    """Whether a router of this config means nothing before it has seen data."""
    needs = ROUTERS[config.name].implementation.needs  # type: ignore[attr-defined]
    return "prototypes" in needs or getattr(config, "calibrate", "") == "zscore" or getattr(config, "balanced", False)


def samples_of(model: Any, samples: Iterable[Sample], experts: Sequence[str]) -> dict[str, list[Sample]]:
    """Expert → the samples whose task its card lists. Raises ValueError for an expert that has none."""
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    found = {}
    for name in experts:
        tasks = model.shape.expert_tasks[model.shape.expert_names.index(name)]
        found[name] = [sample for task in dict.fromkeys(tasks) for sample in by_task.get(task, ())]
        if not found[name]:
            listed = f"lists {', '.join(tasks)}" if tasks else "lists no task"
            raise ValueError(
                f"router={model.router_config.name} is made from data of each expert's tasks, and there is none for "
                f"{name!r}, whose card {listed} (the data has: {', '.join(by_task) or 'nothing'}): add a dataset of "
                "that task, or leave the expert out"
            )
    return found


def unprepared(model: Any) -> tuple[str, ...]:
    """The experts that some router has no prototype of, in the mixture's order."""
    routers: Iterable[Any] = model.routers().values()
    present = torch.stack([router.present.cpu() for router in routers if isinstance(router, PrototypeRouter)])
    return tuple(name for name, has in zip(model.expert_names, present.all(0).tolist(), strict=True) if not has)


def flatness(model: Any) -> dict[str, float]:
    """Expert → the mean over routers of σ₂ / σ₁ of its update: near 1 a single direction says little about it.

    Empty for routers that go by something else. Logs the experts above `FLAT`.
    """
    routers = [router for router in model.routers().values() if isinstance(router, LowRankRouter)]
    found = {}
    for index, name in enumerate(model.expert_names):
        ratios = [float(router.flatness[index]) for router in routers if router.present[index]]
        if ratios:
            found[name] = sum(ratios) / len(ratios)
    flat = [name for name, ratio in found.items() if ratio > FLAT]
    if flat and model.router_config.name == "arrow":
        logger.info(
            "%s: the second direction of the update is nearly as strong as the first, so that Arrow's prototype is "
            "weak; router=spectral goes by all directions",
            ", ".join(flat),
        )
    return found


def prepare_average_activations(
    model: Any, samples: Sequence[Sample], kept: KeptPrototypes | None = None
) -> dict[str, Any]:
    """Gives every router the mean inputs of the experts that it knows nothing of; returns the samples used by each.

    What `kept` has of the same expert and samples is not computed again.
    """
    config, used = model.router_config, {}
    for name, own in samples_of(model, samples, unprepared(model)).items():
        chosen = _some_of_each_task(own, config.max_samples)
        how = {"pool": config.pool, "expert": name if config.with_expert else None}
        compute = partial(mean_inputs, model, chosen, **how)
        on = {"pool": config.pool, "with_expert": config.with_expert, "routed": routed(model)}
        found = compute() if kept is None else kept.get("average_activation", name, chosen, on, compute)
        give_prototypes(model, name, found)
        used[name] = len(chosen)
    return {"samples": used}


def give_prototypes(model: Any, expert: str, found: Mapping[str, Tensor]) -> None:
    """Path of a routed module → the prototype [d] of that expert there."""
    index = model.expert_names.index(expert)
    for site, vector in found.items():
        model.routers()[site].take_prototypes({index: vector})


def prepare_calibration(model: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Gives `spectral` routers the mean and spread of each expert's norms over samples of all tasks."""
    chosen = spread(list(samples), CALIBRATION_SAMPLES)
    for site, statistics in norm_statistics(model, chosen).items():
        model.routers()[site].take_calibration(statistics)
    return {"samples": len(chosen)}


def prepare_token_counts(model: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Gives a `hash` router the counts of all tokens of the samples, unless it has a table."""
    if not samples:
        raise ValueError("router.balanced=true: there are no samples to count the tokens of")
    if len(model.router.table):
        return {}
    counts = Counter(token for sample in samples for token in sample.input_ids)
    model.router.take_counts(counts, model.config.get_text_config().vocab_size)
    return {"tokens": sum(counts.values()), "distinct": len(counts)}


def prepare_texts(model: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Gives a `predictor` the embeddings of texts of the tasks that it does not know; returns them, by task.

    A sample's text is its prompt, or what it holds where it has none. Raises ValueError for a task without samples.
    """
    router: Any = model.router
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    missing = router.missing()
    for task in missing:
        if task not in by_task:
            owners = [n for n, tasks in zip(model.expert_names, model.shape.expert_tasks, strict=True) if task in tasks]
            raise ValueError(
                f"router=predictor: there is no text of the task {task!r} of {', '.join(owners)} (the data has: "
                f"{', '.join(by_task) or 'nothing'}): add a dataset of that task"
            )
    chosen = {task: spread(by_task[task], router.config.examples_per_expert) for task in missing}
    router.learn_frequencies([text_of(sample) for own in chosen.values() for sample in own])
    found = {task: _embedded(model, own) for task, own in chosen.items()}
    if found:
        router.take_examples(found)
    return found


def text_of(sample: Sample) -> str:
    """The prompt; of a sample without one, what it completes to."""
    return sample.prompt if sample.prompt.strip() else sample.completion


def _embedded(model: Any, samples: Sequence[Sample]) -> Tensor:
    """→ [N, D] of length 1."""
    router: Any = model.router
    if router.config.encoder != "backbone":
        return router.embedded([text_of(sample) for sample in samples])
    table = model.backbone.get_input_embeddings().weight.detach()
    rows = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids if sample.prompt.strip() else sample.input_ids], device=table.device)
        rows.append(mean_direction(table[ids], torch.ones_like(ids, dtype=torch.bool)))
    return torch.cat(rows)


def _some_of_each_task(samples: Sequence[Sample], limit: int) -> list[Sample]:
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    return [sample for own in by_task.values() for sample in spread(own, limit)]
