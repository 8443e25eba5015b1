"""Adapters: small trainable modules on a frozen backbone; one file per method."""

from mole.adapters.adapter import Adapter, AdapterLayer, Weights
from mole.adapters.attach import attach, attach_weights, detach, extract, layers
from mole.adapters.bottleneck import BottleneckLayer, BottleneckWeights
from mole.adapters.bottleneck_config import BottleneckConfig, HoulsbyConfig, ParallelConfig, PfeifferConfig
from mole.adapters.dora import DoraConfig, DoraLayer
from mole.adapters.ia3 import Ia3Config, Ia3Layer, Ia3Weights
from mole.adapters.lora import LoraConfig, LoraLayer, LoraWeights
from mole.adapters.norm import NormWeights
from mole.adapters.pissa import PissaConfig, PissaLayer
from mole.adapters.places import placed, symbolic
from mole.adapters.prefix import PrefixConfig, PrefixLayer, PrefixWeights
from mole.adapters.prompt import PromptConfig, PromptLayer, PromptWeights
from mole.adapters.rslora import RsLoraConfig

__all__ = [
    "Adapter",
    "AdapterLayer",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckWeights",
    "DoraConfig",
    "DoraLayer",
    "HoulsbyConfig",
    "Ia3Config",
    "Ia3Layer",
    "Ia3Weights",
    "LoraConfig",
    "LoraLayer",
    "LoraWeights",
    "NormWeights",
    "ParallelConfig",
    "PfeifferConfig",
    "PissaConfig",
    "PissaLayer",
    "PrefixConfig",
    "PrefixLayer",
    "PrefixWeights",
    "PromptConfig",
    "PromptLayer",
    "PromptWeights",
    "RsLoraConfig",
    "Weights",
    "attach",
    "attach_weights",
    "detach",
    "extract",
    "layers",
    "placed",
    "symbolic",
]
