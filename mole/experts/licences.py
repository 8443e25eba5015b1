"""Which licence a work made of several experts can be under: derived from theirs, and what stands against it is named.

A rule of thumb for people, no legal advice: what is not known to combine is said, never guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

# From the least to the most demanding; a work may stand under the most demanding one of its parts.
_PERMISSIVE = (
    *("cc0-1.0", "unlicense", "0bsd", "mit-0", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "bsl-1.0"),
    *("apache-2.0", "cc-by-4.0"),
)
# Licences that a work has to keep, and which others it may hold parts of beside permissive ones.
_KEPT: dict[str, tuple[str, ...]] = {
    "mpl-2.0": (),
    "lgpl-3.0-only": (),
    "lgpl-3.0-or-later": ("lgpl-3.0-only",),
    "gpl-3.0-only": ("mpl-2.0", "lgpl-3.0-only", "lgpl-3.0-or-later", "gpl-3.0-or-later", "cc-by-sa-4.0"),
    "gpl-3.0-or-later": ("mpl-2.0", "lgpl-3.0-only", "lgpl-3.0-or-later"),
    "agpl-3.0-only": ("mpl-2.0", "lgpl-3.0-only", "lgpl-3.0-or-later", "gpl-3.0-only", "gpl-3.0-or-later"),
    "cc-by-sa-4.0": (),
    "cc-by-nc-4.0": (),
    "cc-by-nc-sa-4.0": ("cc-by-nc-4.0",),
}
# The Hub's short forms of the same.
_SAME = {
    "gpl-3.0": "gpl-3.0-only",
    "lgpl-3.0": "lgpl-3.0-only",
    "agpl-3.0": "agpl-3.0-only",
    "apache": "apache-2.0",
    "bsd": "bsd-3-clause",
}


@dataclass(frozen=True)
class Licence:
    """The derived licence, None where none follows, and a sentence for each reason against one."""

    id: str | None
    conflicts: tuple[str, ...] = ()


def derived(parts: Mapping[str, str | None]) -> Licence:
    """The licence of what is made of `parts`, name → licence as its card has it.

    Equal licences stay as they are, permissive ones give way to the most demanding; a licence that allows no derived
    works, one that is not given, and two that exclude each other give none, and the conflict is named.
    """
    named = {name: licence for name, licence in parts.items() if licence is not None}
    conflicts = [f"{_all(names)}: no derived works allowed by {licence}" for licence, names in _forbidding(named)]
    if open_names := [name for name in parts if parts[name] is None]:
        conflicts += [f"{_all(open_names)}: no licence given"] if named else []
        return Licence(None, tuple(conflicts))
    if conflicts or not named:
        return Licence(None, tuple(conflicts))
    spelled = {_id(licence): licence for licence in named.values()}
    if len(spelled) == 1:
        return Licence(next(iter(spelled.values())))
    if all(licence in _PERMISSIVE for licence in spelled):
        return Licence(spelled[max(spelled, key=_PERMISSIVE.index)])
    kept = [licence for licence in spelled if licence not in _PERMISSIVE]
    for licence in kept:
        if all(other == licence or other in _KEPT.get(licence, ()) for other in kept) and licence in _KEPT:
            return Licence(spelled[licence])
    return Licence(None, (_excluding(named, kept),))


def _forbidding(named: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Licences without derived works → the parts that are under them."""
    found: dict[str, list[str]] = {}
    for name, licence in named.items():
        if "-nd" in licence.lower():
            found.setdefault(licence, []).append(name)
    return list(found.items())


def _excluding(named: Mapping[str, str], kept: list[str]) -> str:
    sides = [
        f"{licence} ({_all([name for name, own in named.items() if own == licence])})"
        for licence in dict.fromkeys(named.values())
        if _id(licence) in kept or len(kept) == 1
    ]
    return f"not known to combine: {', '.join(sides)}"


def _id(licence: str) -> str:
    small = licence.lower()
    return _SAME.get(small, small)


def _all(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def facts(parts: Mapping[str, str | None]) -> dict[str, Any]:
    """`license`, and `extra` with what stands against one, as facts of a card. A conflict is logged as a warning."""
    found = derived(parts)
    if not found.conflicts:
        return {"license": found.id}
    note = "; ".join(found.conflicts)
    logger.warning("no licence follows from those of the experts: %s", note)
    return {"license": None, "extra": {"license_conflict": note if len(note) <= 200 else f"{note[:199]}…"}}
