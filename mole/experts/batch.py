"""A batch: changes of a library that are prepared one by one and made together, or, if the body raises, not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.experts import artefacts
from mole.experts.backends.backend import Change
from mole.experts.card import Card
from mole.experts.damage import version_of_damaged
from mole.experts.errors import Conflict, Damaged, LibraryError, UnknownExpert
from mole.experts.expert import Expert, read_adapter
from mole.experts.names import check_name
from mole.registry import unknown

if TYPE_CHECKING:
    from mole.experts.library import ExpertLibrary

EDITABLE = ("tasks", "tags", "description", "license", "author", "data", "training", "scores", "extra")
_SHOWN = 5


class Batch:
    """What `library.batch()` gives. Each name may be changed once; nothing is written before the batch ends."""

    def __init__(self, library: ExpertLibrary, place: Path) -> None:
        self._library = library
        self._place = place
        self._changes: dict[str, Change] = {}
        self._told: dict[str, list[str]] = {}
        self._cards: dict[str, Card | None] = {}
        self._gone: set[str] = set()  # contents of what is removed

    def __len__(self) -> int:
        return len(self._changes)

    def add_expert(self, expert: Expert, expert_name: str, *, message: str | None = None) -> Card:
        """Publish an expert under a free name; whether it is free is seen when the batch ends."""
        card = expert.card if message is None else expert.card.edited(message=message)
        self._put("add", expert_name, expert.with_card(card), None, parse=True)
        return card

    def update_expert(self, name: str, expert: Expert, *, expect: str | None = None, message: str = "") -> Card:
        """Put another revision in the place of the one that is there. Raises Conflict if that is not `expect`.

        What is there and damaged is replaced by the expert as it is: nobody can tell what it follows.
        """
        try:
            current, version = self._library.expected(name, expect)
        except Damaged:
            version = version_of_damaged(self._library, name, expect)
            self._put("update", name, expert, version, parse=True)
            return expert.card
        if expert.revision == current.revision:
            return current
        card = expert.card.next_after(current, message or expert.card.message)
        self._put("update", name, expert.with_card(card), version, parse=True)
        return card

    def edit_card(self, name: str, *, expect: str | None = None, message: str = "", **facts: Any) -> Card:
        """Change facts of a card (see EDITABLE); the weights stay. What says nothing new is no change."""
        for key in facts:
            if key not in EDITABLE:
                raise LibraryError(unknown("field that can be edited", key, EDITABLE))
        current, version = self._library.expected(name, expect)
        if current.edited(**facts).revision == current.revision:
            return current
        card = current.edited(**facts, created=_now()).next_after(current, message or f"edited {', '.join(facts)}")
        self._put("edit", name, self._library.expert_of(name, current).with_card(card), version)
        return card

    def rename_expert(self, old: str, new: str, *, expect: str | None = None) -> Card:
        """Give an expert another name, which must be free; its card, with its history, stays what it is."""
        if check_name(new) == old:
            raise LibraryError(f"{old!r} is its name already")
        current, version = self._library.expected(old, expect)
        self._once(old)
        self._put("rename", new, self._library.expert_of(old, current), None)
        self._remove(old, version)
        return current

    def restore_expert(self, name: str, revision: str, *, expect: str | None = None, message: str = "") -> Card:
        """Put what an old revision says on top again, as a new revision; a removed expert comes back as it was."""
        expert = self._library.get_expert(name, revision)
        old = expert.card
        try:
            current, version = self._library.expected(name, expect)
        except UnknownExpert:
            self._put("restore", name, expert, None)
            return old
        except Damaged:
            self._put("restore", name, expert, version_of_damaged(self._library, name, expect))
            return old
        if current.revision == old.revision:
            return current
        told = message or f"restored {old.revision[:8]}"
        card = old.edited(created=_now()).next_after(current, told)
        self._put("restore", name, expert.with_card(card), version)
        return card

    def remove_expert(self, name: str, *, expect: str | None = None) -> Card | None:
        """Take an expert away. Raises Conflict if it is not at `expect`, UnknownExpert.

        Returns its card; None if that is damaged.
        """
        current = None
        try:
            current, version = self._library.expected(name, expect)
            self._gone.add(current.content)
        except Damaged:
            version = version_of_damaged(self._library, name, expect)
        self._remove(name, version)
        self._told.setdefault("remove", []).append(name)
        return current

    def put(self, action: str, name: str, expert: Expert, there: Card | None) -> None:
        """Publish an expert as it stands in another library, in the place of the card that was seen `there`; `replace`
        without one: of what is damaged there.
        """
        version = None
        if there is None and action == "replace":
            version = version_of_damaged(self._library, name, None)
        elif there is not None:
            _, version = self._library.expected(name, there.revision)
        self._put(action, name, expert, version)

    def commit(self, message: str = "", readme: str | None = None) -> None:
        """Make all changes; every `expect` is checked before the first is written. Called when the batch ends."""
        if not self._changes and readme is None:
            return
        more = {} if readme is None else {"readme": readme}
        try:
            head = self._library.backend.apply(list(self._changes.values()), message or self._summary(), **more)
        except Conflict as error:
            if len(self._changes) == 1 and (added := self._told.get("add") or self._told.get("rename")):
                raise self._library.taken(added[0], error.revision) from None
            raise
        for name, card in self._cards.items():
            self._library.saw(name, card)
        if head is not None and len(self._changes) > 1:
            self._library.wrote(head, self._cards)
        if self._gone:
            artefacts.remove_orphans(self._library, self._gone)

    def _put(self, action: str, name: str, expert: Expert, version: str | None, *, parse: bool = False) -> None:
        self._once(check_name(name))
        folder = self._place / f"{len(self._changes)}"
        folder.mkdir()
        expert.write_into(folder)
        if parse and expert.card.kind == "adapter":
            read_adapter(folder, expert.card)
        self._changes[name] = Change(name, folder, version)
        self._cards[name] = expert.card
        self._told.setdefault(action, []).append(name)

    def _remove(self, name: str, version: str) -> None:
        self._once(name)
        self._changes[name] = Change(name, None, version)
        self._cards[name] = None

    def _once(self, name: str) -> None:
        if name in self._changes:
            raise LibraryError(f"{name!r} is changed twice in one batch; end it, and begin another one")

    def _summary(self) -> str:
        """A line about the batch: `Add a, b; remove c`."""
        return "; ".join(f"{action} {_listed(names)}" for action, names in self._told.items()).capitalize()


@contextmanager
def open_batch(library: ExpertLibrary, message: str = "", readme: str | None = None) -> Iterator[Batch]:
    """A batch on `library`; `message` is the title of what is written, where the backend keeps one."""
    with tempfile.TemporaryDirectory(prefix="mole-batch-") as place:
        batch = Batch(library, Path(place))
        yield batch
        batch.commit(message, readme)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
