"""From text to a sample: token ids whose prompt part is not supervised, and the splits made of them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mole.data.samples import IGNORED, DataSplits, Sample, Split
from mole.head import Head


@dataclass(frozen=True)
class Encoded:
    """What became of one example: a sample, or the reason why it has no supervised token, and where it stood."""

    sample: Sample | None
    truncated: bool
    reason: str
    where: str
    text: str


def longest(max_length: int | None, context_length: int | None) -> int | None:
    """The bound on a sample's tokens: the smaller of what is asked for and what the backbone takes."""
    bounds = [bound for bound in (max_length, context_length) if bound is not None]
    return min(bounds) if bounds else None


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` with what the tokenizer itself puts before it, which is never doubled, and nothing after it."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    added_end = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if added_end else ids


def end_id(tokenizer: Any) -> int:
    """The end-of-sequence token; ValueError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so a model cannot learn where a completion ends: "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def encode_pair(
    tokenizer: Any, prompt: str, completion: str, *, task: str, max_length: int | None, where: str
) -> Encoded:
    """Prompt and completion as one sequence that ends in the end-of-sequence token; the completion is supervised.

    The two are tokenized together when the prompt's own ids are then a prefix; where a token would straddle the
    border, each is tokenized alone, because generation starts from the prompt's ids.
    """
    prompt_ids = text_ids(tokenizer, prompt)
    together = text_ids(tokenizer, prompt + completion)
    if together[: len(prompt_ids)] == prompt_ids:
        ids = together
    else:
        ids = prompt_ids + tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    end = end_id(tokenizer)
    if completion and ids[-1:] != [end]:
        ids = [*ids, end]
    labels = [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
    sample = Sample(tuple(ids), tuple(labels), task, prompt, completion, tuple(prompt_ids))
    reason = "" if completion else "the completion is empty"
    return fit(sample, max_length=max_length, where=where, reason=reason)


def fit(sample: Sample, *, max_length: int | None, where: str, reason: str = "") -> Encoded:
    """`sample` cut at its end to `max_length` tokens; nothing but the reason if no supervised token is left."""
    length = len(sample.input_ids)
    text = sample.prompt + sample.completion
    truncated = max_length is not None and length > max_length
    if truncated:
        ids, labels = sample.input_ids[:max_length], sample.labels[:max_length]
        sample = Sample(ids, labels, sample.task, sample.prompt, sample.completion, sample.prompt_ids[:max_length])
    if sample.supervised:
        return Encoded(sample, truncated, "", where, text)
    if truncated:
        reason = reason or f"it has {length} tokens and its prompt alone fills max_length={max_length}"
    return Encoded(None, truncated, reason or "it has no supervised token", where, text)


def assemble(
    name: str,
    splits: Mapping[str, Iterable[Encoded] | None],
    max_unsupervised: float,
    *,
    head: Head | None = None,
    metric: str | None = None,
) -> DataSplits:
    """The dataset `name` from its encoded examples: split name (train, validation, test) → examples.

    `head` and `metric` are those of a task of whole texts.

    Raises ValueError if a split is empty, or if more than the share `max_unsupervised` of all examples has no
    supervised token; the message shows the first of them.
    """
    kept: dict[str, Split | None] = {"validation": None, "test": None}
    lost: list[Encoded] = []
    total = truncated = 0
    for split, encoded in splits.items():
        if encoded is None:
            continue
        examples = list(encoded)
        if not examples:
            raise ValueError(f"dataset {name}: the {split} split is empty")
        total += len(examples)
        truncated += sum(example.truncated for example in examples)
        lost += [example for example in examples if example.sample is None]
        kept[split] = Split(tuple(example.sample for example in examples if example.sample is not None))
    if lost and len(lost) > max_unsupervised * total:
        raise ValueError(_nothing_to_supervise(name, lost, total, max_unsupervised))
    for split, samples in kept.items():
        if samples is not None and not samples:
            raise ValueError(
                f"dataset {name}: no example of the {split} split has a supervised token: {lost[0].reason}"
            )
    return DataSplits(
        train=kept["train"] or Split(()),
        validation=kept["validation"],
        test=kept["test"],
        name=name,
        fingerprint=_fingerprint(kept),
        dropped=len(lost),
        truncated=truncated,
        head=head,
        metric=metric,
    )


def _nothing_to_supervise(name: str, lost: list[Encoded], total: int, allowed: float) -> str:
    first = lost[0]
    shown = first.text if len(first.text) <= 200 else first.text[:200] + "…"
    return (
        f"dataset {name}: {len(lost)} of {total} examples have no supervised token, more than "
        f"max_unsupervised={allowed:g} allows\n"
        f"the first, {first.where}: {first.reason}: {shown!r}\n"
        "check the format, and raise dataset.max_length if prompts are cut"
        + (", or raise dataset.max_unsupervised to drop them" if allowed else "")
    )


def _fingerprint(splits: dict[str, Split | None]) -> str:
    digest = hashlib.sha256()
    for name, samples in sorted(splits.items()):
        digest.update(f"{name}\n".encode())
        for sample in samples or ():
            said = sample.labels if sample.target is None else repr(sample.target)
            digest.update(f"{sample.task}\t{sample.input_ids}\t{said}\n".encode())
    return digest.hexdigest()
