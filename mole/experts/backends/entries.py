"""What lies in a backend's namespace: experts, or the artefacts that were computed from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mole.experts.artefact_card import ARTEFACT_FILE, check_artefact_name, is_artefact_name, parse_artefact
from mole.experts.card import parse_card
from mole.experts.names import check_name, is_name
from mole.experts.schema import CARD_FILE


class AnyCard(Protocol):
    """What every card has: its own digest, its files with size and sha256, its bytes."""

    @property
    def revision(self) -> str: ...
    @property
    def files(self) -> dict[str, dict[str, Any]]: ...
    def to_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Entries:
    """A kind of entry: the name of its card's file, whether a README goes beside it, how names and cards are checked.

    `parse(bytes, where)` gives the checked card, or raises Damaged, naming `where`; `check_name` gives the name or
    raises LibraryError.
    """

    what: str
    card_file: str
    readme: bool
    is_name: Callable[[object], bool]
    check_name: Callable[[str], str]
    parse: Callable[[bytes, str], Any]


EXPERTS = Entries("expert", CARD_FILE, True, is_name, check_name, parse_card)
ARTEFACTS = Entries("artefact", ARTEFACT_FILE, False, is_artefact_name, check_artefact_name, parse_artefact)
