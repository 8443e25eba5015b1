"""`mole library history`: the revisions of an expert."""

from mole.commands.library.done import Format
from mole.commands.library.naming import name_and_revision
from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json, print_table
from mole.registry import config_dataclass


@config_dataclass
class LibraryHistory:
    """Which expert, as `name`, or `name@revision` for what came before that."""

    library: str
    name: str
    format: Format = "table"


def run(config: LibraryHistory) -> None:
    """Prints the revisions, the current one first; `names` prints them alone."""
    rows = open_library(config.library).history(*name_and_revision(config.name))
    if config.format == "json":
        print_json(rows)
    elif config.format == "names":
        print("".join(f"{row['revision']}\n" for row in rows), end="")
    else:
        columns = ("revision", "content", "created", "message")
        print_table(columns, [(r["revision"][:8], r["content"][:8], r["created"], r["message"]) for r in rows])
