"""Exact match: the share of samples for which the model writes the expected completion, to the letter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from mole.data import IGNORED, Sample
from mole.evaluation.mode import device_of, evaluating, moved


def exact_match(
    model: Any,
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    device: torch.device | str | None = None,
    inputs: Callable[[list[Sample]], dict[str, Any]] | None = None,
) -> float:
    """Share (0 … 1) of samples whose generated text equals their `completion`; space around either is ignored.

    Arguments and errors are those of `completions`.
    """
    texts = completions(
        model,
        samples,
        tokenizer,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        inputs=inputs,
    )
    right = sum(text == sample.completion.strip() for text, sample in zip(texts, samples, strict=True))
    return right / len(samples)


def completions(
    model: Any,
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    device: torch.device | str | None = None,
    inputs: Callable[[list[Sample]], dict[str, Any]] | None = None,
) -> list[str]:
    """What the model writes after each sample's prompt: greedy, up to the end of sequence, without space around it.

    Prompts are padded on the left and go through the model's own `generate`. `max_new_tokens` None: as many as the
    longest supervised completion of the samples has. `inputs` makes further keywords for `generate` from the samples
    of a batch (task names, for routers that ask). Raises ValueError if there are no samples, or one has no prompt.
    """
    if not samples:
        raise ValueError("there is nothing to evaluate: no samples")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    empty = next((index for index, sample in enumerate(samples) if not sample.prompt_ids), None)
    if empty is not None:
        raise ValueError(f"sample {empty} (task {samples[empty].task!r}) has no prompt to generate from")
    if max_new_tokens is None:
        max_new_tokens = max(sum(label != IGNORED for label in sample.labels) for sample in samples)
    where = device_of(model) if device is None else torch.device(device)
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    config = _greedy(max_new_tokens, ends, pad)
    texts = [""] * len(samples)
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].prompt_ids))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            chosen = [samples[index] for index in indices]
            batch = _left_padded(chosen, pad)
            width = batch["input_ids"].shape[1]
            batch = moved({**batch, **(inputs(chosen) if inputs else {})}, where)
            written = model.generate(**batch, generation_config=config)[:, width:].tolist()
            for index, ids in zip(indices, written, strict=True):
                texts[index] = tokenizer.decode(_until_end(ids, ends), skip_special_tokens=True).strip()
    return texts


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a text: the tokenizer's, and those that the model's generation config adds."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _greedy(max_new_tokens: int, ends: list[int], pad: int) -> GenerationConfig:
    """The most likely token at each step: a model's own sampling and penalties would come through where not set."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )


def _left_padded(samples: list[Sample], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(sample.prompt_ids) for sample in samples)
    ids = torch.full((len(samples), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, width - len(sample.prompt_ids) :] = torch.tensor(sample.prompt_ids, dtype=torch.long)
        mask[row, width - len(sample.prompt_ids) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    first = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[:first]
