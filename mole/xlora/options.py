"""Which fields of an xLoRAConfig are built into a model, and what the mixture is told of them."""

from __future__ import annotations

from inspect import signature
from typing import Any

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
