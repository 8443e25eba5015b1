"""From the words on the line to overrides that Hydra takes: operands, quoting, lists, addresses, near names."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from mole.registry import nearest

_OVERRIDE = re.compile(r"^(\+{0,2}[A-Za-z_][\w./@:-]*=|~[A-Za-z_][\w./@:-]*(=|$))")

_QUOTED = re.compile(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"")

# A value that is no option of these groups but an address chooses this option and fills this key.
_ADDRESSES = {"library": ("local", "url"), "backbone": ("pretrained", "path")}
_SCHEMES = {"library": {"hf": "hub", "s3": "s3", "az": "azure"}}  # what an address begins with → another option

# Keys of the user's own sentences, and of revisions, which may be all digits: the word behind `=` is taken as it is,
# commas and quotes included.
_SENTENCES = ("prompt", "description", "message", "expect", "backbone.revision")
# What mole settles by itself → what to give in its place.
_SETTLED = {
    "hydra.run.dir": "run.folder",
    "hydra.sweep.dir": "run.folder",
    "hydra.sweep.subdir": "run.folder",
    "hydra.job.chdir": "run.folder",
    "hydra.output_subdir": "run.folder",
}
# Options of the engine's own groups that other packages bring → how to have them.
_PLUGINS = {
    "joblib": "'mole-experts[sweep]'",
    "submitit_local": "'mole-experts[sweep]'",
    "submitit_slurm": "'mole-experts[sweep]'",
    "optuna": "hydra-optuna-sweeper",
    "ax": "hydra-ax-sweeper",
    "nevergrad": "hydra-nevergrad-sweeper",
}

# A key may hold plain text in one command and be the name of a group elsewhere (`library` of the library's verbs): the
# engine would look for an option. A mapping under this key alone stands for a value: `engine.plain` unwraps it.
WRAPPED = "_value_"


class Tree(Protocol):
    """What of a command's configuration tree is needed here."""

    def groups(self, overrides: Sequence[str] = ()) -> dict[str, str | None]: ...
    def options(self, group: str) -> list[str]: ...
    def takes_several(self, group: str) -> bool: ...
    def open_keys(self, overrides: Sequence[str] = ()) -> set[str]: ...
    def remark(self, group: str, option: str) -> str: ...


def is_override(word: str) -> bool:
    """Whether a word of the command line is an override (`key=value`, `~key`), not an operand."""
    return bool(_OVERRIDE.match(word)) and not word.startswith("~/")


def fill_operands(words: Iterable[str], operands: Sequence[str], command: str) -> list[str]:
    """Words without "=" become values of `operands`, in order. Raises ValueError for one too many."""
    given, rest = [], list(operands)
    several: list[str] = []
    for word in words:
        if is_override(word):
            given.append(word)
        elif rest and rest[0].endswith("…"):
            several.append(quote(word))
        elif rest:
            given.append(f"{rest.pop(0)}={quote(word)}")
        else:
            takes = f"takes {' '.join(operands)}" if operands else "takes no operand"
            raise ValueError(f"{command} {takes}; what is {word!r}? settings have the form key=value")
    if several:
        given.append(f"{rest[0].removesuffix('…')}=[{','.join(several)}]")
    return given


def rewrite(words: Sequence[str], tree: Tree, *, sweep: bool = False) -> list[str]:
    """The overrides as Hydra takes them.

    `group=null` takes the group away, a list for a group that allows several fills the plural key, an address chooses
    the option that takes addresses, text outside Hydra's grammar is quoted, a mapping of names that the user chooses
    takes new ones. Raises ValueError for an unknown option, a list where one is wanted, a comma without `sweep`.
    """
    if not words:
        return []
    groups = tree.groups()
    done: list[str] = []
    for given in words:
        word = given if sweep else _sentence(given)
        override = _parse(word)
        if override.is_sweep_override() and not sweep:
            raise ValueError(f"{word}: a comma makes a sweep: add -m, or quote the value twice: {_twice(word)}")
        group = override.key_or_group
        _check_engine(group, override, tree)
        plain = not (override.is_add() or override.is_force_add() or override.is_delete() or override.package)
        if plain and group in groups:
            done += _choice(override, group, groups[group], tree)
        elif plain and not group.startswith("hydra/") and tree.options(group):
            done.append(f"{group}={{{WRAPPED}: {quote(_text(override.value()))}}}")
        else:
            done.append(override.input_line or word)
    return _opened(done, tree)


def _opened(words: list[str], tree: Tree) -> list[str]:
    """The engine adds no key to a mapping; one whose names are the user's to choose is to take those it lacks."""
    settings = [w for w in words if w[0] not in "+~" and "@" not in w.partition("=")[0]]
    if not settings:
        return words
    opened = tree.open_keys([w for w in words if not _parse(w).is_sweep_override()])
    wanted = {w for w in settings if any(f"{w.partition('=')[0]}.".startswith(f"{key}.") for key in opened)}
    return [f"++{w}" if w in wanted else w for w in words]


def group_keys(words: Iterable[str]) -> list[str]:
    """The key or group that each override sets."""
    return [w.lstrip("+~").partition("=")[0].partition("@")[0] for w in words]


def quote(text: str) -> str:
    """`text` as a value that Hydra's grammar takes for plain text, whatever is in it."""
    slashes = re.sub(r"(\\+)('|$)", lambda m: m[1] * 2 + m[2], text)
    return "'" + slashes.replace("'", "\\'") + "'"


def _twice(word: str) -> str:
    """`key=value` as one types it in a shell for the value to be text: quoted for the shell and for the grammar."""
    key, _, value = word.partition("=")
    inner = f"{key}={quote(value)}"
    return shlex.quote(inner) if any(sign in inner for sign in '"$`\\!') else f'"{inner}"'


def _sentence(word: str) -> str:
    """`prompt=…` and its like as quoted text; null, an interpolation and what is quoted already stay as they are."""
    key, _, value = word.partition("=")
    if key not in _SENTENCES or value in ("", "null") or "${" in value:
        return word
    return word if _QUOTED.fullmatch(value) else f"{key}={quote(value)}"


def _check_engine(key: str, override: Override, tree: Tree) -> None:
    """Raises ValueError for a setting of the engine that mole settles, and for an option that is not installed."""
    if key in _SETTLED:
        raise ValueError(
            f"{override.input_line}: mole keeps its own folders, so that {key} cannot act; give {_SETTLED[key]}=…"
        )
    known = tree.options(key) if key.startswith("hydra/") else []
    if not known or override.is_delete() or override.is_sweep_override() or override.value() is None:
        return
    option = _text(override.value())
    if option in known:
        return
    near = nearest(option, known, 1)
    hint = f"; did you mean {key}={near[0]}?" if near else ""
    if option in _PLUGINS:
        hint = f"; another package brings it: pip install {_PLUGINS[option]}"
    raise ValueError(f"{key}={option}: no such option{hint}   known: {', '.join(known)}")


def _parse(word: str) -> Override:
    """One parsed override. What the grammar refuses (`#`, `&`, letters beyond ASCII …) is taken as quoted text."""
    if word.startswith("="):
        raise ValueError(f"{word!r}: settings have the form key=value")
    parser = OverridesParser.create()
    try:
        return parser.parse_override(word)
    except HydraException:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{word!r}: settings have the form key=value") from None
        if "," in value:
            raise ValueError(
                f"{word}: a comma makes a sweep or a list; quote the value twice: {_twice(word)}"
            ) from None
        try:
            return parser.parse_override(f"{key}={quote(value)}")
        except HydraException:
            raise ValueError(f"{word!r}: no setting of the form key=value ({key!r} cannot be a key)") from None


def _choice(override: Override, group: str, chosen: str | None, tree: Tree) -> list[str]:
    if override.is_sweep_override():
        for option in override.sweep_string_iterator():
            _option(group, option, tree)
        return [str(override.input_line)]
    value = override.value()
    if value is None:
        return [f"~{group}"] if chosen is not None else []
    if isinstance(value, list):
        return _several(group, [_text(v) for v in value], chosen, tree)
    if isinstance(value, dict):
        raise ValueError(f"{group} takes the name of an option, not a mapping; known: {', '.join(tree.options(group))}")
    text = _text(value)
    if group in _ADDRESSES and text not in tree.options(group) and _is_address(text):
        option, key = _ADDRESSES[group]
        scheme, separator, _ = text.partition("://")
        if separator:
            option = _SCHEMES.get(group, {}).get(scheme.lower(), option)
        if option in tree.options(group):
            return [f"{group}={option}", f"{group}.{key}={quote(text)}"]
    return [f"{group}={_option(group, text, tree)}"]


def _several(group: str, names: list[str], chosen: str | None, tree: Tree) -> list[str]:
    if not tree.takes_several(group):
        raise ValueError(f"{group}=[{','.join(names)}]: this command takes one {group}; write {group}=<name>")
    if not names:
        raise ValueError(f"{group}=[]: an empty list; known: {', '.join(tree.options(group))}")
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"{group}=[{','.join(names)}]: {', '.join(repeated)} is named twice")
    options = [_option(group, name, tree) for name in names]
    return [*([f"~{group}"] if chosen is not None else []), *(f"+{group}@{group}s.{o}={o}" for o in options)]


def _option(group: str, text: str, tree: Tree) -> str:
    """The option that is meant: options are flat names, `glue/rte` is taken for `glue_rte`. Raises ValueError."""
    known = tree.options(group)
    for name in (text, text.replace("/", "_")):
        if name in known:
            return name
    if remark := tree.remark(group, text):
        raise ValueError(f"{group}={text}: {remark}")
    near = nearest(text, known, 1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    folder = f"; a folder is written {group}=./{text}" if group in _ADDRESSES else ""
    folder += f", a Hub id without an owner backbone=pretrained backbone.path={text}" if group == "backbone" else ""
    raise ValueError(f"{group}={text}: no such option{hint}   known: {', '.join(known) or 'none'}{folder}")


def _is_address(text: str) -> bool:
    return "/" in text or text.startswith((".", "~")) or Path(text).is_dir()


def _text(value: object) -> str:
    return str(getattr(value, "text", value))  # Hydra wraps quoted text
