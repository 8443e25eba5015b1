"""What may have been meant: the engine's errors in a few lines, with the nearest key, option or preset."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mole.config import engine as engines
from mole.config import saved as saved_config
from mole.config import yaml_files
from mole.registry import nearest


def explain(error: Exception, engine: engines.Engine, overrides: Sequence[str] = ()) -> Iterator[str]:
    """An error of the engine under `overrides` in a few lines, with what may have been meant."""
    text = f"{error}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not (?:override|append to|delete from) (?:config\. )?.*?'([^']+)'", text):
        key = match[1]
        if "Could not append" in text:
            yield f"+{key}: {key} is there already; write {key}=… without the plus"
            return
        yield f"Could not override '{key}'." if "override" in match[0] else f"~{key}: there is no {key} to take away"
        yield from _near_keys(key, engine, overrides)
    elif match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        known = engine.options(match[1])
        near = nearest(match[2], known, 1)
        hint = f"; did you mean {match[1]}={near[0]}?" if near else ""
        yield f"{match[1]}={match[2]}: no such option{hint}   known: {', '.join(known) or 'none'}"
    else:
        yield from (line for line in str(error).splitlines()[:6] if line.strip())


def _near_keys(key: str, engine: engines.Engine, overrides: Sequence[str]) -> Iterator[str]:
    chosen, taken = engine.groups(), engine.chosen(overrides)
    top, _, rest = key.partition(".")
    plural = f"{top}s"
    if top in chosen and top not in taken:
        several = [o for o in overrides if o.startswith(f"+{top}@{plural}.")]
        if several:
            names = [o.partition("=")[0].removeprefix(f"+{top}@{plural}.") for o in several]
            yield f"among several, say which: {' or '.join(f'{plural}.{name}.{rest}=…' for name in names)}"
            return
        files = {option: engine.file(top, option) for option in engine.options(top)}
        having = [o for o, file in files.items() if file is not None and rest in yaml_files.entries(file)] or files
        yield f"{top} is not chosen yet; add {' or '.join(f'{top}={option}' for option in having)}"
        if engine.takes_several(top):
            yield f"among several, say which: {plural}.<name>.{rest}=…"
        return
    choices = [o for o in overrides if o.lstrip("+~").partition("=")[0].partition("@")[0] in chosen and not _sweeps(o)]
    try:
        composed = engine.compose(choices)
    except (HydraException, OmegaConfBaseException):  # a preset of the user's that cannot be composed itself
        composed = engine.compose()
    node = OmegaConf.to_container(composed, resolve=False)
    leaves = saved_config.leaves(node)
    inner = _deepest(node, key)
    if inner:  # what stands beside the key
        own = [k.removeprefix(f"{inner}.") for k in leaves if k.startswith(f"{inner}.")]
        near = nearest(key.removeprefix(f"{inner}."), own, 1)
        yield f"did you mean {inner}.{near[0]}?" if near else f"known: {', '.join(f'{inner}.{k}' for k in own)}"
        return
    near = nearest(key, [*leaves, *chosen], 1)
    if near and near[0] != key:
        yield f"did you mean {near[0]}?"
    elif near and key.removesuffix("s") in chosen:
        yield f"it is filled by {key.removesuffix('s')}=[…]"
    else:
        yield f"known: {', '.join([*chosen, *(k for k in node if k not in chosen)])}"  # type: ignore[union-attr]


def _sweeps(override: str) -> bool:
    return "," in override.partition("=")[2]


def _deepest(node: Any, key: str) -> str:
    """The longest part of a dotted key that is a mapping with keys in it; empty if not even its first word is."""
    found: list[str] = []
    for part in key.split(".")[:-1]:
        node = node.get(part)
        if not isinstance(node, dict) or not node:
            break
        found.append(part)
    return ".".join(found)
