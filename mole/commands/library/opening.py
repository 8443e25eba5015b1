"""How commands open a library, and where they keep what they have read of it."""

import os
from pathlib import Path
from typing import Any

from mole.experts import ExpertLibrary
from mole.experts.address import kind_of


def cache_dir() -> Path:
    """The user's cache: $MOLE_CACHE_DIR, else `mole` in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MOLE_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mole"


def library_of(settings: Any) -> ExpertLibrary:
    """The library that a command's group `library` says, as it says it, with the user's cache."""
    _quiet_client(settings.url)
    return ExpertLibrary.open(settings.url, settings=settings, cache_dir=cache_dir())


def _quiet_client(address: str) -> None:
    """The Hub client's own progress bars would stand among ours, and in logs."""
    if kind_of(address) == "hub":
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def open_library(address: str, *, create: bool = False, private: bool = True) -> ExpertLibrary:
    """The library at an address, with the user's cache; `create` lets writing make a repository on the Hub."""
    settings = None
    if kind_of(address) == "hub":
        from mole.experts.backends.hub import HubConfig
        from mole.experts.backends.hub_address import parse_hub_address

        parse_hub_address(address)  # its error is plain; that of the settings repeats it in pydantic's words
        _quiet_client(address)
        settings = HubConfig(url=address, create=create, private=private)
    return ExpertLibrary.open(address, settings=settings, cache_dir=cache_dir())
