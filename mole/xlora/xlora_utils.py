"""The original's module of utilities, under its own name."""

from mole.routing.log import load_scalings_log
from mole.xlora.loading import load_model

__all__ = ["load_model", "load_scalings_log"]
