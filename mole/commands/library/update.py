"""`mole library update`: put a newer revision of an expert in the place of the one that is there."""

from typing import Any

from mole.commands.library.done import Format, print_change, repaired_or_unchanged
from mole.commands.library.opening import open_library
from mole.experts import Damaged, load_expert
from mole.registry import config_dataclass


@config_dataclass
class LibraryUpdate:
    """Which expert, the folder with its next revision, and the revision that it has to be at."""

    library: str
    name: str
    folder: str
    expect: str | None = None
    message: str | None = None
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryUpdate) -> None:
    """Replaces the expert, if it is where the new one comes from; prints one line."""
    library, expert = open_library(config.library), load_expert(config.folder)
    facts: dict[str, Any] = {"dry_run": config.dry_run, "form": config.format}
    try:
        current = library.card(config.name)
    except Damaged:
        card = expert.card if config.dry_run else library.update_expert(config.name, expert, expect=config.expect)
        return print_change("update", config.name, card, library.url, more=" (was damaged)", **facts)
    if current.revision == expert.revision:
        return repaired_or_unchanged(library, config.name, expert, **facts)
    current, _ = library.expected(config.name, config.expect or expert.card.parent)
    message = config.message if config.message is not None else expert.card.message
    card = expert.card.next_after(current, message)
    if config.dry_run:
        _ = expert.adapter if card.kind == "adapter" else None
    else:
        card = library.update_expert(config.name, expert, expect=current.revision, message=message)
    was = f" (was {current.revision[:8]})"
    return print_change("update", config.name, card, library.url, more=was, **facts)
