"""`mole library get`: copy an expert out of a library, verified."""

from pathlib import Path

from mole.commands.library.opening import open_library
from mole.registry import config_dataclass


@config_dataclass
class LibraryGet:
    """Which expert, and the folder that is to hold it."""

    library: str
    name: str
    dest: str
    revision: str | None = None
    dry_run: bool = False


def run(config: LibraryGet) -> None:
    """Writes the expert's folder, whole or not at all; prints one line."""
    expert = open_library(config.library).get_expert(config.name, config.revision)
    dest = Path(config.dest).expanduser()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise FileExistsError(f"{dest} is there already and not empty; choose a new folder")
    if config.dry_run:
        print(f"would write {config.name}, revision {expert.revision[:8]}, to {dest}")
        return
    expert.save(dest)
    print(f"{config.name}, revision {expert.revision[:8]}, is in {dest}")
