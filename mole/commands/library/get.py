"""`mole library get`: copy an expert out of a library, verified."""

from pathlib import Path

from mole.commands.library.done import Format, print_done
from mole.commands.library.naming import name_and_revision
from mole.commands.library.opening import open_library
from mole.registry import config_dataclass


@config_dataclass
class LibraryGet:
    """Which expert, as `name` or `name@revision`, and the folder that is to hold it."""

    library: str
    name: str
    dest: str
    revision: str | None = None
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryGet) -> None:
    """Writes the expert's folder, whole or not at all; prints one line."""
    name, revision = name_and_revision(config.name, config.revision)
    library = open_library(config.library)
    expert = library.get_expert(name, revision)
    dest = Path(config.dest).expanduser()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise FileExistsError(f"{dest} is there already and not empty; choose a new folder")
    if not config.dry_run:
        expert.save(dest)
    at = f"{name}, revision {expert.revision[:8]},"
    row = {"name": name, "action": "get", "revision": expert.revision, "library": library.url, "dest": str(dest)}
    told = f"would write {at} to {dest}" if config.dry_run else f"{at} is in {dest}"
    print_done([{**row, "dry_run": config.dry_run}], [told], config.format)
