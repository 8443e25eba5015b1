"""Records from a CSV or TSV file whose first line names the columns."""

import csv
import io
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mole.data.jsonl import read_text
from mole.data.records import Record, RecordsConfig, existing_file, load_records
from mole.data.samples import DataSplits
from mole.registry import DATASETS, config_dataclass


@config_dataclass
class CsvConfig(RecordsConfig):
    """A CSV file with a header line."""

    name: Literal["csv"] = "csv"
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    quoting: bool = True


@DATASETS.register("csv", CsvConfig)
def load_csv(config: CsvConfig, tokenizer: Any, *, seed: int, context_length: int | None) -> DataSplits:
    """The splits of the file at `config.path`."""

    def read(path: str) -> list[Record]:
        return read_csv(path, delimiter=config.delimiter, quoting=config.quoting)

    return load_records(config, tokenizer, read, name=Path(config.path).stem, seed=seed, context_length=context_length)


def read_csv(path: str, *, delimiter: str = ",", quoting: bool = True) -> list[Record]:
    """All rows; ValueError with file and line for one that has not as many fields as the header.

    Without `quoting`, quotation marks are plain characters, as in files that hold unbalanced ones.
    """
    text = read_text(existing_file(path))
    style = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=style, strict=True)
    records: list[Record] = []
    header: list[str] | None = None
    begin = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{begin}: not CSV: {error}; unbalanced quotes need quoting=false") from error
        if row is None:
            break
        where, begin = f"{path}:{begin}", rows.line_num + 1
        if not row:
            continue
        if header is None:
            header = _header(row, where)
        elif len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} fields, but the header names {len(header)} ({', '.join(header)})")
        else:
            records.append(Record(dict(zip(header, row, strict=True)), where))
    if not records:
        raise ValueError(f"{path}: the file has a header at most, no rows")
    return records


def _header(row: list[str], where: str) -> list[str]:
    names = [name.strip() for name in row]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the header names {', '.join(twice)} twice")
    return names
