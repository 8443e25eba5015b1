"""`where.*`: which experts of a library a verb is about."""

from dataclasses import asdict
from typing import Any

from mole.registry import config_dataclass

Values = tuple[str, ...] | str | None


@config_dataclass
class Where:
    """Which experts: values of one key are alternatives, keys are conditions; None: no condition."""

    names: Values = None
    backbone: Values = None
    method: Values = None
    tasks: Values = None
    tags: Values = None
    license: Values = None
    kind: Values = None
    min_score: Values = None
    max_score: Values = None
    created_after: str | None = None


def conditions(where: Where) -> dict[str, Any] | None:
    """The conditions that are set; None if there is none."""
    return {key: value for key, value in asdict(where).items() if value is not None} or None
