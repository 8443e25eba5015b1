"""Records from a Parquet file (extra `data`)."""

from pathlib import Path
from typing import Any, Literal

from mole.data.records import Record, RecordsConfig, existing_file, load_records
from mole.data.samples import DataSplits
from mole.registry import DATASETS, config_dataclass


@config_dataclass
class ParquetConfig(RecordsConfig):
    """A Parquet file."""

    name: Literal["parquet"] = "parquet"


@DATASETS.register("parquet", ParquetConfig)
def load_parquet(config: ParquetConfig, tokenizer: Any, *, seed: int, context_length: int | None) -> DataSplits:
    """The splits of the file at `config.path`."""
    name = Path(config.path).stem
    return load_records(config, tokenizer, read_parquet, name=name, seed=seed, context_length=context_length)


def read_parquet(path: str) -> list[Record]:
    """All rows of a file. ValueError if it is damaged, has no rows, or pyarrow is not installed."""
    file = existing_file(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet files need pyarrow: install the extra, mole-experts[data]") from error
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return [Record(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1)]
