"""How the library's verbs open a library, and where they keep what they have read of it."""

import os
from pathlib import Path

from mole.experts import ExpertLibrary


def cache_dir() -> Path:
    """The user's cache: $MOLE_CACHE_DIR, else `mole` in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MOLE_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mole"


def open_library(address: str) -> ExpertLibrary:
    """The library at an address, with the user's cache."""
    return ExpertLibrary.open(address, cache_dir=cache_dir())
