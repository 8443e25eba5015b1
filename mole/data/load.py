"""From a dataset's config to tokenized splits."""

from typing import Any

from mole.data.samples import DataSplits
from mole.registry import DATASETS


def load(config: Any, tokenizer: Any, *, seed: int, context_length: int | None = None) -> DataSplits:
    """The dataset that `config.name` names, tokenized.

    `seed` makes generated examples and random splits; `context_length` (tokens) is what the backbone can take and
    bounds `config.max_length`. Raises ValueError for a missing or malformed file (with file and line), an empty
    split, or too many examples without a supervised token.
    """
    if context_length is not None and context_length < 2:
        raise ValueError(f"context_length={context_length}: a sample needs two tokens at least")
    return DATASETS.build(config, tokenizer, seed=seed, context_length=context_length)


def load_many(
    configs: dict[str, Any], tokenizer: Any, *, seed: int, context_length: int | None = None
) -> dict[str, DataSplits]:
    """Several datasets, each under its key."""
    return {key: load(config, tokenizer, seed=seed, context_length=context_length) for key, config in configs.items()}
