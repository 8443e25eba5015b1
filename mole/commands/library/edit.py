"""`mole library edit`: change what an expert's card says; its weights stay."""

from dataclasses import asdict, field
from typing import Literal

from mole.commands.library.done import Format, print_change, print_unchanged
from mole.commands.library.opening import open_library
from mole.experts import LibraryError
from mole.registry import config_dataclass

_EMPTY = {"tasks": [], "tags": [], "description": "", "license": None, "author": None, "extra": {}}


@config_dataclass
class Facts:
    """New values of fields of the card; None: as it is."""

    tasks: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    description: str | None = None
    license: str | None = None
    author: str | None = None
    extra: dict[str, str | int | float | bool] | None = None


@config_dataclass
class LibraryEdit:
    """Which expert, which fields get which values, and which are emptied."""

    library: str
    name: str
    set: Facts = field(default_factory=Facts)
    unset: tuple[Literal["tasks", "tags", "description", "license", "author", "extra"], ...] = ()
    expect: str | None = None
    message: str | None = None
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryEdit) -> None:
    """Publishes the card as a new revision of the same content; prints one line, or that nothing changes."""
    given = {key: value for key, value in asdict(config.set).items() if value is not None}
    facts = given | {key: _EMPTY[key] for key in config.unset}
    if both := sorted(given.keys() & set(config.unset)):
        raise LibraryError(f"{both[0]} is set and unset: say one of them")
    if not facts:
        raise LibraryError("nothing to change: say set.tags=[…], set.description=…, or unset=[license]")
    library = open_library(config.library)
    current, _ = library.expected(config.name, config.expect)
    card = current.edited(**facts)
    if card.revision == current.revision:
        return print_unchanged(config.name, current, library.url, form=config.format)
    if not config.dry_run:
        card = library.edit_card(config.name, expect=current.revision, message=config.message or "", **facts)
    was = f" (was {current.revision[:8]}): {', '.join(sorted(facts))}"
    return print_change("edit", config.name, card, library.url, dry_run=config.dry_run, form=config.format, more=was)
