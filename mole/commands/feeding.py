"""What training is fed with: the order of the samples, and the first batch as people read it, in samples.jsonl."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mole.config.seeds import seed_for
from mole.data import IGNORED, Sample, by_length, epoch_order
from mole.run_folder import RunFolder, write_atomically
from mole.training import TrainingConfig, TrainingData, plan_layout, rehearse

logger = logging.getLogger(__name__)
SHOWN = 300  # characters of the one sample that is put on the screen
KEPT = 64  # samples of the first batch in samples.jsonl


def training_data(
    train: Sequence[Sample], collate: Callable[[list[Sample]], dict[str, Any]], training: TrainingConfig, seed: int
) -> TrainingData:
    """The samples in their seeded order; with `training.group_by_length` those of like length in one batch."""

    def order(epoch: int) -> list[int]:
        plain = epoch_order(len(train), epoch, seed_for("data", seed))
        return by_length(plain, lengths, training.batch_size) if training.group_by_length else plain

    lengths = [len(sample.input_ids) for sample in train]
    if train:
        logger.info("%.1f %% of what the batches hold is padding", 100 * _padding(order(0), lengths, training))
    return TrainingData(train, collate, order)


def _padding(order: Sequence[int], lengths: Sequence[int], training: TrainingConfig) -> float:
    """The share of padding in the batches of an epoch."""
    size = training.micro_batch_size or training.batch_size
    groups = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(len(group) * max(group) for group in groups)


def show_first_batch(fed: TrainingData, training: TrainingConfig, tokenizer: Any, run: RunFolder) -> None:
    """Writes the samples of the first step to samples.jsonl, decoded, and shows one: what is supervised is marked."""
    first = [fed.train[index] for index in fed.order(0)[: min(training.batch_size, KEPT)]]
    lines = [
        {
            "task": sample.task,
            "tokens": len(sample.input_ids),
            "supervised": sample.supervised,
            **({} if sample.target is None else {"label": sample.completion}),
            "parts": [{"supervised": on, "text": tokenizer.decode(ids)} for on, ids in parts(sample)],
        }
        for sample in first
    ]
    write_atomically(run.samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    label = "" if first[0].target is None else f" → {first[0].completion}"
    print(f"first sample: {_shown(lines[0]['parts'])}{label}")


def refuse_resuming(config: Any) -> None:
    """Raises ValueError for a dry run that would go on with an earlier one."""
    if config.dry_run and config.run.resume != "never":
        raise ValueError("dry_run keeps nothing, so it continues nothing: leave run.resume=never")


def dry_run(model: Any, fed: TrainingData, training: TrainingConfig, accelerator: Any) -> None:
    """A step on the longest sample that leaves no trace; prints what trains, the loss, and the memory of a real one."""
    longest = max(fed.train, key=lambda sample: len(sample.input_ids))
    rows = plan_layout(training, accelerator.num_processes).micro_batch_size
    found = rehearse(model, fed.collate([longest]), training, accelerator, rows)
    length = len(longest.input_ids)
    lines = (
        f"trains {found.trained:,} of {found.parameters:,} parameters ({found.trained / found.parameters:.2%})",
        f"loss {found.loss:.4f} per supervised token of the longest sample, {length:,} tokens",
        f"memory of a step on each device: weights {_size(found.weights)}, gradients and moments "
        f"{_size(found.optimizer)}, {rows} × {length:,} tokens for backward {_size(found.activations)}; together "
        f"{_size(found.total)}, and what PyTorch keeps for itself",
        "dry run: nothing was trained, nothing is kept",
    )
    print("\n".join(lines))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def parts(sample: Sample) -> list[tuple[bool, list[int]]]:
    """The sample's ids in stretches that are supervised (True) or not; the first token of a sequence never is."""
    found: list[tuple[bool, list[int]]] = []
    for place, (token, label) in enumerate(zip(sample.input_ids, sample.labels, strict=True)):
        is_on = place > 0 and label != IGNORED
        if not found or found[-1][0] != is_on:
            found.append((is_on, []))
        found[-1][1].append(token)
    return found


def _shown(stretches: list[dict[str, Any]]) -> str:
    """One line; supervised text green on a terminal, in ⟦brackets⟧ elsewhere."""
    on, off = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    left, words = SHOWN, []
    for stretch in stretches:
        text = "".join(c if c.isprintable() else " " for c in stretch["text"])[:left]
        left -= len(text)
        words.append(f"{on}{text}{off}" if stretch["supervised"] and text else text)
    return "".join(words) + ("" if left else "…")
