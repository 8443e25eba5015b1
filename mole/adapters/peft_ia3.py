"""IA3 in PEFT's format: one tensor per module, [d_out, 1], or [1, d_in] where the module is a feed-forward one."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.ia3 import Ia3Weights
from mole.adapters.peft_patterns import is_plain
from mole.adapters.peft_tensors import PREFIX
from mole.untrusted import Damaged, Refused, shown

_TENSOR = re.compile(r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.ia3_l", re.ASCII)


def read(settings: dict[str, Any], tensors: dict[str, Tensor], what: str) -> dict[str, Ia3Weights]:
    """Path of a module → its factors. Raises Refused for a tensor that belongs nowhere, Damaged for another shape.

    The shape tells whether a module is a feed-forward one; of a single feature, the names in the config do.
    """
    found = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key.removeprefix(PREFIX))
        if match is None or not key.startswith(PREFIX):
            raise Refused(f"{what}: tensor {shown(key)} belongs to no IA3 factor of a module")
        if tensor.dim() != 2 or min(tensor.shape) != 1:
            raise Damaged(f"{what}: {shown(key)} has shape {tuple(tensor.shape)}; wanted (out, 1) or (1, in)")
        feedforward = tensor.shape[0] == 1
        if tensor.numel() == 1:
            names = settings.get("feedforward_modules")
            feedforward = isinstance(names, list) and any(match[1].endswith(str(name)) for name in names)
        found[match[1]] = Ia3Weights(tensor.flatten(), feedforward)
    if not found:
        raise Damaged(f"{what}: no tensor of an IA3 factor in it")
    return found


def named(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's name → tensor."""
    return {
        f"{PREFIX}{path}.ia3_l": part.factors[None] if part.feedforward else part.factors[:, None]
        for path, part in adapter.modules.items()
    }


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """What the config says beside what every method's does."""
    inputs = [path for path, part in adapter.modules.items() if part.feedforward]
    targets = list(adapter.targets or sorted(adapter.modules))
    return {
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "feedforward_modules": _ends(targets, inputs, list(adapter.modules)),
        "init_ia3_weights": True,
        "target_modules": targets,
    }


def _ends(targets: list[str], inputs: list[str], paths: list[str]) -> list[str]:
    """Targets that end the paths of exactly those modules (PEFT compares letters, not whole names); else the paths."""
    ends = [target for target in targets if any(path.endswith(target) for path in inputs)]
    if [path for path in paths if path.endswith(tuple(ends))] == inputs:
        return ends
    return sorted(inputs)


def plain_targets(settings: dict[str, Any], paths: list[str]) -> tuple[str, ...]:
    """The config's target names, if they find exactly the adapted modules; else ()."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) and is_plain(t) for t in targets):
        return ()
    fits = {t: [path for path in paths if path == t or path.endswith(f".{t}")] for t in targets}
    covered = {path for found in fits.values() for path in found} == set(paths)
    return tuple(sorted(targets)) if covered and all(fits.values()) else ()
