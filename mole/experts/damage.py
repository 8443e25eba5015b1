"""Experts whose card or files are damaged: told of, passed by, taken away or replaced; never believed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mole.experts.backends import LocalBackend
from mole.experts.card import Card
from mole.experts.errors import Conflict, Damaged, LibraryError, Refused

if TYPE_CHECKING:
    from mole.experts.library import ExpertLibrary

logger = logging.getLogger(__name__)


def way_out(url: str, name: str) -> str:
    """What can be done about a damaged expert, as the end of a message."""
    return (
        f"put a sound one in its place (mole library push <from> {url} 'names=[{name}]' on_conflict=replace, or mole "
        f"library update {url} {name} <folder>), or take it away: mole library remove {url} {name}"
    )


def sound_cards(library: ExpertLibrary, wanted: Iterable[str] = ()) -> dict[str, Card]:
    """The cards of all sound experts; a warning names each damaged one. Raises Damaged for one that is wanted."""
    cards, problems = library.look()
    for name in wanted:
        if name in problems:
            raise Damaged(f"{problems[name]}; {way_out(library.url, name)}") from problems[name]
    for name, problem in problems.items():
        logger.warning("left out, as damaged: %s; %s", problem, way_out(library.url, name))
    return cards


def version_of_damaged(library: ExpertLibrary, name: str, expect: str | None) -> str:
    """The version of what is damaged at a name, which a write has to find.

    Raises Conflict where a revision is expected: nobody can tell whether it is that one.
    """
    if expect is not None:
        raise Conflict(f"{library.url}/{name} is damaged, expected was {expect[:8]}; leave out expect to go on")
    version = library.backend.version(name)
    if version is None:
        raise Conflict(f"{library.url}/{name} was removed by somebody else meanwhile")
    return version


def damage(library: ExpertLibrary, name: str) -> LibraryError | None:
    """What is wrong with the files of an expert whose card is sound: in a folder of any byte, elsewhere of sizes."""
    try:
        library.backend.verify(name, quick=not isinstance(library.backend, LocalBackend))
    except (Damaged, Refused) as error:
        return error
    return None
