"""Names of modules: what an expert calls a module, and what this backbone calls it.

A name is taken as it is, without one `base_model.model.` in front, or by the renames that the backbone's class declares
for its checkpoints (an expert may be older than the class's present names).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from mole.adapters import Adapter, placed
from mole.registry import nearest

_PREFIX = "base_model.model."


def renamed(name: str, adapter: Adapter, backbone: PreTrainedModel) -> Adapter:
    """The adapter with this backbone's names. Raises ValueError for a module that the backbone lacks."""
    try:
        adapter = placed(backbone, adapter)
    except ValueError as error:
        raise ValueError(f"expert {name!r}: {error}") from error
    known = {path for path, _ in backbone.named_modules()}
    paths = [*adapter.modules, *adapter.biases, *adapter.full_modules, *adapter.base_weights]
    if all(path in known for path in paths):
        return adapter
    renames = _renames(backbone)
    found = {path: _find(path, known, renames) for path in dict.fromkeys(paths)}
    for path, here in found.items():
        if here is None:
            near = nearest(path, sorted(known))
            raise ValueError(f"expert {name!r} adapts {path!r}, which this backbone lacks (nearest: {near})")

    def moved(parts: dict[str, Any]) -> dict[str, Any]:
        return {str(found[path]): part for path, part in parts.items()}

    return replace(
        adapter,
        modules=moved(adapter.modules),
        biases=moved(adapter.biases),
        full_modules=moved(adapter.full_modules),
        base_weights=moved(adapter.base_weights),
        targets=(),
    )


def _find(path: str, known: Iterable[str], renames: Callable[[str], str]) -> str | None:
    for name in (path, path.removeprefix(_PREFIX)):
        for candidate in (name, renames(name)):
            if candidate in known:
                return candidate
    return None


def _renames(backbone: PreTrainedModel) -> Callable[[str], str]:
    """The renames that the class of the backbone declares for the keys of its checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    steps = [step for step in get_model_conversion_mapping(backbone) if isinstance(step, WeightRenaming)]

    def rename(path: str) -> str:
        key = f"{path}.weight"
        for step in steps:
            key = step.rename_source_key(key)[0]
        return key.removesuffix(".weight")

    return rename
