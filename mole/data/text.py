"""Plain text cut into windows of tokens, all of them supervised."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mole.data.encode import Encoded, assemble
from mole.data.jsonl import read_text
from mole.data.records import Count, HeldOut, Share, existing_file
from mole.data.samples import DataSplits, Sample, spread
from mole.registry import DATASETS, config_dataclass


@config_dataclass
class TextConfig:
    """A file of plain text."""

    name: Literal["text"] = "text"
    path: str
    task: str | None = None
    window: int = Field(default=256, ge=2)
    validation: HeldOut = 0.1
    test: HeldOut = None
    limit: Count | None = None
    held_out_limit: Count | None = None


@DATASETS.register("text", TextConfig)
def load_text(config: TextConfig, tokenizer: Any, *, seed: int, context_length: int | None) -> DataSplits:
    """The windows of the file at `config.path`; held-out splits are its end, or files of their own.

    The file is cut into stretches of characters before it is tokenized: train, then validation, then test. Each
    stretch is tokenized whole and cut into windows that follow one another without overlap; the last may be short.
    Every token of a stretch is in exactly one window (a single token that is left over is dropped and counted).
    """
    if context_length is not None and config.window > context_length:
        raise ValueError(
            f"dataset.window={config.window}: the backbone takes {context_length} tokens: lower the window"
        )
    task = config.task or Path(config.path).stem
    text = read_text(existing_file(config.path))
    limits = {"train": config.limit, "validation": config.held_out_limit, "test": config.held_out_limit}
    splits: dict[str, list[Encoded] | None] = {}
    for split, (where, stretch) in stretches(text, config, tokenizer).items():
        if stretch is None:
            splits[split] = None
            continue
        spans = windows(stretch, tokenizer, config.window)
        wanted = getattr(config, split, None)
        kept = spread(spans[:wanted] if isinstance(wanted, int) else spans, limits[split])
        splits[split] = [encoded(span, tokenizer, task, where) for span in kept]
    return assemble(task, splits, max_unsupervised=1.0)


def stretches(text: str, config: TextConfig, tokenizer: Any) -> dict[str, tuple[str, str | None]]:
    """train, validation and test → (where it stands, text): the held-out ones are cut from the end of the file."""
    found: dict[str, tuple[str, str | None]] = {}
    end = len(text)
    for split, wanted in (("test", config.test), ("validation", config.validation)):
        if wanted is None:
            found[split] = ("", None)
        elif isinstance(wanted, str):
            found[split] = (wanted, read_text(existing_file(wanted)))
        else:
            begin = end - held_out_characters(text[:end], wanted, len(text), config.window, tokenizer)
            found[split] = (f"{config.path} from character {begin}", text[begin:end])
            end = begin
    if not text[:end].strip():
        raise ValueError(
            f"{config.path}: nothing is left to train on with validation={config.validation}, test={config.test}"
        )
    return {"train": (config.path, text[:end]), **found}


def held_out_characters(text: str, wanted: Share | Count, total: int, window: int, tokenizer: Any) -> int:
    """How many characters at the end of `text` a share of `total`, or a number of windows, takes.

    The cut of a share moves back to the last line break before it, if there is one near, so that no line is torn
    apart; that of a number stands where its first token begins.
    """
    if isinstance(wanted, int):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        cut = offsets[-wanted * window][0] if wanted * window <= len(offsets) else 0
        return len(text) - cut
    cut = len(text) - round(wanted * total)
    line_break = text.rfind("\n", max(0, cut - 1000), cut)
    return len(text) - (line_break + 1 if line_break >= 0 else cut)


def windows(text: str, tokenizer: Any, window: int) -> list[tuple[int, tuple[int, ...]]]:
    """The windows of one stretch of text, in order: number of the first token, token ids."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [(begin, tuple(ids[begin : begin + window])) for begin in range(0, len(ids), window)]


def encoded(span: tuple[int, tuple[int, ...]], tokenizer: Any, task: str, where: str) -> Encoded:
    """The example that a window is."""
    begin, ids = span
    sample = Sample(ids, ids, task, "", tokenizer.decode(ids), ())
    place = f"{where}, tokens {begin} to {begin + len(ids)}"
    reason = "" if len(ids) > 1 else "one token alone has nothing before it"
    return Encoded(sample if len(ids) > 1 else None, False, reason, place, sample.completion)
