"""`mole library diff`: in what two libraries differ."""

from dataclasses import asdict

from mole.commands.library.done import Format, print_done
from mole.commands.library.opening import open_library
from mole.registry import config_dataclass


@config_dataclass
class LibraryDiff:
    """Which two libraries."""

    one: str
    other: str
    format: Format = "table"


def run(config: LibraryDiff) -> None:
    """Prints the names at which they differ: on one side only, other content, or another card of the same content."""
    one, other = open_library(config.one), open_library(config.other)
    found = one.diff(other)
    lines = []
    for row in found:
        fields = f": {', '.join(row.fields)}" if row.fields else ""
        if row.kind.startswith("only"):
            lines.append(f"{row.name}: only in {one.url if row.kind == 'only here' else other.url}")
        else:
            what = "other content" if row.kind == "content" else "the same content, another card"
            lines.append(f"{row.name}: {what}{fields}")
    lines = lines or [f"{one.url} and {other.url} have the same experts"]
    print_done([asdict(row) for row in found], lines, config.format)
