"""Routers: inputs → routing. One file each; importing the package fills the registry."""

from mole.routers.attention import AttentionConfig, AttentionRouter
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router
from mole.routers.poly import PolyConfig, PolyRouter
from mole.routers.product_key import ProductKeyConfig, ProductKeyRouter
from mole.routers.rkhs import RkhsConfig, RkhsRouter
from mole.routers.smear import SmearConfig, SmearRouter
from mole.routers.static import StaticConfig, StaticRouter
from mole.routers.task import TaskConfig, TaskRouter
from mole.routers.top_k import TopKConfig, TopKRouter
from mole.routers.uniform import UniformConfig, UniformRouter
from mole.routers.xlora import XLoraConfig, XLoraRouter

__all__ = [
    "AttentionConfig",
    "AttentionRouter",
    "Combining",
    "Learning",
    "MixtureShape",
    "Placing",
    "PolyConfig",
    "PolyRouter",
    "ProductKeyConfig",
    "ProductKeyRouter",
    "RkhsConfig",
    "RkhsRouter",
    "Router",
    "SmearConfig",
    "SmearRouter",
    "StaticConfig",
    "StaticRouter",
    "TaskConfig",
    "TaskRouter",
    "TopKConfig",
    "TopKRouter",
    "UniformConfig",
    "UniformRouter",
    "XLoraConfig",
    "XLoraRouter",
]
