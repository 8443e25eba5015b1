"""What was computed from experts and is kept beside them: found by the digest of all that it was made from.

Prototypes, gates, embeddings, scores of single examples: computed once, never part of an expert, no expert's revision
changes by them. They lie in the backend's second namespace under the laws of the first.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.experts import folder as folders
from mole.experts.artefact_card import ArtefactCard, artefact_key, artefact_name, new_artefact
from mole.experts.backends import Backend, LocalBackend
from mole.experts.backends.backend import Change, Garbage
from mole.experts.backends.entries import ARTEFACTS
from mole.experts.card import bytes_facts
from mole.experts.card_cache import library_folder
from mole.experts.errors import Conflict, LibraryError, NoLibrary, ReadOnly, UnknownExpert
from mole.untrusted import FLOATS, safetensors_tensors, strict_json

if TYPE_CHECKING:
    from torch import Tensor

    from mole.experts.library import ExpertLibrary

Value = Any  # tensors by name, or plain data as JSON has it
MAX_JSON_BYTES = 64 << 20
_DTYPES = {**FLOATS, "F64": 8, "I64": 8, "I32": 4}
_BATCH = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """All that an artefact is made from: kind, number of the code, config, contents, digests of the rest."""

    kind: str
    code: int
    config: dict[str, Any]
    experts: tuple[str, ...]
    backbone: str | None = None
    data: str | None = None

    @property
    def key(self) -> str:
        """The digest of it."""
        return artefact_key(self.kind, self.code, self.config, self.experts, backbone=self.backbone, data=self.data)

    @property
    def name(self) -> str:
        """The name that the artefact has in every library."""
        return artefact_name(self.kind, self.experts, self.key)


@dataclass(frozen=True)
class Stored:
    """An artefact in a library: its name there, its card, and the experts of the library that it was computed from."""

    name: str
    card: ArtefactCard
    experts: tuple[str, ...]


def contents(library: ExpertLibrary, names: str | Iterable[str]) -> tuple[str, ...]:
    """The contents of the experts with these names, sorted. Raises UnknownExpert, LibraryError for none."""
    if isinstance(names, str):
        return (library.card(names).content,)
    cards, problems = library.named(names)
    if problems:
        raise problems[min(problems)]
    if not cards:
        raise LibraryError("an artefact is computed from one expert at least")
    return tuple(sorted({card.content for card in cards.values()}))


def get(library: ExpertLibrary, making: Making, compute: Callable[[], Value] | None) -> Value:
    """The stored artefact, or what `compute` gives, which is stored; who loses a race takes the winner's."""
    kept = _kept(library)
    for place in (library.backend.derived, *kept):
        found = _read(place, making)
        if found is not None:
            return found[0]
    if compute is None:
        raise UnknownExpert(f"{library.url} has no {making.kind} computed from that with this config: {making.name}")
    file, data = _dump(compute())
    value = _parsed(file, data, making.name)  # or something would be stored that cannot be read
    card = new_artefact(
        making.kind,
        making.code,
        making.config,
        making.experts,
        {file: bytes_facts(data)},
        backbone=making.backbone,
        data=making.data,
    )
    for place in (*(() if library.read_only else (library.backend.derived,)), *kept):
        try:
            return _store(place, making, card, file, data)
        except ReadOnly as error:
            logger.info("%s: %s is not stored there: %s", library.url, making.name, error)
    return value


def stored(library: ExpertLibrary, name: str | None, kind: str | None) -> list[Stored]:
    """The artefacts that lie in a library; `kind` is compared exactly."""
    cards, _ = library.look()
    if name is not None and name not in cards:
        cards = {name: library.card(name)}
    names = {}
    for expert, card in cards.items():
        names.setdefault(card.content, []).append(expert)
    found = []
    for entry, card in _cards(library.backend.derived, kind=kind):
        experts = tuple(sorted(expert for content in card.experts for expert in names.get(content, ())))
        if name is None or name in experts:
            found.append(Stored(entry, card, experts))
    return found


def remove(library: ExpertLibrary, rows: Iterable[Stored]) -> None:
    """Take artefacts away; those that are gone already are no error."""
    _remove(library.backend.derived, [row.name for row in rows])


def remove_orphans(library: ExpertLibrary, gone: Collection[str]) -> None:
    """After experts were removed: take away what was computed from contents that no expert has any more.

    It only saves space, so what goes wrong is told and is no error.
    """
    try:
        derived = library.backend.derived
        names = [name for name in _names(derived) if any(name.startswith(f"{content[:16]}.") for content in gone)]
        if names:
            still = {card.content[:16] for card in library.look()[0].values()}
            _remove(derived, [name for name in names if name[:16] not in still])
    except LibraryError as error:
        logger.info("%s: what was computed from removed experts stays until mole library gc: %s", library.url, error)


def collect(library: ExpertLibrary, keep: int, *, dry_run: bool) -> list[Garbage]:
    """The artefacts of which an expert is gone, and none of the `keep` revisions before the current has its content."""
    cards, problems = library.look()
    if problems:  # a card that cannot be read may be the one that they were computed from
        return []
    needed = {card.content for card in cards.values()}
    needed |= {row["content"] for card in cards.values() for row in card.history[:keep]}
    found = [(name, card) for name, card in _cards(library.backend.derived) if not needed.issuperset(card.experts)]
    if not dry_run:
        _remove(library.backend.derived, [name for name, _ in found])
    return [Garbage(f"artefact {name}", "its expert is gone", card.size) for name, card in found]


def copy(source: ExpertLibrary, target: ExpertLibrary) -> int:
    """Copy the artefacts that the target lacks; returns how many."""
    origin, derived = source.backend.derived, target.backend.derived
    missing = sorted(set(_names(origin)) - set(_names(derived)))
    for begin in range(0, len(missing), _BATCH):
        with tempfile.TemporaryDirectory(prefix="mole-artefacts-") as place:
            changes = []
            for name in missing[begin : begin + _BATCH]:
                folder = Path(place) / name
                folder.mkdir()
                origin.fetch(name, folder)
                changes.append(Change(name, folder, None))
            derived.apply(changes, f"Copy {len(changes)} artefacts")
    return len(missing)


def _names(derived: Backend) -> list[str]:
    try:
        return list(derived.cards())
    except NoLibrary:
        return []


def _cards(derived: Backend, kind: str | None = None) -> Iterator[tuple[str, ArtefactCard]]:
    names = [name for name in _names(derived) if kind is None or name.split(".")[1] == kind]
    for name, card in derived.read_cards(names) if names else ():
        if isinstance(card, ArtefactCard):
            yield name, card
        else:
            logger.warning("%s", card)


def _remove(derived: Backend, names: Iterable[str]) -> None:
    changes = []
    for name in names:
        try:
            changes.append(Change(name, None, derived.card(name)[1]))
        except UnknownExpert:
            continue
    if changes:
        derived.apply(changes, f"Remove {len(changes)} artefacts")


def _kept(library: ExpertLibrary) -> tuple[Backend, ...]:
    """Where artefacts of a library that cannot be written are kept on this machine."""
    if library.cache_dir is None:
        return ()
    return (LocalBackend(library_folder(library.cache_dir, library.backend) / "derived", entries=ARTEFACTS),)


def _read(place: Backend, making: Making) -> tuple[Value] | None:
    """The value that is stored, in a tuple, as it may be None itself. Raises Damaged."""
    with tempfile.TemporaryDirectory(prefix="mole-artefact-") as folder:
        try:
            card: Any = place.fetch(making.name, Path(folder))
        except (UnknownExpert, NoLibrary):
            return None
        if card.key != making.key:
            raise LibraryError(f"{place.url}/{making.name} was made from something else: {card.key}, not {making.key}")
        ((file, data),) = folders.verified_files(folder, card).items()
        return (_parsed(file, data, f"{place.url}/{making.name}"),)


def _store(place: Backend, making: Making, card: ArtefactCard, file: str, data: bytes) -> Value:
    with tempfile.TemporaryDirectory(prefix="mole-artefact-") as folder:
        (Path(folder) / file).write_bytes(data)
        folders.write_card(card, folder, ARTEFACTS)
        try:
            place.publish(making.name, Path(folder))
        except Conflict:
            found = _read(place, making)
            if found is None:
                raise
            return found[0]
    return _parsed(file, data, making.name)


def _dump(value: Value) -> tuple[str, bytes]:
    """The file of a value, and its bytes. Raises LibraryError for what has no place in one."""
    if isinstance(value, Mapping) and value and all(_is_tensor(item) for item in value.values()):
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {name: item.detach().cpu().contiguous() for name, item in value.items()}
        return "data.safetensors", save(tensors)
    try:
        return "data.json", json.dumps(value, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise LibraryError(f"an artefact is tensors by name, or what JSON has: {error}") from None


def _is_tensor(value: object) -> bool:
    return type(value).__module__.startswith("torch") and hasattr(value, "detach")


def _parsed(file: str, data: bytes, where: str) -> Value:
    if file == "data.safetensors":
        return safetensors_tensors(data, where, dtypes=_DTYPES)
    return strict_json(data, where, max_bytes=MAX_JSON_BYTES)
