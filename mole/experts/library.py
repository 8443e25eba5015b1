"""A library: experts under names, in a place that its backend knows. It has a backend; it is none."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole.experts.address import library_path
from mole.experts.backends import Backend, LocalBackend
from mole.experts.card import Card
from mole.experts.errors import Conflict, LibraryError, ReadOnly, UnknownExpert
from mole.experts.expert import Expert, read_adapter
from mole.experts.filters import keep
from mole.experts.names import check_name
from mole.registry import unknown
from mole.untrusted import shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Something wrong in a library: at an expert, or at an entry that is none."""

    name: str
    text: str


class ExpertLibrary:
    """Experts by name, always in the order of names. Constructors read and write nothing.

    `read_only` refuses every write. Errors are LibraryError and what derives from it.
    """

    def __init__(self, backend: Backend, *, read_only: bool = False):
        self.backend = backend
        self.read_only = read_only
        self._seen: dict[str, str] = {}  # name → revision that this object has read last

    @classmethod
    def open(cls, address: str, *, read_only: bool = False) -> ExpertLibrary:
        """The library at an address: today the path of a folder, or `file:///folder`."""
        return ExpertLibrary(LocalBackend(library_path(address)), read_only=read_only)

    @property
    def url(self) -> str:
        """The address."""
        return self.backend.url

    def __repr__(self) -> str:
        return f"ExpertLibrary({self.url!r})"

    def exists(self) -> bool:
        """Whether there is a library at the address; adding an expert makes one."""
        return self.backend.exists()

    def names(self) -> list[str]:
        """Names of all experts. Raises NoLibrary."""
        return list(self.backend.cards())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.backend.cards())

    def __contains__(self, name: object) -> bool:
        return name in self.backend.cards()

    def __getitem__(self, name: str) -> Expert:
        return self.get_expert(name)

    def card(self, name: str, revision: str | None = None) -> Card:
        """The card of one expert, or of an old revision of it (its first 8 to 64 digits)."""
        card, _ = self.backend.card(name, revision)
        if revision is None:
            self._seen[name] = card.revision
        return card

    def cards(self, where: Mapping[str, Any] | None = None) -> dict[str, Card]:
        """Name → card of every expert, or of those that `where` keeps (see `filters`). Raises if it keeps none."""
        cards = {}
        for name in self.names():
            try:
                cards[name] = self.card(name)
            except UnknownExpert:  # removed since the listing
                continue
        return keep(cards, where) if where else cards

    def get_expert(self, name: str, revision: str | None = None) -> Expert:
        """One expert: its card now, its weights, verified, when they are asked for."""
        card = self.card(name, revision)
        return Expert(card, fetch=lambda dest: self.backend.fetch(name, dest, card.revision))

    def check_free(self, name: str) -> None:
        """Raise LibraryError if no expert can be added under `name`: not a valid name, taken, or not to be written."""
        check_name(name)
        self._may_write()
        self.backend.check_writable()
        if self.exists():
            try:
                card = self.card(name)
            except UnknownExpert:
                return
            raise self._taken(name, card.revision)

    def add_expert(self, expert: Expert, expert_name: str, *, message: str | None = None) -> Card:
        """Publish an expert under a free name. The same revision again is no change. Returns the card as published.

        Raises Conflict if the name is taken by another revision.
        """
        self._may_write()
        check_name(expert_name)
        card = expert.card if message is None else expert.card.edited(message=message)
        try:
            self._publish(expert_name, expert.with_card(card), expect=None)
        except Conflict as error:
            raise self._taken(expert_name, error.revision) from None
        return card

    def update_expert(self, name: str, expert: Expert, *, expect: str | None = None, message: str = "") -> Card:
        """Put another revision in the place of the one that is there, which becomes the newest of its history.

        `expect` is the revision that is to be replaced; by default the one that this object read last, else the current
        one. Raises Conflict if the name is at another one. Returns the card as published.
        """
        self._may_write()
        current, version = self._expected(name, expect)
        if expert.revision == current.revision:
            return current
        card = expert.card.next_after(current, message or expert.card.message)
        self._publish(name, expert.with_card(card), expect=version)
        return card

    def remove_expert(self, name: str, *, expect: str | None = None) -> Card:
        """Take an expert away. `expect` as in `update_expert`. Returns the card of what was removed."""
        self._may_write()
        current, version = self._expected(name, expect)
        self.backend.remove(name, version)
        self._seen.pop(name, None)
        return current

    def history(self, name: str) -> list[dict[str, Any]]:
        """The revisions of an expert, the current one first: revision, content, created, message."""
        card = self.card(name)
        first = {key: getattr(card, key) for key in ("revision", "content", "created", "message")}
        return [first, *card.history]

    def verify(self, names: Iterable[str] | None = None, *, quick: bool = False) -> Iterator[Problem | str]:
        """Check every file against its card, every card against the schema, and what else lies there.

        Yields, as it goes, the name of each sound expert and a Problem for all else. `quick` looks at sizes only.
        Without `quick` the weights are also parsed and compared with the card's summary.
        """
        known = self.names()
        chosen = list(names) if names else known
        for name in chosen:
            if name not in known:
                raise UnknownExpert(f"{self.url}: {unknown('expert', name, known)}")
        for name in chosen:
            yield self._verified(name, quick)
        if not names:
            for entry in self.backend.strays():
                yield Problem(shown(entry), "no expert: it has no card, or a name that no expert can have")

    def _verified(self, name: str, quick: bool) -> Problem | str:
        try:
            card = self.backend.verify(name, quick=quick)
            if not quick and card.kind == "adapter":
                with tempfile.TemporaryDirectory(prefix="mole-verify-") as place:
                    self.backend.fetch(name, Path(place))
                    read_adapter(place, card)
        except LibraryError as error:
            return Problem(name, str(error))
        except OSError as error:
            return Problem(name, f"cannot be read: {error.strerror or error}")
        return name

    def _publish(self, name: str, expert: Expert, expect: str | None) -> None:
        with tempfile.TemporaryDirectory(prefix="mole-publish-") as place:
            expert.write_into(Path(place))
            read_adapter(place, expert.card)
            self.backend.publish(name, Path(place), expect)
        self._seen[name] = expert.revision

    def _expected(self, name: str, expect: str | None) -> tuple[Card, str]:
        """The card and the version that a write has to find. Raises Conflict if another revision is there."""
        card, version = self.backend.card(name)
        wanted = expect or self._seen.get(name) or card.revision
        if len(wanted) < 8 or not card.revision.startswith(wanted):
            raise Conflict(
                f"{self.url}/{name} is at revision {card.revision[:8]}, expected was {shown(wanted[:8])}; "
                "look at it (mole library show) and say expect=<that revision> to go on",
                card.revision,
            )
        return card, version

    def _may_write(self) -> None:
        if self.read_only:
            raise ReadOnly(f"{self.url} was opened read-only")

    def _taken(self, name: str, revision: str | None) -> Conflict:
        at = f" (revision {revision[:8]})" if revision else ""
        return Conflict(
            f"expert {name!r} is taken in {self.url}{at}; choose another name (name=…), replace it with update_expert, "
            f"or remove it first: mole library remove {self.url} {name}",
            revision,
        )


class LocalExpertLibrary(ExpertLibrary):
    """A library in a folder; with `create`, adding the first expert makes the folder."""

    def __init__(self, path: str | Path, *, create: bool = True):
        super().__init__(LocalBackend(path))
        if not create:
            self.names()
