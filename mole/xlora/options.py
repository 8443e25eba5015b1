"""Which fields of an xLoRAConfig are built into a model, and what the mixture is told of them."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from mole.mixtures import MultiExpertModel
from mole.xlora.config import xLoRAConfig

# Assigning another value to one of these once the model stands cannot act.
BUILT_IN = (
    "hidden_size",
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "enable_relu_and_dropout",
    "use_bias",
    "router_dtype",
    "expert_dropout",
    "expert_dtype",
    "kernel",
    "modules_to_save",
    "pooled_gate",
    "gate_lora_bias",
    "scaling_pass_dropout",
)
_PASSED_ON = (
    "expert_dropout",
    "expert_dtype",
    "modules_to_save",
    "pooled_gate",
    "gate_lora_bias",
    "scaling_pass_dropout",
)


def existing_device(device: Any) -> torch.device:
    """The device of that name. Raises ValueError for what is none, or none of this machine's."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts
        raise ValueError(
            f"device: got {str(device)!r}, need a device of this machine such as 'cpu' ({error}); leave it out to "
            "follow the model"
        ) from None
    return found


def mixture_options(config: xLoRAConfig) -> dict[str, Any]:
    """Keyword arguments of MultiExpertModel. Raises ValueError for an option that it cannot follow."""
    known = signature(MultiExpertModel).parameters
    options: dict[str, Any] = {"kernel": "stacked" if config.kernel == "fused" else config.kernel}
    for name in _PASSED_ON:
        value, default = getattr(config, name), getattr(xLoRAConfig, name)
        if name in known:
            options[name] = value
        elif value != default:
            raise ValueError(f"{name}: got {value!r}, need {default!r}; this version of the mixture knows no other")
    return options
