"""Records from JSON Lines: one object per line; or from one JSON file that holds a list of objects."""

import json
from pathlib import Path
from typing import Any, Literal

from mole.data.records import Record, RecordsConfig, existing_file, load_records
from mole.data.samples import DataSplits
from mole.registry import DATASETS, config_dataclass


@config_dataclass
class JsonlConfig(RecordsConfig):
    """A JSON Lines file; with the suffix .json, a file with one list."""

    name: Literal["jsonl"] = "jsonl"


@DATASETS.register("jsonl", JsonlConfig)
def load_jsonl(config: JsonlConfig, tokenizer: Any, *, seed: int, context_length: int | None) -> DataSplits:
    """The splits of the file at `config.path`."""
    name = Path(config.path).stem
    return load_records(config, tokenizer, read_jsonl, name=name, seed=seed, context_length=context_length)


def read_jsonl(path: str) -> list[Record]:
    """All records of a file; empty lines are skipped. ValueError with file and line for a malformed one."""
    file = existing_file(path)
    text = read_text(file)
    if file.suffix == ".json" and text.lstrip().startswith("["):
        return _read_list(path, text)
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                shown = line.strip()[:80]
                raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}: {shown}") from error
            records.append(_record(value, where))
    if not records:
        raise ValueError(f"{path}: the file has no records, only empty lines")
    return records


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; ValueError with the line of a byte that is not."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}:{line}: not UTF-8 text (byte {data[error.start]:#04x}): convert the file") from error


def _read_list(path: str, text: str) -> list[Record]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    if not values:
        raise ValueError(f"{path}: the list is empty")
    return [_record(value, f"{path}: record {number}") for number, value in enumerate(values, start=1)]


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a record must be a JSON object with keys, got {type(value).__name__}")
    return Record(value, where)
