"""How the library's verbs print: a table on a terminal, aligned text elsewhere or if long, JSON, or names alone."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mole.experts import Card
from mole.experts.scores import current

COLUMNS = ("name", "backbone", "method", "rank", "tasks", "score", "size", "revision")
_MOST_FITTED = 1000  # rows that are fitted to a terminal: seconds for ten thousand
SORTS = ("name", "created", "rank", "parameters", "score", "size")


def print_json(value: Any) -> None:
    """Plain data as indented JSON."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under column names. Texts of cards are shown as they are: they have no control characters."""
    rows = [tuple(row) for row in rows]
    if sys.stdout.isatty() and len(rows) <= _MOST_FITTED:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        table = Table(*map(escape, columns), header_style="bold", box=None, pad_edge=False)
        for cells in rows:
            table.add_row(*map(Text, cells))
        Console(width=shutil.get_terminal_size().columns).print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    line = "  ".join(f"{{:{width}}}" for width in widths)  # texts stand to the left
    sys.stdout.write("".join(f"{line.format(*cells).rstrip()}\n" for cells in (columns, *rows)))


def size_text(size: int) -> str:
    """Bytes for people: 512 B, 4.0 KB, 1.2 MB."""
    amount = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


def best_score(card: Card) -> dict[str, Any] | None:
    """Of the rows with the metric and split of the card's first score, the best."""
    rows = current(card)
    if len(rows) < 2:
        return rows[0] if rows else None
    first = rows[0]
    same = [row for row in rows if (row["metric"], row["split"]) == (first["metric"], first["split"])]
    return (max if first["higher_is_better"] else min)(same, key=lambda row: row["value"])


def row(columns: Iterable[str], name: str, card: Card) -> list[str]:
    """What stands in the columns for an expert."""
    return [_CELLS[column](name, card) for column in columns]


def sort_key(key: str, name: str, card: Card) -> tuple[bool, Any, str]:
    """What experts are sorted by; those without a value come last, and equal ones stand by name."""
    value = _KEYS[key](name, card)
    return value is None, value, name


def _rank(name: str, card: Card) -> str:
    rank = (card.adapter or {}).get("rank")
    return "" if rank is None else str(rank)


def _score(name: str, card: Card) -> str:
    score = best_score(card)
    return f"{score['metric']} {score['value']:.4g}" if score else ""


def _loss(name: str, card: Card) -> float | None:
    """The best score, the lower the better."""
    score = best_score(card)
    if score is None:
        return None
    return -score["value"] if score["higher_is_better"] else score["value"]


_CELLS: dict[str, Callable[[str, Card], str]] = {
    "name": lambda name, card: name,
    "backbone": lambda name, card: card.backbone.name,
    "method": lambda name, card: (card.adapter or {}).get("method", card.kind),
    "rank": _rank,
    "tasks": lambda name, card: ", ".join(card.tasks),
    "score": _score,
    "size": lambda name, card: size_text(card.size),
    "revision": lambda name, card: card.revision[:8],
}
_KEYS: dict[str, Callable[[str, Card], Any]] = {
    "name": lambda name, card: name,
    "created": lambda name, card: card.created,
    "rank": lambda name, card: (card.adapter or {}).get("rank"),
    "parameters": lambda name, card: (card.adapter or {}).get("parameters"),
    "score": _loss,
    "size": lambda name, card: card.size,
}
