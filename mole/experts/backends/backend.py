"""What a place for experts does. The card is the commit point: an expert exists when its card does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from mole.experts.card import Card

Version = str  # the backend's own token for a card, compared for equality only


@dataclass(frozen=True)
class Change:
    """One step of a batch: publish `folder`, which holds its card, under `name`; without a folder, remove the name."""

    name: str
    folder: Path | None
    expect: Version | None


@dataclass(frozen=True)
class Garbage:
    """Something that nothing needs any more: where it lies, why it may go, its bytes."""

    what: str
    why: str
    size: int


class Backend(Protocol):
    """Whole or not at all; every write says which version it expects; asking for what is there already is success.

    Constructors do no network. One object serves several threads.
    """

    url: str
    after_removal: str  # how long the bytes of a removed expert remain, as the end of a sentence

    def exists(self) -> bool:
        """Whether there is a library, empty or not."""
        ...

    def head(self) -> str | None:
        """A token of the whole library's state, where one request gives it; None where there is no such thing."""
        ...

    def cards(self) -> dict[str, Version]:
        """Name → token of every expert, sorted by name, in one listing; no card is read. Raises NoLibrary.

        A token changes whenever the card does; it serves caches, and is not what `expect` wants.
        """
        ...

    def card(self, name: str, revision: str | None = None) -> tuple[Card, Version]:
        """The card of an expert, or of an old revision of it. Raises NoLibrary, UnknownExpert, Damaged."""
        ...

    def version(self, name: str) -> Version | None:
        """The version of what is at a name, also where its card is damaged; None if nothing is. Raises NoLibrary."""
        ...

    def bearers(self, revision: str) -> list[str]:
        """Names under which a whole revision was published once: those of an expert that was renamed since."""
        ...

    def read_cards(self, names: Iterable[str]) -> Iterator[tuple[str, Card | Exception]]:
        """The cards of many, in the order of names, or the Damaged that one is; those removed meanwhile are left out.

        The client may ask for several at once.
        """
        ...

    def fetch(self, name: str, dest: Path, revision: str | None = None) -> Card:
        """Put an expert's verified files into the empty folder `dest`; if it raises (as `card`), nothing is left."""
        ...

    def publish(self, name: str, folder: Path, expect: Version | None = None) -> Version:
        """Put the expert in `folder`, which holds its card, under `name`; `expect=None`: the name must be free.

        Raises Conflict, and changes nothing, if the name is not at that version; Damaged, Refused, ReadOnly.
        """
        ...

    def check_writable(self) -> None:
        """Raise ReadOnly or NoLibrary if nothing could be published here. Writes nothing."""
        ...

    def remove(self, name: str, expect: Version) -> None:
        """Take an expert away. Raises Conflict, and changes nothing, if it is not at that version; ReadOnly."""
        ...

    def apply(self, changes: Sequence[Change], message: str, *, readme: str | None = None) -> str | None:
        """Several changes; every `expect` is checked before the first is written.

        On the Hub one commit (`message` is its title), all or nothing, and `readme` is the text of the repository's
        page, written in the same commit (also without changes). Elsewhere each expert is whole by itself, in the order
        given; an error then says in a note which were written; `readme` has no place there. Returns the head at which
        all is so, where there is such a thing (see `head`).
        """
        ...

    def readme(self) -> str | None:
        """The text of the library's page; None if it has none, or this place has no pages."""
        ...

    def verify(self, name: str, *, quick: bool = False) -> Card:
        """Check the card, that its files are there and what it says, and that nothing else is; raises what is wrong."""
        ...

    def strays(self) -> list[str]:
        """What lies in the library and is no expert."""
        ...

    def collect(self, older_than: timedelta, keep: int, *, dry_run: bool) -> list[Garbage]:
        """What nothing needs any more, taken away unless `dry_run`; `keep` old revisions of each name stay."""
        ...

    @property
    def derived(self) -> Backend:
        """The second namespace of the same place, with the same laws: what was computed from experts."""
        ...
