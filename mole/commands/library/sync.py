"""`mole library sync`: bring two libraries to the same state, both ways."""

from collections import Counter
from dataclasses import asdict

from mole.commands.library.done import Format, done, print_done, progress
from mole.commands.library.opening import open_library
from mole.experts import syncing
from mole.registry import config_dataclass


@config_dataclass
class LibrarySync:
    """Which two libraries, one of them a folder, and whether what is gone on one side goes on the other."""

    one: str
    other: str
    delete: bool = False
    dry_run: bool = False
    format: Format = "table"


def run(config: LibrarySync) -> int:
    """Copies what was changed on one side only; the exit code is 1 if anything was changed on both."""
    with progress("syncing") as told:
        steps = syncing.sync(
            open_library(config.one),
            open_library(config.other),
            delete=config.delete,
            dry_run=config.dry_run,
            progress=told,
        )
    lines = []
    for step in steps:
        if step.what in ("copy", "remove"):
            what = done(step.action or step.what, dry_run=config.dry_run)
            lines.append(f"{what} {step.name} in {step.side}: {step.why}")
        elif step.what != "equal":
            lines.append(f"{step.what} {step.name}: {step.why}")
    counts = Counter(step.action or step.what for step in steps)
    told = (
        ("add", "added"),
        ("update", "updated"),
        ("edit", "edited"),
        ("remove", "removed"),
        ("gone", "gone on one side"),
    )
    lines.append(
        ", ".join(f"{counts[key]} {word}" for key, word in (*told, ("equal", "equal"), ("conflict", "conflicts")))
    )
    print_done([asdict(step) for step in steps], lines, config.format)
    return 1 if counts["conflict"] else 0
