"""conf/ agrees with the dataclasses in fields, order, defaults; every option composes wherever it can be chosen."""

import dataclasses
import functools
import importlib.util
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mole import registry
from mole.cli.main import COMMANDS
from mole.command import Command
from mole.config import yaml_files
from mole.config.checks import ConfigProblems, dump, validate
from mole.config.engine import engine, plain
from mole.config.overrides import rewrite

CONF = yaml_files.conf_dir()
PRESETS = "experiment"
FILLED = {
    "dataset": "arithmetic",
    "library": "local",
    "method": "linear",
    "router": "top_k",
}  # for choices that are required
BESIDE = {"edit-moe": ["add=[sums]"]}  # what a command needs beside them
REGISTRIES = {found.group: found for found in vars(registry).values() if isinstance(found, registry.Registry)}


def is_written(command: Command) -> bool:
    try:
        return importlib.util.find_spec(command.module_name) is not None
    except ModuleNotFoundError:
        return False


WRITTEN = [c for c in COMMANDS.values() if is_written(c) and (CONF / f"{c.config_name}.yaml").is_file()]
PRIMARY = sorted(CONF.glob("*.yaml"))
OPTIONS = sorted(f for f in CONF.glob("*/*.yaml") if f.parent.name != PRESETS)
PAIRS = [
    (command, group, file.stem)
    for command in WRITTEN
    for group in yaml_files.defaults(CONF / f"{command.config_name}.yaml")
    for file in sorted((CONF / group).glob("*.yaml"))
]


def overridden(file: Path) -> set[str]:
    """The groups in which a preset chooses."""
    listed = OmegaConf.to_container(OmegaConf.load(file), resolve=False).get("defaults", [])
    keys = [key for entry in listed if isinstance(entry, dict) for key in entry]
    return {key.removeprefix("override /") for key in keys if key.startswith("override /")}


def dataclasses_in(annotation: Any) -> Iterator[type]:
    """Every dataclass in a type: the members of a union, the values of a mapping."""
    if dataclasses.is_dataclass(annotation):
        yield annotation  # type: ignore[misc]
    for inner in typing.get_args(annotation):
        yield from dataclasses_in(inner)


@functools.cache
def schema_of(command: Command) -> Any:
    return command.load()[0]


@functools.cache
def variants() -> dict[str, dict[str, Any]]:
    """Group → name → config dataclass, from the fields of all commands and from the registries."""
    found: dict[str, dict[str, Any]] = {}
    for command in WRITTEN:
        for key, field in schema_of(command).__pydantic_fields__.items():
            for config in dataclasses_in(field.annotation):
                name = config.__pydantic_fields__.get("name")  # type: ignore[attr-defined]
                if name is not None and not name.is_required():
                    found.setdefault(key, {})[name.default] = config
    for group, members in REGISTRIES.items():
        found.setdefault(group, {}).update({variant.name: variant.config for variant in members})
    return found


def written_values(file: Path) -> dict[str, Any]:
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(node, dict)
    return {str(k): v for k, v in node.items() if k != "defaults"}


def assert_agrees(values: dict[str, Any], config: Any, groups: set[str], where: str) -> None:
    fields = {f.alias or k: f for k, f in config.__pydantic_fields__.items() if k not in groups}
    assert sorted(values) == sorted(fields), f"{where}: other fields than {config.__name__}"
    named = "name" in fields and typing.get_origin(fields["name"].annotation) is typing.Literal
    assert not named or next(iter(values)) == "name", f"{where}: the registry name comes first"
    for key, field in fields.items():
        nested = next(dataclasses_in(field.annotation), None)
        if isinstance(values[key], dict) and values[key] and nested is not None:
            assert_agrees(values[key], nested, set(), f"{where}.{key}")
            continue
        if field.is_required():
            is_open = values[key] == "???" or "${" in str(values[key])
            assert is_open, f"{where}.{key} has no default in {config.__name__}: write ???"
        else:
            default = field.get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            assert values[key] == default, f"{where}.{key}: {values[key]!r}, but {default!r} in {config.__name__}"
            assert type(values[key]) is type(default), f"{where}.{key}: {values[key]!r}, but {default!r}"


ADDRESSES = {"hub": "hf://user/repository", "s3": "s3://bucket/prefix", "azure": "az://account/container"}


def filled(command: Command, node: dict[str, Any], required: list[str]) -> Any:
    """The validated configuration, with something in place of every value that must be given."""
    for _ in range(3):
        try:
            return validate(schema_of(command), node, required=required)
        except ConfigProblems as error:
            keys = [line.partition(":")[0] for line in error.lines if ": required" in line]
            lists = [line.partition(":")[0] for line in error.lines if "must be a list, got" in line]
            if not keys and not lists:
                raise
            for key in (*keys, *lists):
                *parents, last = key.split(".")
                here = functools.reduce(lambda inner, part: inner.setdefault(part, {}), parents, node)
                here[last] = ["x"] if key in lists else ADDRESSES.get(here.get("name"), "x") if last == "url" else "x"
    raise AssertionError(f"{command.name} cannot be filled: {node}")


def test_every_file_belongs_to_a_command_or_a_group():
    names = {command.config_name for command in COMMANDS.values()}
    assert {file.stem for file in PRIMARY} <= names
    groups = {group for command in WRITTEN for group in yaml_files.defaults(CONF / f"{command.config_name}.yaml")}
    assert {file.parent.name for file in OPTIONS} <= groups
    assert not [f for f in CONF.rglob("*") if f.is_file() and f.suffix != ".yaml"]


def test_every_command_has_its_file():
    assert {c.config_name for c in COMMANDS.values() if is_written(c)} <= {file.stem for file in PRIMARY}


@pytest.mark.parametrize("group", REGISTRIES)
def test_every_registered_variant_has_a_file_and_every_file_a_variant(group):
    for command in WRITTEN:
        schema_of(command)  # their imports fill the registries
    assert REGISTRIES[group].names() == sorted(f.stem for f in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("file", OPTIONS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_an_options_file_agrees_with_its_dataclass(file):
    values, group = written_values(file), file.parent.name
    assert values.get("name") == file.stem
    assert file.stem in variants()[group], f"{group}/{file.stem} is not known to any command"
    assert_agrees(values, variants()[group][file.stem], set(), f"{group}/{file.stem}")


@pytest.mark.parametrize("command", WRITTEN, ids=lambda c: c.config_name)
def test_a_commands_file_agrees_with_its_dataclass(command):
    file = CONF / f"{command.config_name}.yaml"
    groups = set(yaml_files.defaults(file))
    own = groups & set(schema_of(command).__pydantic_fields__)
    assert groups - own <= {PRESETS}, "a group that is no field"
    assert_agrees(written_values(file), schema_of(command), own, command.config_name)


@pytest.mark.parametrize("file", [*PRIMARY, *sorted(CONF.glob("*/*.yaml"))], ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_field_is_commented_and_every_file_begins_with_a_sentence(file):
    assert yaml_files.sentence(file).endswith((".", "?", "!"))
    entries = yaml_files.entries(file).values()
    parents = {e.key.rpartition(".")[0] for e in entries}
    bare = [e.key for e in entries if not e.comment and e.key not in parents]
    assert not bare, "no comment"


@pytest.mark.parametrize("file", [*PRIMARY, *sorted(CONF.glob("*/*.yaml"))], ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_no_value_reads_as_something_else_in_yaml_1_1(file):
    for event in yaml.parse(file.read_text(encoding="utf-8")):
        if isinstance(event, yaml.ScalarEvent) and event.style is None:
            assert event.value.lower() not in ("yes", "no", "on", "off", "y", "n", "~")
            assert not (event.value.startswith("0") and event.value.isdigit() and len(event.value) > 1)


def test_no_preset_carries_the_name_of_a_variant():
    presets = {file.stem for file in (CONF / PRESETS).glob("*.yaml")}
    assert presets
    assert not presets & {file.stem for file in [*OPTIONS, *PRIMARY]}


@pytest.mark.parametrize(("command", "group", "option"), PAIRS, ids=lambda p: getattr(p, "config_name", p))
def test_every_option_composes_and_validates_under_every_command_that_has_its_group(command, group, option):
    with engine(command.config_name) as tree:
        itself = {group, *overridden(CONF / group / f"{option}.yaml")}
        chosen = [f"{g}={o}" for g, o in FILLED.items() if tree.groups().get(g, "") is None and g not in itself]
        if group == PRESETS and not overridden(CONF / group / f"{option}.yaml") <= set(tree.groups()):
            pytest.skip(f"{option} chooses what {command.name} does not have")
        has = {*tree.groups(), *tree.compose(rewrite(chosen, tree))}
        if group == PRESETS and not set(written_values(CONF / group / f"{option}.yaml")) <= has:
            pytest.skip(f"{option} sets what {command.name} does not have")
        chosen += BESIDE.get(command.name, [])
        node = plain(tree.compose(rewrite([f"{group}={option}", *chosen], tree)))
        config = filled(command, node, tree.required())
    if group != PRESETS:
        assert getattr(config, group).name == option
    assert validate(type(config), dump(config)) == config


@pytest.mark.parametrize(
    "command",
    [c for c in WRITTEN if not yaml_files.defaults(CONF / f"{c.config_name}.yaml")],
    ids=lambda c: c.config_name,
)
def test_a_command_without_groups_validates(command):
    with engine(command.config_name) as tree:
        config = filled(command, plain(tree.compose()), [])
    assert validate(type(config), dump(config)) == config


@pytest.mark.parametrize(
    "command",
    [c for c in WRITTEN if "dataset" in yaml_files.defaults(CONF / f"{c.config_name}.yaml")],
    ids=lambda c: c.config_name,
)
def test_a_command_with_datasets_takes_a_list_of_them(command):
    with engine(command.config_name) as tree:
        others = [f"{g}={o}" for g, o in FILLED.items() if tree.groups().get(g, "") is None and g != "dataset"]
        others += BESIDE.get(command.name, [])
        node = plain(tree.compose(rewrite(["dataset=[arithmetic,reverse]", *others], tree)))
        config = filled(command, node, tree.required())
    assert list(config.datasets) == ["arithmetic", "reverse"]
    assert config.dataset is None


def test_something_was_found():
    assert len(WRITTEN) >= 10
    assert len(PAIRS) >= 30
    assert len(OPTIONS) >= 20
