"""Routers: inputs → routing. One file each; importing the package fills the registry."""

from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router
from mole.routers.task import TaskConfig, TaskRouter
from mole.routers.top_k import TopKConfig, TopKRouter
from mole.routers.uniform import UniformConfig, UniformRouter
from mole.routers.xlora import XLoraConfig, XLoraRouter

__all__ = [
    "Combining",
    "Learning",
    "MixtureShape",
    "Placing",
    "Router",
    "TaskConfig",
    "TaskRouter",
    "TopKConfig",
    "TopKRouter",
    "UniformConfig",
    "UniformRouter",
    "XLoraConfig",
    "XLoraRouter",
]
