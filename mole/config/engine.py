"""conf/, the user's folders and overrides → one composed configuration, through Hydra's engine by public calls only.

A name of the ConfigStore is used in one place, for `--from`: a saved run stands in for the command's primary config.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from mole.config import yaml_files
from mole.config.overrides import WRAPPED, rewrite
from mole.config.yaml_files import conf_dir

# mole owns the run's folder and log: no `.hydra/` (it would keep what was typed), no log set-up, no folder of Hydra's.
QUIET = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.run.dir=.")
_SAVED = "mole-saved-run"


class UserFolders(SearchPathPlugin):
    """Puts the user's config folders before the packaged one, for groups and primary configs alike."""

    folders: ClassVar[tuple[Path, ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.folders:  # each right before the packaged one
            search_path.prepend("mole-user", f"file://{folder}", SearchPathQuery(provider="main"))


def folders() -> tuple[Path, ...]:
    """Where configurations are looked for inside `with engine(…)`: the user's folders, then the packaged conf/."""
    return (*UserFolders.folders, conf_dir())


@contextmanager
def engine(command: str, user_folders: Sequence[str | Path] = ()) -> Iterator["Engine"]:
    """Hydra's engine for one command (the name of its primary config); `user_folders` come before the packaged conf/.

    Raises ValueError if a folder does not exist. May be used inside itself.
    """
    found = []
    for folder in user_folders:
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise ValueError(f"no such folder of configurations: {folder}")
        found.append(path)
    outer, outer_folders = GlobalHydra.instance().hydra, UserFolders.folders
    Plugins.instance().register(UserFolders)
    GlobalHydra.instance().clear()
    UserFolders.folders = tuple(found)
    try:
        with hydra.initialize_config_dir(str(conf_dir()), job_name=command, version_base="1.3"):
            yield Engine(command, (*found, conf_dir()))
    finally:
        UserFolders.folders = outer_folders
        GlobalHydra.instance().hydra = outer


class Engine:
    """One command's view of the configuration tree."""

    def __init__(self, command: str, folders: tuple[Path, ...]):
        self.command, self.folders = command, folders
        self.config_name = command  # `--from` puts a saved run in its place
        self.hydra: Any = GlobalHydra.instance().hydra
        self._options: dict[str, list[str]] = {}
        self._groups: dict[tuple[str, ...], dict[str, str | None]] = {}
        self._saved: dict[str, Any] = {}  # the body of that run, and the file that has it
        self._saved_file: Path | None = None

    def groups(self, overrides: Sequence[str] = ()) -> dict[str, str | None]:
        """Every group that the command can select → the option chosen under `overrides` (None: none yet)."""
        key = (self.config_name, *overrides)
        if not overrides and self.config_name == self.command and not self._has_defaults():
            return {}  # as the engine would find out, which takes it longer than all else that a listing needs
        if key not in self._groups:
            loader = self.hydra.config_loader
            found = loader.compute_defaults_list(self.config_name, list(overrides), RunMode.RUN).overrides.known_choices
            kept = {g: option for g, option in found.items() if not g.startswith("hydra/") and "@" not in g}
            self._groups[key] = kept
        return dict(self._groups[key])

    def options(self, group: str) -> list[str]:
        """The options of a group, sorted, without presets for other commands; empty if there is no such group."""
        if group not in self._options:
            found = sorted(self.hydra.config_loader.get_group_options(group))
            self._options[group] = [o for o in found if group != "experiment" or not self._others(o)]
        return self._options[group]

    def remark(self, group: str, option: str) -> str:
        """What there is to be said of an option that this command has not; empty if there is nothing."""
        others = self._others(option) if group == "experiment" and self.file(group, option) else []
        return f"a preset for {', '.join(others)}, not for {self.command}" if others else ""

    def comment(self, key: str, overrides: Sequence[str] = ()) -> str:
        """What the files say about a key; empty if they say nothing."""
        parts = key.split(".")
        chosen: dict[str, str] = {**self.chosen(overrides)}
        for group in self.groups():
            if parts[0] == f"{group}s" and len(parts) > 2:  # several: each is called like its option, unless renamed
                parts = [group, *parts[2:]]
                chosen[group] = key.split(".")[1]
        file = self.file(parts[0], chosen[parts[0]]) if parts[0] in chosen else None
        entry = yaml_files.entries(file).get(".".join(parts[1:])) if file is not None else None
        entry = entry or yaml_files.entries(self.primary_file()).get(key)
        return entry.comment if entry else ""

    def primary_file(self) -> Path:
        """The command's own YAML: the user's if there is one. Raises ValueError."""
        file = self._first(f"{self.command}.yaml")
        if file is None:
            raise ValueError(f"no {self.command}.yaml in {', '.join(map(str, self.folders))}")
        return file

    def file(self, group: str, option: str) -> Path | None:
        """The file of one option, the user's first."""
        return self._first(f"{group}/{option}.yaml")

    def takes_several(self, group: str) -> bool:
        """Whether the command has a key in the plural, under which several options of the group find place."""
        return f"{group}s" in yaml_files.entries(self.primary_file())

    def required(self) -> list[str]:
        """Groups without a default that the command needs: those whose comment in its defaults list says so."""
        own = yaml_files.defaults(self.primary_file())
        return [group for group, comment in own.items() if comment.startswith("required")]

    def chosen(self, overrides: Sequence[str] = ()) -> dict[str, str]:
        """Group → the option that is chosen, where one is: of `overrides` what chooses counts, and no sweep does."""
        known = self.groups()
        choices = [o for o in overrides if o.lstrip("+~").partition("=")[0].partition("@")[0] in known]
        found = {group: option for group, option in self.groups(choices).items() if option}
        kept = {group: node.get("name") for group, node in self._saved.items() if isinstance(node, dict)}
        return {group: name for group, name in kept.items() if group in known and name} | found

    def open_keys(self, overrides: Sequence[str] = ()) -> set[str]:
        """Keys of mappings whose names the user chooses: `{}` in the files that give them; no group's plural."""
        files = [(f, f"{g}.") for g, o in self.chosen(overrides).items() if (f := self.file(g, o))]
        written = [
            (prefix + entry.key, entry.value)
            for file, prefix in [(self.primary_file(), ""), *files]
            if not yaml_files.is_global(file)
            for entry in yaml_files.entries(file).values()
        ]
        return {key for key, value in written if value == "{}"} - {f"{group}s" for group in self.groups()}

    def compose(self, overrides: Sequence[str] = ()) -> DictConfig:
        """The composed configuration, interpolations not yet resolved. Raises Hydra's and OmegaConf's errors."""
        return hydra.compose(self.config_name, list(overrides))

    def saved_run(self, body: dict[str, Any], switched: Sequence[str], file: Path | None = None) -> None:
        """Puts a saved configuration (that of `file`) in the place of the command's primary config.

        Each group in `switched` is composed anew and replaces what was saved; all else comes from `body`. What that
        lacks, because it is of another command or of an older version, is as the command's own files have it.
        """
        own: Any = OmegaConf.to_container(OmegaConf.load(self.primary_file()), resolve=False)
        gone = {*switched, *(f"{g}s" for g in switched)}
        kept = {k: v for k, v in body.items() if k not in gone}
        defaults: list[Any] = []
        for group, option in self.groups().items():
            if group in gone:
                option = None
            elif group in kept:  # the option's file stands under what was saved, for keys that were added since
                name = kept[group].get("name") if isinstance(kept[group], dict) else None
                option = name if name in self.options(group) else None
            defaults.append({group: option})
        self._saved, self._saved_file = body, file
        body = _over({k: v for k, v in own.items() if k != "defaults"}, kept)
        ConfigStore.instance().store(name=_SAVED, node={"defaults": [*defaults, "_self_"], **body})
        self.config_name = _SAVED

    def locate(self, key: str, overrides: Sequence[str] = ()) -> str:
        """File and line that gave `key` its value, as `experiment/x.yaml:3`; empty if no file did."""
        if any(o.lstrip("+~").partition("=")[0] == key for o in overrides):
            return ""
        if self._saved_file is not None and (entry := yaml_files.entries(self._saved_file).get(key)):
            return f"{self._saved_file}:{entry.line}"
        chosen = self.groups(overrides)
        found = [
            (f, "" if yaml_files.is_global(f) else f"{g}.") for g, o in chosen.items() if o and (f := self.file(g, o))
        ]
        presets = [place for place in reversed(found) if not place[1]]  # they stand over every other file
        for file, prefix in [*presets, *reversed([place for place in found if place[1]]), (self.primary_file(), "")]:
            if not key.startswith(prefix):
                continue
            entry = yaml_files.entries(file).get(key.removeprefix(prefix))
            if entry is not None:
                root = next(f for f in self.folders if file.is_relative_to(f))
                return f"{file.relative_to(root)}:{entry.line}"
        return ""

    def _others(self, preset: str) -> list[str]:
        """The commands that a preset is for, if this one is none of them."""
        file = self.file("experiment", preset)
        if file is None or not yaml_files.is_global(file) or _fits(file, self.primary_file()):
            return []
        files = {f.stem: f for folder in reversed(self.folders) for f in folder.glob("*.yaml")}
        return sorted(name for name, f in files.items() if name != self.command and _fits(file, f))

    def _has_defaults(self) -> bool:
        return "defaults" in self.primary_file().read_text(encoding="utf-8")

    def _first(self, name: str) -> Path | None:
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)


def _fits(preset: Path, primary: Path) -> bool:
    """Whether a command has every group that a preset chooses, and every key that it sets."""
    groups = yaml_files.defaults(primary)
    if "experiment" not in groups:
        return False
    known = {*groups, *(key.partition(".")[0] for key in yaml_files.entries(primary)), "hydra"}
    wanted = {*yaml_files.defaults(preset), *(key.partition(".")[0] for key in yaml_files.entries(preset))}
    return wanted <= known


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top` put over it, mapping by mapping."""
    both = {k: _over(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **both}


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain data with interpolations resolved.

    A required value that is absent (`???`) stays out, so that the schema reports all of them. A text that names an
    absent one keeps its interpolation: the absent key is reported, not everything that hangs on it.
    """
    return _plain(config)  # a mapping, as the root is one


def _plain(node: Any) -> Any:
    if isinstance(node, DictConfig):
        if list(node) == [WRAPPED]:
            return node[WRAPPED]
        return {str(k): _plain(_value(node, k)) for k in node if not OmegaConf.is_missing(node, k)}
    if isinstance(node, ListConfig):
        return [_plain(_value(node, i)) for i in range(len(node))]
    return node


def _value(node: Any, key: Any) -> Any:
    try:
        return node[key]
    except InterpolationToMissingValueError:
        return OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index, call-overload]
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or key}: {str(error).splitlines()[0]}") from None


def compose(command: str, overrides: Sequence[str] = (), config_dirs: Sequence[str | Path] = ()) -> dict[str, Any]:
    """The configuration of a command as plain data, for those who already have an override list that is right."""
    with engine(command, config_dirs) as found:
        return plain(found.compose(rewrite(overrides, found)))
