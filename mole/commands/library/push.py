"""`mole library push`: make the experts of one library be in another as they are here, in few commits."""

import sys
from dataclasses import field
from typing import TYPE_CHECKING, Literal

from mole.commands.library.done import Format, print_copies, progress
from mole.commands.library.opening import open_library
from mole.commands.library.where import Where, conditions
from mole.experts import ExpertLibrary
from mole.experts.copying import WRITTEN
from mole.registry import config_dataclass

if TYPE_CHECKING:
    from mole.commands.library.pull import LibraryPull


@config_dataclass
class LibraryPush:
    """From where to where, which experts, and what is done where both sides have other content."""

    local: str
    remote: str
    names: tuple[str, ...] | None = None
    where: Where = field(default_factory=Where)
    on_conflict: Literal["fail", "skip", "replace"] = "fail"
    readme: bool = True
    create: bool = False
    private: bool = True
    message: str = ""
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryPush) -> None:
    """Copies what differs and prints a line for each expert; `dry_run` says what would be done."""
    target = open_library(config.remote, create=config.create, private=config.private)
    copy(config, open_library(config.local), target, readme=config.readme)


def copy(config: "LibraryPush | LibraryPull", source: ExpertLibrary, target: ExpertLibrary, *, readme: bool) -> None:
    """Copies and tells what was done."""
    with progress(f"copying to {target.url}") as told:
        steps = target.copy_from(
            source,
            config.names,
            conditions(config.where),
            on_conflict=config.on_conflict,
            dry_run=config.dry_run,
            message=config.message,
            readme=readme,
            progress=told,
        )
    unlicensed = [step.name for step in steps if step.action in WRITTEN and step.card.license is None]
    if unlicensed and target.url.startswith("hf://"):
        print(
            f"no licence given: {', '.join(unlicensed[:20])}{' …' if len(unlicensed) > 20 else ''}; where others see "
            "them nobody knows what they may do (mole library edit … set.license=…)",
            file=sys.stderr,
        )
    print_copies(steps, target.url, dry_run=config.dry_run, form=config.format)
