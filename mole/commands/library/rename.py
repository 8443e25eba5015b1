"""`mole library rename`: give an expert another name."""

from mole.commands.library.done import Format, print_change
from mole.commands.library.opening import open_library
from mole.experts import LibraryError
from mole.registry import config_dataclass


@config_dataclass
class LibraryRename:
    """Which expert, its new name, and the revision that it has to be at."""

    library: str
    old: str
    new: str
    expect: str | None = None
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryRename) -> None:
    """Gives the name, if it is free; card, history and artefacts go along. Prints one line."""
    if config.old == config.new:
        raise LibraryError(f"{config.old!r} is its name already")
    library = open_library(config.library)
    card, _ = library.expected(config.old, config.expect)
    library.check_free(config.new)
    if not config.dry_run:
        library.rename_expert(config.old, config.new, expect=card.revision)
    was = f" (was {config.old})"
    print_change("rename", config.new, card, library.url, dry_run=config.dry_run, form=config.format, more=was)
