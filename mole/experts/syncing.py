"""Two libraries brought to the same state, both ways, without guessing: what was changed on both sides is left alone.

<local library>/.mole/sync/<sha256 of the other's address, 16 hex>.json      name → revision after the last time
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mole.experts.backends import LocalBackend
from mole.experts.card import Card
from mole.experts.card_cache import address_of
from mole.experts.copying import Action, Copied, cards_there, carry_out, comes_from
from mole.experts.errors import LibraryError
from mole.experts.library import ExpertLibrary
from mole.experts.names import is_name
from mole.untrusted import Damaged, read_file, strict_json

_MAX_STATE_BYTES = 64 << 20


@dataclass(frozen=True)
class Synced:
    """What is done with one name, and why; `side` is the address of the library that is written, "" if none is.

    `revision` is what both sides have then, None if they have not the same. `action` says what a copy is.
    """

    name: str
    what: Literal["equal", "copy", "gone", "remove", "conflict"]
    why: str
    side: str = ""
    revision: str | None = None
    action: Action | None = None


@dataclass(frozen=True)
class _Side:
    """A library and the cards that it had when the sync began."""

    library: ExpertLibrary
    cards: dict[str, Card]

    @property
    def url(self) -> str:
        return self.library.url


def sync(
    one: ExpertLibrary,
    other: ExpertLibrary,
    *,
    delete: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Synced]:
    """Copy what was changed on one side only since the last time to the other side.

    What was changed on both is told and left alone, unless one comes from the other. What is gone on one side is told,
    and with `delete` removed from the other, if it was not changed there. One of the two has to be a folder: it
    remembers the state. Raises LibraryError, Conflict if somebody writes at the same time.
    """
    file = _state_file(one, other)
    here, there = _Side(one, cards_there(one)), _Side(other, cards_there(other))
    if not here.cards and not there.cards:
        one.names()  # or it would not be told that neither is there
    before = _read_state(file)
    for side in (here, there):
        side.library.check_writable()
    steps = [_step(name, here, there, before.get(name), delete) for name in sorted({*here.cards, *there.cards})]
    if dry_run:
        return steps
    for source, target in ((here, there), (there, here)):
        copies = [step for step in steps if step.what == "copy" and step.side == target.url]
        work = [Copied(s.name, s.action or "add", source.cards[s.name], target.cards.get(s.name)) for s in copies]
        carry_out(work, source.library, target.library, progress=progress)
        _remove(target, [step.name for step in steps if step.what == "remove" and step.side == target.url])
    _write_state(file, {s.name: found for s in steps if (found := s.revision or _left(s, before))})
    return steps


def _step(name: str, here: _Side, there: _Side, before: str | None, delete: bool) -> Synced:
    a, b = here.cards.get(name), there.cards.get(name)
    if a is None:
        assert b is not None
        return _half(name, b, (there, here), before, delete)
    if b is None:
        return _half(name, a, (here, there), before, delete)
    if a.revision == b.revision:
        return Synced(name, "equal", "the same on both sides", revision=a.revision)
    for new, old, source, target in ((a, b, here, there), (b, a, there, here)):
        if comes_from(new, old) or (before == old.revision and not comes_from(old, new)):
            kind = "edit" if new.content == old.content else "update"
            return Synced(name, "copy", f"changed in {source.url}", target.url, new.revision, kind)
    return Synced(name, "conflict", f"changed on both sides: {a.revision[:8]} and {b.revision[:8]}")


def _half(name: str, card: Card, sides: tuple[_Side, _Side], before: str | None, delete: bool) -> Synced:
    """What is done with an expert that the first of `sides` has and the second has not."""
    keeper, missing = sides
    if before is None:
        return Synced(name, "copy", f"new in {keeper.url}", missing.url, card.revision, "add")
    if before != card.revision:
        return Synced(name, "conflict", f"gone from {missing.url}, changed in {keeper.url}")
    if delete:
        return Synced(name, "remove", f"gone from {missing.url}", keeper.url)
    return Synced(name, "gone", f"gone from {missing.url}; delete=true removes it from {keeper.url} as well")


def _left(step: Synced, before: Mapping[str, str]) -> str | None:
    """The state of what was left alone: as it was."""
    return before.get(step.name) if step.what in ("gone", "conflict") else None


def _remove(side: _Side, names: Sequence[str]) -> None:
    if names:
        with side.library.batch() as batch:
            for name in names:
                batch.remove_expert(name, expect=side.cards[name].revision)


def _state_file(one: ExpertLibrary, other: ExpertLibrary) -> Path:
    for library, far in ((one, other), (other, one)):
        if isinstance(library.backend, LocalBackend):
            address = address_of(far.backend)
            if address == str(library.backend.root):
                raise LibraryError(f"{one.url} and {other.url} are one library")
            return library.backend.root / ".mole" / "sync" / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}.json"
    raise LibraryError("one of the two libraries of a sync has to be a folder: it remembers the state of the last time")


def _read_state(file: Path) -> dict[str, str]:
    try:
        state = strict_json(read_file(file, _MAX_STATE_BYTES), str(file), max_bytes=_MAX_STATE_BYTES)
    except FileNotFoundError:
        return {}
    rows = state.get("revisions") if isinstance(state, dict) and state.get("format") == 1 else None
    if not isinstance(rows, dict) or not all(is_name(n) and isinstance(r, str) for n, r in rows.items()):
        raise Damaged(f"{file} is not the state of a sync; remove it to compare both sides anew")
    return rows


def _write_state(file: Path, revisions: Mapping[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}-{uuid.uuid4().hex}")
    new.write_text(json.dumps({"format": 1, "revisions": dict(sorted(revisions.items()))}, indent=1), encoding="utf-8")
    os.replace(new, file)
