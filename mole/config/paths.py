"""Which values of a configuration are paths, and the same made absolute, so that each means one place everywhere."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# Dotted keys whose text is a path, whether or not there is something yet. An address with `://` stays as it is.
PATHS = (
    "run.folder",
    "library.url",
    "dataset.path",
    "dataset.validation",
    "dataset.test",
    "datasets.*.path",
    "datasets.*.validation",
    "datasets.*.test",
    "router.from_folder",
    "expert",
    "start_library",
    "start_from",
    "mixture",
    "model",
    "into",
    "prompts",
    "experts",
    "experts.*",
)
# Keys whose text is a path only if it says so or if it exists: it may be an id of the Hub as well.
PATHS_OR_IDS = ("backbone.path",)
_HUB_DATASETS = ("hub", "classification_hub")  # `path` is an id or a folder, `validation` and `test` name splits


def absolute(node: Mapping[str, Any]) -> dict[str, Any]:
    """A composed configuration with every path in it made absolute."""
    return {key: _absolute(value, key, "") for key, value in node.items()}


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, or two texts the same place seen from here."""
    if one == other or not isinstance(one, str) or not isinstance(other, str):
        return one == other
    return "://" not in one + other and _place(one) == _place(other)


def _absolute(value: Any, key: str, variant: str) -> Any:
    if isinstance(value, Mapping):
        name = value.get("name")
        return {k: _absolute(v, f"{key}.{k}", name if isinstance(name, str) else "") for k, v in value.items()}
    if not isinstance(value, str) or not value or "://" in value or "${" in value:
        return value
    from_hub = variant in _HUB_DATASETS and key.startswith("dataset")
    may_be_id = any(fnmatchcase(key, k) for k in PATHS_OR_IDS) or (from_hub and key.endswith(".path"))
    if may_be_id:
        return _place(value) if value.startswith((".", "~", "/")) or ("/" in value and _exists(value)) else value
    return _place(value) if not from_hub and any(fnmatchcase(key, k) for k in PATHS) else value


def _place(text: str) -> str:
    try:
        return str(Path(text).expanduser().absolute())
    except RuntimeError:  # `~somebody` whom this machine does not know
        return text


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):
        return False
