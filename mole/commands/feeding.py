"""What training is fed with: the order of the samples, and the first batch as people read it, in samples.jsonl."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from mole.commands.sampling import generated_lines
from mole.config.seeds import seed_for
from mole.data import IGNORED, Sample, by_length, collate, collate_packed, epoch_order, first_fit
from mole.run_folder import RunFolder, write_atomically
from mole.training import TrainingConfig, TrainingData, check_isolation, plan_layout, rehearse

logger = logging.getLogger(__name__)
SHOWN = 300  # characters of the one sample that is put on the screen
KEPT = 64  # samples of the first batch in samples.jsonl


def training_data(
    train: Sequence[Sample], pad_token_id: int, training: TrainingConfig, seed: int, model: Any = None
) -> TrainingData:
    """The samples in their seeded order; with `training.group_by_length` those of like length in one batch.

    With `training.packing` each item is a row of samples, the same ones in every epoch. Raises ValueError if `model`
    would let them see each other.
    """
    if training.packing:
        packed = _packed(train, pad_token_id, training, seed)
        _check_packed(model, packed, pad_token_id)
        return packed

    def order(epoch: int) -> list[int]:
        plain = epoch_order(len(train), epoch, seed_for("data", seed))
        return by_length(plain, lengths, training.batch_size) if training.group_by_length else plain

    lengths = [len(sample.input_ids) for sample in train]
    if train:
        logger.info("%.1f %% of what the batches hold is padding", 100 * _padding(order(0), lengths, training))
    return TrainingData(train, partial(collate, pad_token_id=pad_token_id), order, _tokens)


def _packed(train: Sequence[Sample], pad_token_id: int, training: TrainingConfig, seed: int) -> TrainingData:
    lengths = [len(sample.input_ids) for sample in train]
    longest, capacity = max(lengths, default=0), training.packing
    assert capacity is not None
    if longest > capacity:
        raise ValueError(
            f"training.packing={capacity}, and the longest sample has {longest} tokens: set {longest} or more, "
            "or cut samples with dataset.max_length"
        )
    order = epoch_order(len(train), 0, seed_for("packing", seed))  # so that samples of one length are no neighbours
    rows = [[train[order[i]] for i in row] for row in first_fit([lengths[i] for i in order], capacity)]
    if rows:
        share = 1 - sum(lengths) / (len(rows) * capacity)
        logger.info(
            "%d samples in %d rows of %d tokens; %.1f %% of them is padding",
            len(train),
            len(rows),
            capacity,
            100 * share,
        )
    return TrainingData(
        rows,
        partial(collate_packed, pad_token_id=pad_token_id),
        lambda epoch: epoch_order(len(rows), epoch, seed_for("data", seed)),
        _tokens,
    )


def _check_packed(model: Any, fed: TrainingData, pad_token_id: int) -> None:
    shared = next((row for row in fed.train if len(row) > 1), None)
    if model is not None and shared is not None:
        pair = sorted(shared, key=lambda sample: len(sample.input_ids))[:2]
        check_isolation(model, fed.collate([pair]), [collate([sample], pad_token_id) for sample in pair])


def _samples(item: Any) -> Sequence[Sample]:
    """Those of a packed row, or the one that an item is."""
    return [item] if isinstance(item, Sample) else item


def _padding(order: Sequence[int], lengths: Sequence[int], training: TrainingConfig) -> float:
    """The share of padding in the batches of an epoch."""
    size = plan_layout(training, 1).micro_batch_size
    groups = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(len(group) * max(group) for group in groups)


def show_first_batch(fed: TrainingData, training: TrainingConfig, tokenizer: Any, run: RunFolder) -> None:
    """Writes the samples of the first step to samples.jsonl, decoded, and shows one: what is supervised is marked.

    What an earlier start of the run has generated stays behind them.
    """
    items = [fed.train[index] for index in fed.order(0)[: min(training.batch_size, KEPT)]]
    first = [sample for item in items for sample in _samples(item)][:KEPT]
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
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    write_atomically(run.samples, "".join([*texts, *generated_lines(run)]))
    label = "" if first[0].target is None else f" → {first[0].completion}"
    print(f"first sample: {_shown(lines[0]['parts'])}{label}")


def refuse_resuming(config: Any) -> None:
    """Raises ValueError for a dry run that would go on with an earlier one."""
    if config.dry_run and config.run.resume != "never":
        raise ValueError("dry_run keeps nothing, so it continues nothing: leave run.resume=never")


def dry_run(model: Any, fed: TrainingData, training: TrainingConfig, accelerator: Any) -> None:
    """A step on the longest sample that leaves no trace; prints what trains, the loss, and the memory of a real one."""
    longest = max(fed.train, key=_tokens)
    rows = plan_layout(training, accelerator.num_processes).micro_batch_size
    found = rehearse(model, fed.collate([longest]), training, accelerator, rows)
    length = _tokens(longest)
    lines = (
        f"trains {found.trained:,} of {found.parameters:,} parameters ({found.trained / found.parameters:.2%})",
        f"loss {found.loss:.4f} per supervised token of the longest sample, {length:,} tokens",
        f"memory of a step on each device: weights {_size(found.weights)}, gradients and moments "
        f"{_size(found.optimizer)}, {rows} × {length:,} tokens for backward {_size(found.activations)}; together "
        f"{_size(found.total)}, and what PyTorch keeps for itself",
        "dry run: nothing was trained, nothing is kept",
    )
    print("\n".join(lines))


def _tokens(item: Any) -> int:
    return sum(len(sample.input_ids) for sample in _samples(item))


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
