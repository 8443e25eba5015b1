"""Where libraries live: one file per kind of place, all with the methods of `Backend`."""

from mole.experts.backends.backend import Backend, Version
from mole.experts.backends.local import LocalBackend, LocalConfig

__all__ = ["Backend", "LocalBackend", "LocalConfig", "Version"]
