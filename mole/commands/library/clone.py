"""`mole library clone`: a whole library, with what was computed from its experts, in a new or empty place."""

from mole.commands.library.done import Format, print_copies, progress
from mole.commands.library.opening import open_library
from mole.experts import copying
from mole.registry import config_dataclass


@config_dataclass
class LibraryClone:
    """From where to where, and whether old revisions come along."""

    source: str
    target: str
    history: bool = False
    create: bool = False
    private: bool = True
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryClone) -> None:
    """Copies all experts and artefacts; prints a line for each expert."""
    source = open_library(config.source)
    target = open_library(config.target, create=config.create, private=config.private)
    with progress(f"cloning to {target.url}") as told:
        steps = copying.clone(source, target, history=config.history, dry_run=config.dry_run, progress=told)
    print_copies(steps, target.url, dry_run=config.dry_run, form=config.format)
