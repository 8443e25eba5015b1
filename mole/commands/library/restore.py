"""`mole library restore`: put an old revision of an expert on top again."""

from mole.commands.library.done import Format, print_change
from mole.commands.library.opening import open_library
from mole.experts import LibraryError
from mole.registry import config_dataclass


@config_dataclass
class LibraryRestore:
    """Which revision of which expert, as `name@revision`, and the revision that it has to be at."""

    library: str
    name: str
    expect: str | None = None
    message: str | None = None
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryRestore) -> None:
    """Publishes what the old revision says as a new one; nothing is rewritten. Prints one line."""
    name, at, revision = config.name.partition("@")
    if not at or not revision:
        raise LibraryError(f"which revision? write {name}@<its first 8 digits>; mole library history tells them")
    library = open_library(config.library)
    card = old = library.card(name, revision)
    if not config.dry_run:
        card = library.restore_expert(name, old.revision, expect=config.expect, message=config.message or "")
    what = f" (says what {old.revision[:8]} said)" if card.revision != old.revision else ""
    print_change("restore", name, card, library.url, dry_run=config.dry_run, form=config.format, more=what)
