"""`mole library pull`: make the experts of a library elsewhere be here as they are there."""

from dataclasses import field
from typing import Literal

from mole.commands.library.done import Format
from mole.commands.library.opening import open_library
from mole.commands.library.push import copy
from mole.commands.library.where import Where
from mole.registry import config_dataclass


@config_dataclass
class LibraryPull:
    """From where to where, which experts, and what is done where both sides have other content."""

    remote: str
    local: str
    names: tuple[str, ...] | None = None
    where: Where = field(default_factory=Where)
    on_conflict: Literal["fail", "skip", "replace"] = "fail"
    message: str = ""
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryPull) -> None:
    """Copies what differs and prints a line for each expert; `dry_run` says what would be done."""
    copy(config, open_library(config.remote), open_library(config.local), readme=False)
