"""Routers: inputs → routing. One file each; importing the package fills the registry."""

from mole.routers.arrow import ArrowConfig, ArrowRouter
from mole.routers.attention import AdapterFusionConfig, AttentionConfig, AttentionRouter
from mole.routers.average_activation import AverageActivationConfig, AverageActivationRouter
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router
from mole.routers.gate import GateConfig, GateRouter
from mole.routers.hash import HashConfig, HashRouter
from mole.routers.multi_adapter import MultiAdapterConfig, MultiAdapterRouter
from mole.routers.phatgoose import PhatgooseConfig, PhatgooseRouter
from mole.routers.poly import PolyConfig, PolyRouter
from mole.routers.predictor import PredictorConfig, PredictorRouter
from mole.routers.product_key import ProductKeyConfig, ProductKeyRouter
from mole.routers.prototypes import PrototypeRouter
from mole.routers.rkhs import RkhsConfig, RkhsRouter
from mole.routers.single import SingleConfig, SingleRouter
from mole.routers.smear import SmearConfig, SmearRouter
from mole.routers.spectral import SpectralConfig, SpectralRouter
from mole.routers.static import StaticConfig, StaticRouter
from mole.routers.task import TaskConfig, TaskRouter
from mole.routers.top_k import TopKConfig, TopKRouter
from mole.routers.uniform import UniformConfig, UniformRouter
from mole.routers.xlora import XLoraConfig, XLoraRouter

__all__ = [
    "AdapterFusionConfig",
    "ArrowConfig",
    "ArrowRouter",
    "AttentionConfig",
    "AttentionRouter",
    "AverageActivationConfig",
    "AverageActivationRouter",
    "Combining",
    "GateConfig",
    "GateRouter",
    "HashConfig",
    "HashRouter",
    "Learning",
    "MixtureShape",
    "MultiAdapterConfig",
    "MultiAdapterRouter",
    "PhatgooseConfig",
    "PhatgooseRouter",
    "Placing",
    "PolyConfig",
    "PolyRouter",
    "PredictorConfig",
    "PredictorRouter",
    "ProductKeyConfig",
    "ProductKeyRouter",
    "PrototypeRouter",
    "RkhsConfig",
    "RkhsRouter",
    "Router",
    "SingleConfig",
    "SingleRouter",
    "SmearConfig",
    "SmearRouter",
    "SpectralConfig",
    "SpectralRouter",
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
