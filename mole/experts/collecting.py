"""What a library keeps and nothing needs any more: leftovers of writers, old revisions, artefacts of what is gone."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from mole.experts import artefacts
from mole.experts.backends.backend import Garbage
from mole.experts.errors import LibraryError, NoLibrary
from mole.untrusted import shown

if TYPE_CHECKING:
    from mole.experts.library import ExpertLibrary

_DURATION = re.compile(r"(\d{1,6})\s*([smhdw])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def duration(text: str) -> timedelta:
    """A time span: 30m, 12h, 7d, 2w. Raises LibraryError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise LibraryError(f"{shown(text)} is no time span: write 30m, 12h, 7d or 2w")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def collect(library: ExpertLibrary, older_than: str, keep: int, *, dry_run: bool) -> list[Garbage]:
    """See ExpertLibrary.gc."""
    if keep < 0:
        raise LibraryError(f"keep={keep}: wanted is how many old revisions stay, from 0")
    age = duration(older_than)
    found = list(library.backend.collect(age, keep, dry_run=dry_run))
    found += artefacts.collect(library, keep, dry_run=dry_run)
    with suppress(NoLibrary):
        found += library.backend.derived.collect(age, 0, dry_run=dry_run)
    return found
