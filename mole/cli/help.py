"""What `mole --help` and `mole <command> --help` print: from a static table, and from the comments in conf/."""

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.command import Command

if TYPE_CHECKING:
    from mole.config.engine import Engine

PURPOSES = {
    "train": "train experts and routers",
    "mix": "build and use mixtures",
    "look": "look at what happened",
    "keep": "keep experts",
    "check": "check and look up",
}
FLAGS = (
    ("-h, --help [--all]", "this text; with --all also the groups of the engine and of sweeps"),
    ("-m, --multirun", "a sweep: every combination of values with commas is a run of its own"),
    ("--cfg job|hydra|all", "print the composed configuration as YAML, and do nothing else; --resolve, --package P"),
    ("--info [WHAT]", "the engine's views: all, config, defaults, defaults-tree, plugins, searchpath"),
    ("--config-dir DIR", "your own configurations, before the packaged ones; repeatable; also $MOLE_CONFIG_DIR"),
    ("--from RUN", "run again with that run's configuration and the overrides given, in a new folder"),
    ("--resume RUN", "continue a stopped run in its own folder from its newest complete checkpoint"),
    ("-q, -v", "less, more of the log"),
    ("--json", "machine-readable output of a listing"),
    ("--no-color", "no colour; also $NO_COLOR"),
    ("--version", "versions of mole and its main packages"),
)
_ONLY_RUNS = ("-m,", "--from", "--resume")
_EXAMPLES = (
    "mole train-expert dataset=arithmetic library=outputs/library name=sums",
    "mole xlora-train library=outputs/library dataset=[arithmetic,reverse]",
    "mole train-expert --help",
)


def overview(commands: Mapping[str, Command], family: str = "") -> str:
    """The commands with a phrase each, grouped by what they are for; those of one family ("library") alone if named."""
    shown = [c for c in commands.values() if not family or c.name.startswith(f"{family} ")]
    width = max(len(c.name) for c in shown) + 2
    lines = [f"usage: mole {family + ' ' if family else ''}<command> [group=option] [key=value] [flags]", ""]
    for purpose, phrase in PURPOSES.items():
        members = [c for c in shown if c.purpose == purpose]
        if members:
            lines += [phrase, *(f"  {c.name:<{width}}{c.phrase}" for c in members), ""]
    if family:
        return "\n".join([*lines, f"mole {family} <command> --help has the rest"])
    examples = [f"  {example}" for example in _EXAMPLES]
    last = ["", "mole <command> --help has the rest; mole completion bash|zsh|fish completes on TAB"]
    return "\n".join([*lines, "examples", *examples, *last])


def plain_command(command: Command, file: Path) -> str:
    """Help of a command without groups: its file's comments are all there is to say, and need no engine."""
    from mole.config import yaml_files

    rows = [(e.key, _short(e.value), e.comment) for e in yaml_files.entries(file).values() if e.is_leaf]
    return _page(command, yaml_files.sentence(file), [("settings (key=value)", rows)], has_run=False)


def full_command(command: Command, engine: "Engine", overrides: Sequence[str], show_all: bool) -> str:
    """Help of a command with groups: what is chosen under `overrides`, and the settings of that."""
    from mole.config import yaml_files
    from mole.config.saved import leaves

    chosen = engine.groups(overrides)
    own = yaml_files.defaults(engine.primary_file())
    required = set(engine.required())
    node = _unresolved(engine.compose(overrides))
    several = [g for g in chosen if node.get(f"{g}s")]
    groups = []
    order = sorted(chosen, key=lambda g: list(own).index(g) if g in own else len(own))
    for group in order:
        state = ",".join(node[f"{group}s"]) if group in several else chosen[group]
        state = state or ("required" if group in required else "none")
        comment = own.get(group, "")
        groups.append((group, state, f"of {', '.join(engine.options(group))}" + (f" ({comment})" if comment else "")))
    entries = {k: (e.value, e.comment) for k, e in yaml_files.entries(engine.primary_file()).items() if e.is_leaf}
    for group in order:
        option = chosen[group]
        file = engine.file(group, option) if option else None
        if file is not None and group in node:
            entries |= {f"{group}.{k}": (e.value, e.comment) for k, e in yaml_files.entries(file).items() if e.is_leaf}
    values = leaves(node)
    rows = []
    for key, (value, comment) in entries.items():
        if key.endswith(".name") and key.partition(".")[0] in chosen:
            continue  # said by the choice
        rows.append((key, _short(_value(values[key]) if key in values else value), comment))
    tables = [("choices (group=option)", groups), ("settings (key=value)", rows)]
    if show_all:
        tables.append(("the engine's groups, for sweeps: where their jobs run, how they are chosen", _hydra(engine)))
    return _page(command, yaml_files.sentence(engine.primary_file()), tables, has_run="run.folder" in entries)


def _page(
    command: Command, sentence: str, tables: Sequence[tuple[str, list[tuple[str, str, str]]]], has_run: bool
) -> str:
    optional = {name for _, rows in tables for name, value, _ in rows if value != "required"}
    operands = "".join(f" [<{o}>]" if o.rstrip("…") in optional else f" <{o}>" for o in command.operands)
    lines = [f"usage: mole {command.name}{operands} [group=option] [key=value] [flags]", "", sentence or command.phrase]
    for title, rows in tables:
        if rows:
            lines += ["", title, *_table(rows)]
    hidden = (() if has_run else _ONLY_RUNS) + (() if command.resumes else ("--resume",))
    flags = [(f, "", text) for f, text in FLAGS if not f.startswith(hidden)]
    lines += ["", "flags", *_table(flags)]
    if command.examples:
        lines += ["", "examples", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines)


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Three columns; the last one is wrapped."""
    first = max(len(row[0]) for row in rows) + 2
    second = max(len(row[1]) for row in rows)
    second += 2 if second else 0
    width = max(shutil.get_terminal_size((120, 24)).columns, first + second + 30)
    lines = []
    for name, value, text in rows:
        parts = textwrap.wrap(text, width - first - second - 2, break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(f"  {name:<{first}}{value:<{second}}{parts[0]}".rstrip())
        lines += [" " * (first + second + 2) + part for part in parts[1:]]
    return lines


def _hydra(engine: "Engine") -> list[tuple[str, str, str]]:
    said = {"hydra/launcher": "where the jobs of a sweep run (launcher: how one run is spread)"}
    return [
        (group, "", f"of {', '.join(engine.options(group))}" + (f" ({said[group]})" if group in said else ""))
        for group in ("hydra/launcher", "hydra/sweeper")
    ] + [("hydra.sweeper.params", "", "a sweep kept in YAML: key → values with commas")]


def _unresolved(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def _value(value: Any) -> str:
    if value == "???":
        return "required"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _short(text: str, longest: int = 34) -> str:
    text = "required" if text == "???" else text
    return text if len(text) <= longest else text[: longest - 1] + "…"
