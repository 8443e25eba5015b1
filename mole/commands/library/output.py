"""How the library's verbs print: a table on a terminal, aligned text elsewhere, JSON, or names alone."""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from mole.experts import Card
from mole.experts.scores import current

COLUMNS = ("name", "backbone", "method", "rank", "tasks", "score", "size", "revision")
SORTS = ("name", "created", "rank", "parameters", "score", "size")


def print_json(value: Any) -> None:
    """Plain data as indented JSON."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under column names. Texts of cards are shown as they are: they have no control characters."""
    rows = [tuple(row) for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        table = Table(*map(escape, columns), header_style="bold", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console(width=shutil.get_terminal_size().columns).print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


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
    if not rows:
        return None
    first = rows[0]
    same = [row for row in rows if (row["metric"], row["split"]) == (first["metric"], first["split"])]
    return (max if first["higher_is_better"] else min)(same, key=lambda row: row["value"])


def cell(column: str, name: str, card: Card) -> str:
    """What stands in a column for an expert."""
    adapter, score = card.adapter or {}, best_score(card)
    values = {
        "name": name,
        "backbone": card.backbone.name,
        "method": adapter.get("method", card.kind),
        "rank": "" if adapter.get("rank") is None else str(adapter["rank"]),
        "tasks": ", ".join(card.tasks),
        "score": f"{score['metric']} {score['value']:.4g}" if score else "",
        "size": size_text(card.size),
        "revision": card.revision[:8],
    }
    return values[column]


def sort_key(key: str, name: str, card: Card) -> tuple[bool, Any]:
    """What experts are sorted by; those without a value come last."""
    score = best_score(card)
    values = {
        "name": name,
        "created": card.created,
        "rank": (card.adapter or {}).get("rank"),
        "parameters": (card.adapter or {}).get("parameters"),
        "score": None if score is None else (-score["value"] if score["higher_is_better"] else score["value"]),
        "size": card.size,
    }
    return values[key] is None, values[key]
