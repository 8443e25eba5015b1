"""`where`: which experts of a library are meant. Values of one key are alternatives, keys are conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mole.experts.card import Card
from mole.experts.errors import LibraryError
from mole.registry import unknown


def _one(value: Any) -> list[str]:
    return [] if value is None else [str(value)]


_VALUES: dict[str, Callable[[str, Card], list[str]]] = {
    "names": lambda name, card: [name],
    "backbone": lambda name, card: [card.backbone.name, *_one(card.backbone.shapes)],
    "method": lambda name, card: _one(card.adapter and card.adapter["method"]),
    "tasks": lambda name, card: list(card.tasks),
    "tags": lambda name, card: list(card.tags),
    "license": lambda name, card: _one(card.license),
    "kind": lambda name, card: [card.kind],
}
KEYS = tuple(_VALUES)


def keep(cards: Mapping[str, Card], where: Mapping[str, Any]) -> dict[str, Card]:
    """The cards that fulfil every condition of `where` (key → value, or several as alternatives).

    Values are compared exactly; `names` may be globs with `*` and `?`. Raises LibraryError for an unknown key, and for
    a condition that nothing fulfils, with the values that there are.
    """
    kept = dict(cards)
    for key, given in where.items():
        if key not in _VALUES:
            raise LibraryError(unknown("filter", key, _VALUES))
        wanted = [given] if isinstance(given, str) else [str(value) for value in given]
        values = _VALUES[key]
        left = {name: card for name, card in kept.items() if _fits(values(name, card), wanted, glob=key == "names")}
        if not left:
            there = sorted({value for name, card in kept.items() for value in values(name, card)})
            raise LibraryError(
                f"no expert has {key} {' or '.join(map(repr, wanted))} (there are: {', '.join(there[:20]) or 'none'})"
            )
        kept = left
    return kept


def _fits(values: list[str], wanted: list[str], *, glob: bool) -> bool:
    if not glob:
        return any(value in wanted for value in values)
    return any(fnmatchcase(value, pattern.replace("[", "[[]")) for value in values for pattern in wanted)
