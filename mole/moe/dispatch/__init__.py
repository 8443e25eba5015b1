"""Dispatch back-ends: what runs the chosen experts. One signature; see plan."""

from mole.moe.dispatch.choose import BACKENDS, dispatched, dispatched_whole
from mole.moe.dispatch.fitting import Fitness, check_backend, fitness
from mole.moe.dispatch.plan import ExpertPlan
from mole.moe.dispatch.recipes import register_grouped

__all__ = [
    "BACKENDS",
    "ExpertPlan",
    "Fitness",
    "check_backend",
    "dispatched",
    "dispatched_whole",
    "fitness",
    "register_grouped",
]
