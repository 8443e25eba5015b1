"""Backbones whose linear layers are held in 8 or 4 bits, by bitsandbytes (Dettmers et al., 2023, arXiv 2305.14314)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch


def loading_options(bits: int, dtype: str, device: torch.device) -> dict[str, Any]:
    """What transformers is told to load linear layers in 8 or 4 (NF4) bits straight to `device`; the head stays whole.

    `dtype` of the computation in 4 bits, auto: bfloat16 on an accelerator, float32 else. Raises ValueError if
    bitsandbytes is missing.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"backbone.bits={bits} needs bitsandbytes: pip install 'mole-experts[quantised]'")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        compute = usual if dtype == "auto" else getattr(torch, dtype)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config, "device_map": {"": device}}


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape that a parameter had before it was packed."""
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.shape if packed is None else torch.Size(packed)
