"""Several datasets as one."""

from collections.abc import Iterable

from mole.data.samples import DataSplits, Split


def joined(datasets: Iterable[DataSplits], split: str) -> Split:
    """The samples of one split (train, validation, test) of every dataset that has it, one dataset after the other."""
    parts = [getattr(splits, split) for splits in datasets]
    return Split(tuple(sample for part in parts if part is not None for sample in part))
