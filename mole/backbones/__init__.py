"""Backbones: load a pretrained language model and keep it frozen; find, wrap and replace its modules."""

from mole.backbones import tiny_backbone, tiny_encoder
from mole.backbones.load import Backbone, PretrainedConfig, load, resolve_device
from mole.backbones.modules import find_modules, get_module, in_out_features, replace_module
from mole.backbones.tiny_backbone import TinyConfig
from mole.backbones.tiny_encoder import TinyEncoderConfig

__all__ = [
    "Backbone",
    "PretrainedConfig",
    "TinyConfig",
    "TinyEncoderConfig",
    "find_modules",
    "get_module",
    "in_out_features",
    "load",
    "replace_module",
    "resolve_device",
    "tiny_backbone",
    "tiny_encoder",
]
