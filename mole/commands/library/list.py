"""`mole library list`: the experts of a library."""

import sys
from dataclasses import field
from typing import Literal

from pydantic import Field

from mole.commands.library.opening import open_library
from mole.commands.library.output import COLUMNS, print_json, print_table, row, sort_key
from mole.commands.library.where import Where, conditions
from mole.experts.address import kind_of
from mole.experts.card_cache import collecting_paused
from mole.experts.damage import way_out
from mole.experts.filters import keep
from mole.registry import config_dataclass


@config_dataclass
class LibraryList:
    """Which library, which of its experts, and how they are shown."""

    library: str
    where: Where = field(default_factory=Where)
    sort: Literal["name", "created", "rank", "parameters", "score", "size"] = "name"
    limit: int | None = Field(default=None, ge=1)
    columns: tuple[Literal["name", "backbone", "method", "rank", "tasks", "score", "size", "revision"], ...] = COLUMNS
    format: Literal["table", "json", "names"] = "table"


def run(config: LibraryList) -> None:
    """Prints the experts; a damaged card is told on stderr and does not hide the others."""
    with collecting_paused(kind_of(config.library) == "local"):
        _list(config)  # whose cards are gone when it returns


def _list(config: LibraryList) -> None:
    library = open_library(config.library)
    cards, problems = library.look()
    for name in sorted(problems):
        print(f"damaged: {problems[name]}; {way_out(library.url, name)}", file=sys.stderr)
    where = conditions(config.where)
    cards = keep(cards, where) if where else cards
    names = sorted(cards, key=lambda name: sort_key(config.sort, name, cards[name]))[: config.limit]
    if config.format == "json":
        print_json([{"name": name, **cards[name].to_dict()} for name in names])
    elif config.format == "names":
        print("".join(f"{name}\n" for name in names), end="")
    elif not names:
        print(f"{library.url} has no expert yet; mole library add {library.url} <expert folder> adds one")
    else:
        print_table(config.columns, [row(config.columns, name, cards[name]) for name in names])
