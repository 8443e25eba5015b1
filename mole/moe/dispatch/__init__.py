"""Dispatch back-ends: what runs the chosen experts. One signature; see plan."""

from mole.moe.dispatch.choose import BACKENDS, dispatched, dispatched_whole
from mole.moe.dispatch.fitting import check_backend, fitness
from mole.moe.dispatch.plan import ExpertPlan

__all__ = ["BACKENDS", "ExpertPlan", "check_backend", "dispatched", "dispatched_whole", "fitness"]
