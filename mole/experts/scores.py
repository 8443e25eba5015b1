"""Scores in cards: a row is found by metric, task, split and config, and only rows that agree in these are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mole.experts.card import Card
from mole.experts.errors import LibraryError

KEY = ("metric", "task", "split", "config")
_ROW = {"task": None, "dataset": None, "split": None, "examples": None, "higher_is_better": True, "config": None}
_ANY: Any = object()


@dataclass(frozen=True)
class Best:
    """The best expert: its name, its row, how many experts were compared, and how many had no such row."""

    name: str
    score: dict[str, Any]
    compared: int
    without: int


def with_score(rows: Iterable[Mapping[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with one more, in the place of one of the same key. Wanted of `row` are metric and value."""
    new = {**_ROW, **row}
    if missing := [key for key in ("metric", "value") if key not in new]:
        raise LibraryError(f"a score needs {' and '.join(missing)}")
    kept = [dict(old) for old in rows if any(old[key] != new[key] for key in KEY)]
    return [*kept, new]


def current(card: Card) -> list[dict[str, Any]]:
    """The rows of this revision's weights: those whose `config` is an earlier revision stand beside, for people."""
    if not card.history:
        return list(card.scores)
    earlier = tuple(row["revision"][:16] for row in card.history)
    return [row for row in card.scores if row["config"] not in earlier]


def best_of(cards: Mapping[str, Card], task: str | None, metric: str, *, split: Any = _ANY, config: Any = _ANY) -> Best:
    """The expert with the best row of this metric and task; of equal ones the first by name.

    Raises LibraryError if no expert has such a row, or if there are several groups of split and config, and neither
    argument chooses one.
    """
    asked = {key: value for key, value in (("split", split), ("config", config)) if value is not _ANY}
    groups: dict[tuple[Any, Any], dict[str, dict[str, Any]]] = {}
    for name, card in sorted(cards.items()):
        for row in current(card):
            fits = (row["metric"], row["task"]) == (metric, task)
            if fits and all(row[key] == value for key, value in asked.items()):
                groups.setdefault((row["split"], row["config"]), {})[name] = row
    if not groups:
        raise LibraryError(_no_row(cards, task, metric))
    if len(groups) > 1:
        found = "; ".join(f"split={split} config={config}" for split, config in sorted(groups, key=str))
        raise LibraryError(f"{metric} of {task or 'no task'} was measured in unlike ways: {found}; choose one of them")
    (rows,) = groups.values()
    directions = {row["higher_is_better"] for row in rows.values()}
    if len(directions) > 1:
        raise LibraryError(f"cards disagree on whether a higher {metric} is better: {', '.join(rows)}")
    sign = -1 if directions == {True} else 1
    name = min(rows, key=lambda name: (sign * rows[name]["value"], name))
    return Best(name, rows[name], len(rows), len(cards) - len(rows))


def _no_row(cards: Mapping[str, Card], task: str | None, metric: str) -> str:
    there = sorted({f"{row['metric']} of {row['task'] or 'no task'}" for c in cards.values() for row in c.scores})
    shown = ", ".join(there[:20]) or "none"
    return f"no expert has a score {metric} of {task or 'no task'} measured like that (there are: {shown})"
