"""The resolved configuration of a run as a file and as plain data: written, read, compared; nothing acts in it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mole.config.paths import is_same
from mole.run_folder import write_atomically

# What may change when a run goes on; all else makes another run.
CHANGEABLE = (
    "training.max_steps",
    "training.epochs",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "launcher",
    "parallel",
    "tracker",
    "run",
)
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Takes 1e-4 for a number, as Hydra does."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader could take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _FLOAT.match(text) else None)


_Dumper.add_representer(str, _text)


def write(file: Path, node: Mapping[str, Any]) -> None:
    """Writes plain data as YAML that `read` reads back to the same values. Raises OSError."""
    write_atomically(file, yaml.dump(dict(node), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def read(file: Path) -> dict[str, Any]:
    """What `write` wrote. Raises ValueError if the file is absent, damaged, or holds no mapping."""
    try:
        node = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a configuration: {str(error).splitlines()[0]}") from None
    if not isinstance(node, dict):
        raise ValueError(f"{file} holds no mapping")
    return node


def has_folder(node: Mapping[str, Any]) -> bool:
    """Whether a command's configuration is that of a run, with a folder to leave."""
    return isinstance(node.get("run"), Mapping) and "folder" in node["run"]


def choices(node: Mapping[str, Any]) -> dict[str, str]:
    """Group → the variant that is chosen in a composed configuration, several joined by a comma."""
    found: dict[str, str] = {}
    for key, value in node.items():
        if not isinstance(value, Mapping) or not value:
            continue
        if isinstance(value.get("name"), str):
            found[key] = value["name"]
        elif all(isinstance(v, Mapping) and isinstance(v.get("name"), str) for v in value.values()):
            found[key] = ",".join(value)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys that differ between two configurations and may not when a run goes on."""
    before, after = leaves(old), leaves(new)
    changed = [k for k in {**before, **after} if not is_same(before.get(k, ""), after.get(k, ""))]
    return [k for k in changed if not is_changeable(k)]


def is_changeable(key: str) -> bool:
    """Whether this dotted key may change when a run goes on."""
    return any(key == c or key.startswith(f"{c}.") for c in CHANGEABLE)


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {"a.b": 1}; an empty mapping is a leaf."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found
