"""Adapters: small trainable modules on a frozen backbone; one file per method."""

from mole.adapters.adapter import Adapter, AdapterLayer
from mole.adapters.attach import attach, attach_weights, detach, extract, layers
from mole.adapters.lora import LoraConfig, LoraLayer, LoraWeights

__all__ = [
    "Adapter",
    "AdapterLayer",
    "LoraConfig",
    "LoraLayer",
    "LoraWeights",
    "attach",
    "attach_weights",
    "detach",
    "extract",
    "layers",
]
