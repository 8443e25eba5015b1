"""Which experts a checkpoint means, and where they are: names first, then every place where they may lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mole.xlora.places import ReadExpert, as_place, expert_folder, find_expert, read_expert

_PART = re.compile(r"[^/\\\0]{1,255}")

Wanted = dict[str, tuple[str, Any, Any]]  # name → (its name in the checkpoint, the place given now, the place stored)


def wanted_experts(saved: Sequence[str] | Mapping[str, Any] | None, given: Any, what: str) -> Wanted:
    """The experts in the checkpoint's order.

    `saved` is what the checkpoint says: names, names with places, or nothing; `given` what the caller says: None,
    names, or names with places. Raises ValueError if they are not the same experts, showing both.
    """
    if given is not None and not isinstance(given, Mapping | list | tuple):
        raise ValueError(f"adapters: got {type(given).__name__}, need a dict name → path, a list of names, or None")
    places = dict(given) if isinstance(given, Mapping) else {}
    names = None if given is None else list(given)
    stored = dict(saved) if isinstance(saved, Mapping) else dict.fromkeys(saved or ())
    if not stored:
        if not names:
            raise ValueError(
                f"{what} does not name its experts: pass adapters={{name: path}}, in the order that the router was "
                "trained with"
            )
        return {name: (name, places.get(name), None) for name in names}
    if names is None or set(names) == set(stored):
        return {name: (name, places.get(name), place) for name, place in stored.items()}
    numbers = list(stored) == [str(index) for index in range(len(stored))]
    if numbers and places and len(names) == len(stored):
        return {name: (old, places[name], stored[old]) for name, old in zip(names, stored, strict=True)}
    raise ValueError(f"adapters: got {names}, need the experts of {what}: {list(stored)}")


def read_experts(
    wanted: Wanted, folder: Path, what: str, *, local_files_only: bool, stored_first: bool = False
) -> dict[str, ReadExpert]:
    """Each expert from the place given, or from the first place in or beside the checkpoint that holds it."""
    found = {}
    for name, (saved_name, given, stored) in wanted.items():
        where = f"expert {name!r} of {what}"
        if given is not None:
            place = expert_folder(given, local_files_only=local_files_only, where=where)
            found[name] = read_expert(place, _source(given, place))
        else:
            found[name] = _search(saved_name, stored, folder, where, (local_files_only, stored_first))
    return found


def _source(given: Any, place: Path) -> str:
    """What a card says of where an expert came from: its folder, or the Hub id with the sub-folder."""
    text, inside = as_place(given)
    if Path(text).expanduser().is_dir():
        return str(place.resolve())
    return f"{text.rstrip('/')}/{inside}" if inside else text


def _search(saved_name: str, stored: Any, folder: Path, where: str, how: tuple[bool, bool]) -> ReadExpert:
    local_files_only, stored_first = how
    parts = saved_name.split("/")
    safe = all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)
    inside = [folder.joinpath(*parts), folder.joinpath("adapters", *parts)] if safe else []
    tried: list[str] = []
    if stored_first:
        places = [*_stored_places(stored, folder), *inside]
    else:
        places = [*inside, *_stored_places(stored, folder)]
    for place in places:
        if (expert := find_expert(place, str(place.resolve()))) is not None:
            return expert
        tried.append(str(place))
    if stored is not None:
        try:
            fetched = expert_folder(stored, local_files_only=local_files_only, where=where)
            return read_expert(fetched, _source(stored, fetched))
        except ValueError as error:
            tried.append(f"{'/'.join(part for part in as_place(stored) if part)} ({error})")
    raise ValueError(
        f"{where}: expected a PEFT folder with LoRA weights, found none in {'; '.join(tried) or 'the checkpoint'}; "
        "say where it is with adapters={name: path}"
    )


def _stored_places(stored: Any, folder: Path) -> list[Path]:
    """The folders here that a stored place may mean: its sub-folder beside the config, and itself."""
    if stored is None:
        return []
    text, subfolder = as_place(stored)
    parts = [part for part in text.split("/") if part][2:] + [part for part in (subfolder or "").split("/") if part]
    safe = parts and not text.startswith(("/", ".", "~")) and all(part not in (".", "..") for part in parts)
    beside = [folder.joinpath(*parts)] if safe else []
    return [*beside, Path(text).expanduser() / (subfolder or "")]
