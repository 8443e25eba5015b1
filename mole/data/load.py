"""From a dataset's config to tokenized splits."""

import logging
from typing import Any

from mole.data.samples import DataSplits
from mole.registry import DATASETS

logger = logging.getLogger(__name__)


def load(config: Any, tokenizer: Any, *, seed: int, context_length: int | None = None) -> DataSplits:
    """The dataset that `config.name` names, tokenized.

    `seed` makes generated examples and random splits; `context_length` (tokens) is what the backbone can take and
    bounds `config.max_length`. Says how many examples were cut or left out, if any were. Raises ValueError for a
    missing or malformed file (with file and line), an empty split, or too many examples without a supervised token.
    """
    if context_length is not None and context_length < 2:
        raise ValueError(f"context_length={context_length}: a sample needs two tokens at least")
    splits = DATASETS.build(config, tokenizer, seed=seed, context_length=context_length)
    if lost := _lost(splits):
        logger.warning("dataset %s: %s", splits.name, lost)
    return splits


def _lost(splits: DataSplits) -> str:
    """How many examples were cut or left out, in a line; empty if none was."""
    total = splits.dropped + sum(len(part or ()) for part in (splits.train, splits.validation, splits.test))
    told = []
    if splits.truncated:
        share = f"{splits.truncated} of {total} examples ({splits.truncated / total:.1%})"
        told.append(f"{share} were cut at their end, to the longest length allowed (dataset.max_length)")
    if splits.dropped:
        told.append(f"{splits.dropped} of {total} were left out, with nothing that is supervised")
    return "; ".join(told)


def load_many(
    configs: dict[str, Any], tokenizer: Any, *, seed: int, context_length: int | None = None
) -> dict[str, DataSplits]:
    """Several datasets, each under its key."""
    return {key: load(config, tokenizer, seed=seed, context_length=context_length) for key, config in configs.items()}
