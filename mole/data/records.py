"""Datasets made of records (JSON Lines, CSV, Parquet, Hub): their common fields, their formats, their splits."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mole.data.encode import Encoded, assemble, encode_pair, longest
from mole.data.messages import encode_messages
from mole.data.samples import DataSplits
from mole.registry import config_dataclass, unknown

Format = Literal["auto", "prompt_completion", "messages", "alpaca", "source_target"]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
HeldOut = Count | Share | str | None

REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "source_target": ("source", "target"),
}


@config_dataclass
class RecordsConfig:
    """Fields that every dataset of records has."""

    name: str
    path: str
    task: str | None = None
    format: Format = "auto"
    columns: dict[str, str] | None = None
    separator: str | None = None
    validation: HeldOut = 0.1
    test: HeldOut = 0.1
    limit: Count | None = None
    max_length: int | None = Field(default=None, ge=2)
    max_unsupervised: float = Field(default=0.05, ge=0, le=1)


@dataclass(frozen=True)
class Record:
    """One row, and where it stands, as in `train.jsonl:12`."""

    fields: dict[str, Any]
    where: str


def load_records(
    config: RecordsConfig,
    tokenizer: Any,
    read: Callable[[str], list[Record]],
    *,
    name: str,
    seed: int,
    context_length: int | None,
) -> DataSplits:
    """The splits of the records that `read` finds at `config.path` (and at paths given as held-out splits).

    `name` is the dataset's own name: the task of records that name none.
    """
    records = read(config.path)
    if config.limit is not None:
        records = records[: config.limit]
    max_length = longest(config.max_length, context_length)

    def encode(chosen: list[Record] | None) -> Iterator[Encoded] | None:
        if chosen is None:
            return None
        return (encode_record(record, config, tokenizer, name=name, max_length=max_length) for record in chosen)

    held_out = {"test": config.test, "validation": config.validation}
    drawn = split_records(records, held_out, read, seed=seed, path=config.path)
    splits = {split: encode(chosen) for split, chosen in drawn.items()}
    return assemble(name, splits, config.max_unsupervised)


def split_records(
    records: list[Record],
    held_out: Mapping[str, HeldOut],
    read: Callable[[str], list[Record]],
    *,
    seed: int,
    path: str,
) -> dict[str, list[Record] | None]:
    """train and the held-out splits. Shares and numbers are drawn at random by `seed`, in the order of `held_out`.

    The rest, in file order, trains. Raises ValueError, naming `path`, if nothing is left.
    """
    order = list(range(len(records)))
    random.Random(f"split {seed}").shuffle(order)
    splits: dict[str, list[Record] | None] = {}
    for split, wanted in held_out.items():
        if wanted is None:
            splits[split] = None
        elif isinstance(wanted, str):
            splits[split] = read(wanted)
        else:
            count = held_out_count(wanted, len(records))
            chosen, order = sorted(order[:count]), order[count:]
            splits[split] = [records[i] for i in chosen]
    if not order:
        raise ValueError(
            f"{path}: nothing is left to train on: {len(records)} records, "
            f"{', '.join(f'{split}={wanted}' for split, wanted in reversed(list(held_out.items())))}: "
            "lower them or set them to null"
        )
    return {"train": [records[i] for i in sorted(order)], **splits}


def held_out_count(wanted: float, total: int) -> int:
    """How many of `total` a share or a number holds out: a share at least one, if there are two."""
    if isinstance(wanted, int):
        return wanted
    return max(1 if total > 1 else 0, round(wanted * total))


def encode_record(
    record: Record, config: RecordsConfig, tokenizer: Any, *, name: str, max_length: int | None
) -> Encoded:
    """One record as a sample, in the format that the config names or that its keys show."""
    record = rename(record, config.columns)
    layout = detect_format(record) if config.format == "auto" else config.format
    require_keys(record, layout)
    task = config.task or text_field(record, "task_name", optional=True) or name
    if layout == "messages":
        return encode_messages(
            tokenizer, record.fields["messages"], task=task, max_length=max_length, where=record.where
        )
    prompt, completion = PAIRS[layout](record)
    prompt += default_separator(layout, prompt) if config.separator is None else config.separator
    return encode_pair(tokenizer, prompt, completion, task=task, max_length=max_length, where=record.where)


def rename(record: Record, columns: dict[str, str] | None) -> Record:
    """The record with each key of `columns` (what a format calls a field) holding what the named column holds."""
    if not columns:
        return record
    missing = sorted(set(columns.values()) - set(record.fields))
    if missing:
        raise ValueError(f"{record.where}: columns: {unknown('column', missing[0], record.fields)}")
    return Record({**record.fields, **{key: record.fields[column] for key, column in columns.items()}}, record.where)


def detect_format(record: Record) -> str:
    """The first format whose keys the record has; ValueError if it has those of none."""
    for layout, keys in REQUIRED_KEYS.items():
        if all(key in record.fields for key in keys):
            return layout
    known = "; ".join(f"{layout}: {', '.join(keys)}" for layout, keys in REQUIRED_KEYS.items())
    keys = ", ".join(map(str, record.fields)) or "(none)"
    raise ValueError(
        f"{record.where}: the keys {keys} are those of no known format ({known}); "
        "dataset.columns can name others, as in dataset.columns={prompt: question, completion: answer}"
    )


def require_keys(record: Record, layout: str) -> None:
    """ValueError if the record lacks a key of its format."""
    missing = [key for key in REQUIRED_KEYS[layout] if key not in record.fields]
    if missing:
        raise ValueError(
            f"{record.where}: format {layout} needs {', '.join(missing)}; "
            f"the record has {', '.join(map(str, record.fields)) or 'no keys'}"
        )


def text_field(record: Record, key: str, optional: bool = False) -> str:
    """The text under `key`; numbers and booleans as they are written; ValueError for lists, objects and null."""
    value = record.fields.get(key)
    if value is None and optional:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    kind = "null" if value is None else type(value).__name__
    raise ValueError(f"{record.where}: {key} must be text, got {kind}")


def default_separator(layout: str, prompt: str) -> str:
    """A newline behind a source that does not end in white space; nothing elsewhere."""
    return "\n" if layout == "source_target" and prompt and not prompt[-1].isspace() else ""


def _prompt_completion(record: Record) -> tuple[str, str]:
    return text_field(record, "prompt"), text_field(record, "completion")


def _source_target(record: Record) -> tuple[str, str]:
    return text_field(record, "source"), text_field(record, "target")


def _alpaca(record: Record) -> tuple[str, str]:
    """Alpaca's headings without its opening paragraph, which is the same for every record and tells a model nothing."""
    instruction, given = text_field(record, "instruction"), text_field(record, "input", optional=True)
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n", text_field(record, "output")


PAIRS: dict[str, Callable[[Record], tuple[str, str]]] = {
    "prompt_completion": _prompt_completion,
    "source_target": _source_target,
    "alpaca": _alpaca,
}


def existing_file(path: str) -> Path:
    """`path` as a file with something in it; ValueError if it is missing, a folder, or empty."""
    file = Path(path).expanduser()
    if not file.exists():
        near = sorted(p.name for p in file.parent.iterdir())[:8] if file.parent.is_dir() else []
        hint = f"; in {file.parent} there are {', '.join(near)}" if near else ""
        raise ValueError(f"{path}: no such file{hint}")
    if file.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    if file.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    return file
