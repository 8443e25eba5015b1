"""`mole library readme`: the page about a library, as people find it on the Hub."""

from mole.commands.library.done import Format, print_done
from mole.commands.library.opening import open_library
from mole.experts import library_readme
from mole.registry import config_dataclass


@config_dataclass
class LibraryReadme:
    """Which library."""

    library: str
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryReadme) -> None:
    """Brings README.md up to date, keeping what is outside its marks; `dry_run` prints it instead."""
    library = open_library(config.library)
    text = library_readme.write_page(library, dry_run=config.dry_run)
    row = {"name": "README.md", "action": "readme", "library": library.url, "dry_run": config.dry_run, "text": text}
    line = text.removesuffix("\n") if config.dry_run else f"README.md of {library.url} is up to date"
    print_done([row], [line], config.format)
