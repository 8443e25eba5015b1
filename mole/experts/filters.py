"""`where`: which experts of a library are meant. Values of one key are alternatives, keys are conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mole.experts.card import Card
from mole.experts.errors import LibraryError
from mole.registry import unknown
from mole.untrusted import shown

_DATE = re.compile(r"\d{4}-\d\d-\d\d(?:T\d\d:\d\d:\d\dZ)?", re.ASCII)


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
_BOUNDS = {
    "min_score": lambda value, bound: value >= bound,
    "max_score": lambda value, bound: value <= bound,
}
KEYS = (*_VALUES, *_BOUNDS, "created_after")


def keep(cards: Mapping[str, Card], where: Mapping[str, Any]) -> dict[str, Card]:
    """The cards that fulfil every condition of `where` (key → value, or several as alternatives).

    Values are compared exactly; `names` may be globs with `*` and `?`. `min_score` and `max_score` are
    `<metric>:<value>` or `<metric>:<task>:<value>`, `created_after` a day or a time in UTC. Raises LibraryError for an
    unknown key, and for a condition that nothing fulfils, with the values that there are.
    """
    kept = dict(cards)
    for key, given in where.items():
        if key not in KEYS:
            raise LibraryError(unknown("filter", key, KEYS))
        wanted = [given] if isinstance(given, str) else [str(value) for value in given]
        fits, values = _condition(key, wanted)
        left = {name: card for name, card in kept.items() if fits(name, card)}
        if not left:
            there = sorted({value for name, card in kept.items() for value in values(name, card)})
            raise LibraryError(
                f"no expert has {key} {' or '.join(map(repr, wanted))} (there are: {', '.join(there[:20]) or 'none'})"
            )
        kept = left
    return kept


def _condition(key: str, wanted: list[str]) -> tuple[Callable[[str, Card], bool], Callable[[str, Card], list[str]]]:
    """Whether an expert fulfils a condition, and which values it has for it."""
    if key in _VALUES:
        values = _VALUES[key]
        return lambda name, card: _fits(values(name, card), wanted, glob=key == "names"), values
    if key == "created_after":
        for day in wanted:
            if not _DATE.fullmatch(day):
                raise LibraryError(f"created_after={shown(day)}: wanted is a day (2026-01-31) or 2026-01-31T12:00:00Z")
        return lambda name, card: any(card.created >= day for day in wanted), lambda name, card: [card.created]
    bounds = [_bound(key, text) for text in wanted]

    def is_within(name: str, card: Card) -> bool:
        return any(
            row["metric"] == metric and task in (None, row["task"]) and _BOUNDS[key](row["value"], bound)
            for metric, task, bound in bounds
            for row in card.scores
        )

    return is_within, lambda name, card: [
        ":".join([row["metric"], *_one(row["task"]), f"{row['value']:.6g}"]) for row in card.scores
    ]


def _bound(key: str, text: str) -> tuple[str, str | None, float]:
    """Metric, task (None: any) and bound in `<metric>[:<task>]:<value>`."""
    what, _, number = text.rpartition(":")
    metric, _, task = what.partition(":")
    try:
        return _named(metric), task or None, float(number)
    except ValueError:
        raise LibraryError(f"{key}={shown(text)}: wanted is <metric>:<value> or <metric>:<task>:<value>") from None


def _named(metric: str) -> str:
    if not metric:
        raise ValueError("no metric")
    return metric


def _fits(values: list[str], wanted: list[str], *, glob: bool) -> bool:
    if not glob:
        return any(value in wanted for value in values)
    return any(fnmatchcase(value, pattern.replace("[", "[[]")) for value in values for pattern in wanted)
