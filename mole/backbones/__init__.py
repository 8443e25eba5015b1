"""Backbones: load a pretrained causal language model and keep it frozen; find, wrap and replace its modules."""

from mole.backbones import tiny_backbone
from mole.backbones.load import Backbone, PretrainedConfig, load, resolve_device
from mole.backbones.modules import find_modules, get_module, in_out_features, replace_module
from mole.backbones.tiny_backbone import TinyConfig

__all__ = [
    "Backbone",
    "PretrainedConfig",
    "TinyConfig",
    "find_modules",
    "get_module",
    "in_out_features",
    "load",
    "replace_module",
    "resolve_device",
    "tiny_backbone",
]
