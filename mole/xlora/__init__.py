"""X-LoRA under its own names: the API of the original in both its generations, and the surface of PEFT's port."""

from mole.mixtures import TwoStreamCache
from mole.routing.log import load_scalings_log
from mole.xlora import xlora_utils
from mole.xlora.building import add_xlora_to_model
from mole.xlora.config import XLoraConfig, xLoRAConfig
from mole.xlora.loading import from_pretrained
from mole.xlora.model import XLoraModel, xLoRAModel

__all__ = [
    "TwoStreamCache",
    "XLoraConfig",
    "XLoraModel",
    "add_xlora_to_model",
    "from_pretrained",
    "load_scalings_log",
    "xLoRAConfig",
    "xLoRAModel",
    "xlora_utils",
]
