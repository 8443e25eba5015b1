"""`mole library add`: put an expert's folder, a run's expert or a PEFT folder into a library."""

from pathlib import Path

from mole.commands.library.done import Format, print_change, repaired_or_unchanged
from mole.commands.library.naming import own_name
from mole.commands.library.opening import open_library
from mole.experts import load_expert
from mole.registry import config_dataclass


@config_dataclass
class LibraryAdd:
    """What goes where, under which name, and what its card says beside what it says already."""

    library: str
    folder: str
    name: str | None = None
    tasks: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    license: str | None = None
    description: str | None = None
    message: str | None = None
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryAdd) -> None:
    """Checks the folder, completes its card, publishes it; prints one line."""
    expert = load_expert(config.folder)
    given = {key: getattr(config, key) for key in ("tasks", "tags", "license", "description", "message")}
    changes = {key: value for key, value in given.items() if value is not None}
    expert = expert.with_card(expert.card.edited(**changes)) if changes else expert
    name = config.name or own_name(expert, Path(config.folder).expanduser().absolute().name)
    library = open_library(config.library)
    if library.exists() and name in library and library.card(name).revision == expert.revision:
        return repaired_or_unchanged(library, name, expert, dry_run=config.dry_run, form=config.format)
    library.check_free(name)
    if config.dry_run:
        _ = expert.adapter
    else:
        library.add_expert(expert, name)
    return print_change("add", name, expert.card, library.url, dry_run=config.dry_run, form=config.format, at="to")
