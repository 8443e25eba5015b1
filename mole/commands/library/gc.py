"""`mole library gc`: take away what a library keeps and nothing needs any more."""

from dataclasses import asdict

from pydantic import Field

from mole.commands.library.done import Format
from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json, size_text
from mole.experts.collecting import duration
from mole.registry import config_dataclass


@config_dataclass
class LibraryGc:
    """Which library, how old what goes has to be, and how many old revisions of each expert stay."""

    library: str
    older_than: str = "7d"
    keep: int = Field(default=3, ge=0)
    dry_run: bool = True
    format: Format = "table"

    def __post_init__(self) -> None:
        duration(self.older_than)


def run(config: LibraryGc) -> None:
    """Prints what goes, why, and its bytes; takes it away with `dry_run=false`."""
    library = open_library(config.library)
    found = library.gc(config.older_than, config.keep, dry_run=config.dry_run)
    if config.format == "json":
        print_json([asdict(row) for row in found])
    elif config.format == "names":
        print("".join(f"{row.what}\n" for row in found), end="")
    else:
        what = "would remove" if config.dry_run else "removed"
        for row in found:
            print(f"{what} {row.what}: {row.why}, {size_text(row.size)}")
        more = "; dry_run=false removes it" if config.dry_run and found else ""
        print(f"{len(found)} things, {size_text(sum(row.size for row in found))}, in {library.url}{more}")
