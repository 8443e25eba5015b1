"""What a place for experts does. The card is the commit point: an expert exists when its card does."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mole.experts.card import Card

Version = str  # the backend's own token for a card, compared for equality only


class Backend(Protocol):
    """Whole or not at all; every write says which version it expects; asking for what is there already is success."""

    url: str

    def exists(self) -> bool:
        """Whether there is a library, empty or not."""
        ...

    def cards(self) -> dict[str, Version]:
        """Name → version of every expert, sorted by name; no card is checked. Raises NoLibrary."""
        ...

    def card(self, name: str, revision: str | None = None) -> tuple[Card, Version]:
        """The card of an expert, or of an old revision of it. Raises NoLibrary, UnknownExpert, Damaged."""
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

    def verify(self, name: str, *, quick: bool = False) -> Card:
        """Check the card, that its files are there and what it says, and that nothing else is; raises what is wrong."""
        ...

    def strays(self) -> list[str]:
        """What lies in the library and is no expert."""
        ...
