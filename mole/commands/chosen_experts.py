"""Which experts a mixture is made of: names in a library, or names with a place for each, inline or in a JSON file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mole import mixtures
from mole.commands.library.opening import library_of
from mole.experts import Expert, LibraryError, check_name, load_expert
from mole.experts.address import split_expert
from mole.experts.importing import Hints, import_expert
from mole.mixtures import Origin
from mole.untrusted import strict_json

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def chosen_experts(config: Any) -> tuple[dict[str, Expert], dict[str, Origin]]:
    """The experts that `config.experts` names, in its order, and where they come from.

    A list (or null: all) is of the library; a mapping, or the path of a JSON file with one, gives name → place: the
    folder of an expert or of a run, an address `<library>/<name>[@<revision>]`, or an AdapterHub folder. Paths in a
    file are relative to it; `${NAME}` stands for an environment variable. Raises ValueError that names everything that
    is wrong.
    """
    wanted = config.experts
    if wanted is None or isinstance(wanted, tuple):
        experts = mixtures.experts_of(library_of(config.library), wanted)
        return experts, mixtures.pinned(experts, config.library.url)
    home, what, places = Path(), "experts", wanted
    if isinstance(wanted, str):
        home, what, places = Path(wanted).parent, wanted, _read(wanted)
    found: dict[str, Expert] = {}
    problems = []
    for name, place in places.items():
        try:
            found[name] = _load(check_name(name), _resolved(place, home))
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(f"{what}: " + "\n".join(problems))
    return found, _origins(found, places)


def _read(path: str) -> dict[str, str]:
    """The mapping in a JSON file. Raises ValueError for another one, and for keys that are there twice."""
    file = Path(path).expanduser()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"experts={path}: cannot be read ({error.strerror}): give names as experts=[…], or a JSON file that maps "
            "names to places"
        ) from None
    node = strict_json(data, path)
    if not isinstance(node, dict) or not node or not all(isinstance(place, str) for place in node.values()):
        raise ValueError(f'{path}: not an object that maps names to places, such as {{"rte": "outputs/rte/expert"}}')
    return node


def _resolved(place: str, home: Path) -> str:
    """The place with variables filled in, a path relative to `home`. Raises ValueError for an unknown variable."""

    def value(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"the environment has no variable {match[1]}")
        return os.environ[match[1]]

    place = _VARIABLE.sub(value, place)
    return place if "://" in place or Path(place).is_absolute() else str(home / place)


def _load(name: str, place: str) -> Expert:
    folder = Path(place).expanduser()
    foreign = folder.is_file() or (folder / "adapter.safetensors").is_file() or any(folder.glob("*.p"))
    if foreign:  # a pickle is refused there, with the way out
        return import_expert(folder, hints=Hints(heads=(folder / "head_config.json").is_file()))
    if "://" not in place and not folder.exists() and not (folder.parent / ".mole").is_dir():
        raise LibraryError(f"{place}: there is no such folder, and no library in {folder.parent}")
    expert = load_expert(place)
    if expert.card.kind != "adapter":
        raise LibraryError(f"{place} is a mixture, not an expert")
    return expert


def _origins(experts: Mapping[str, Expert], places: Mapping[str, str]) -> dict[str, Origin]:
    return dict(_each_origin(experts, places))


def _each_origin(experts: Mapping[str, Expert], places: Mapping[str, str]) -> Iterator[tuple[str, Origin]]:
    """Libraries that are paths are left out, as they mean nothing elsewhere."""
    for name, expert in experts.items():
        library = split_expert(places[name])[0] if "://" in places[name] else None
        tasks, content = expert.card.tasks, expert.card.content
        yield name, Origin(name=name, tasks=tasks, library=library, revision=expert.revision, content=content)
