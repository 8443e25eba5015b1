"""Records from a dataset of the Hub, or from a local folder in its layout (extra `data`)."""

from typing import Any, Literal

from mole.data.records import Record, RecordsConfig, load_records
from mole.data.samples import DataSplits
from mole.registry import DATASETS, config_dataclass


@config_dataclass
class HubConfig(RecordsConfig):
    """A dataset that the package `datasets` loads; held-out splits may be its own, by name."""

    name: Literal["hub"] = "hub"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


@DATASETS.register("hub", HubConfig)
def load_hub(config: HubConfig, tokenizer: Any, *, seed: int, context_length: int | None) -> DataSplits:
    """The splits of the dataset at `config.path`: `config.split` to train on, others by name, share or number."""

    def read(place: str) -> list[Record]:
        return read_hub(config, config.split if place == config.path else place)

    name = config.path.rstrip("/").rsplit("/", 1)[-1]
    return load_records(config, tokenizer, read, name=name, seed=seed, context_length=context_length)


def read_hub(config: Any, split: str) -> list[Record]:
    """All records of one split. ValueError if the dataset or the split is not there; code in it is never run."""
    label, rows = load_rows(config, split)
    records = [Record(dict(row), f"{label}, {split}: row {number}") for number, row in enumerate(rows, start=1)]
    if not records:
        raise ValueError(f"Hub dataset {label}: split {split} has no rows")
    return records


def load_rows(config: Any, split: str) -> tuple[str, Any]:
    """The dataset's label in errors, and its rows as `datasets` gives them: `config` has path, subset and revision."""
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise ValueError("Hub datasets need the package datasets: install the extra, mole-experts[data]") from error
    label = config.path if config.subset is None else f"{config.path} ({config.subset})"
    try:
        return label, datasets.load_dataset(config.path, config.subset, split=split, revision=config.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"Hub dataset {label}, split {split}: {error}") from error
