"""Texts or pairs with labels from a dataset of the Hub, or from a local folder in its layout (extra `data`)."""

from typing import Any, Literal

from mole.data.classification import ClassificationConfig, Files, load_classification
from mole.data.hub import load_rows, read_hub
from mole.data.records import Record
from mole.data.samples import DataSplits
from mole.head import Head
from mole.registry import DATASETS, config_dataclass


@config_dataclass
class ClassificationHubConfig(ClassificationConfig):
    """A dataset that the package `datasets` loads; held-out splits may be its own, by name.

    Labels go by the names, and in the order, that the dataset has for its numbers, if it has some.
    """

    name: Literal["classification_hub"] = "classification_hub"  # type: ignore[assignment]
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def files(self) -> Files:
        return Files(self.split, {"test": self.test, "validation": self.validation})

    def read(self, path: str) -> list[Record]:
        """The records of one split."""
        column, names = self._label_column(), self._names()
        records = read_hub(self, path)
        for record in records if names else ():
            value = record.fields.get(column)
            if type(value) is int and 0 <= value < len(names):
                record.fields[column] = names[value]
        return records

    def head_for(self, records: list[Record]) -> Head:
        names = self._names()
        return Head("classification", tuple(names)) if names else super().head_for(records)

    def _label_column(self) -> str:
        return (self.columns or {}).get("label", "label")

    def _names(self) -> list[str]:
        """The dataset's names of its labels, in order; none where labels are no numbers with names."""
        _, rows = load_rows(self, self.split)
        return list(getattr(rows.features.get(self._label_column()), "names", None) or [])


@DATASETS.register("classification_hub", ClassificationHubConfig)
def load_classification_hub(
    config: ClassificationHubConfig, tokenizer: Any, *, seed: int, context_length: int | None
) -> DataSplits:
    """The splits of the dataset at `config.path`: `config.split` to train on, others by name, share or number."""
    return load_classification(config, tokenizer, seed=seed, context_length=context_length)
