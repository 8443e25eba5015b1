"""What each field of an xLoRAConfig may be, and what to do where it is not."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Fields that every PEFT config has; they say nothing about what X-LoRA computes. `task_type` is kept for its files.
PEFT_FIELDS = (
    "task_type",
    "peft_type",
    "inference_mode",
    "revision",
    "auto_mapping",
    "base_model_name_or_path",
    "peft_version",
)
MODULES_TO_SAVE = ("error", "base", "mean", "mix", "train")


def _whole(value: Any, low: int) -> bool:
    return type(value) is int and value >= low


def _finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _one_of(*known: str) -> tuple[Callable[[Any], bool], str, str]:
    return (lambda value: value in known), f"one of {', '.join(known)}", "choose one of these"


def _device(value: Any) -> bool:
    if value is None or isinstance(value, torch.device):
        return True
    try:
        return isinstance(value, str) and torch.device(value) is not None
    except RuntimeError:
        return False


def _place(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) == 2 and all(isinstance(part, str | os.PathLike) and str(part) for part in value)
    return isinstance(value, str | os.PathLike) and str(value) != ""


def _adapters(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(n, str) and n for n in value) and all(map(_place, value.values()))
    names = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return names and bool(value) and len(set(value)) == len(value)


_FLAG = (lambda value: type(value) is bool), "True or False", "set it to one of them"

# field → (is it valid, what is needed, the way out)
CHECKS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "hidden_size": (
        lambda v: v is None or _whole(v, 1),
        "a whole number of at least 1, or None",
        "leave it out to take the model's",
    ),
    "base_model_id": (
        lambda v: v is None or (isinstance(v, str) and v != ""),
        "non-empty text, or None",
        "give the base model's Hub id or folder",
    ),
    "device": (_device, "a device such as 'cpu' or 'cuda:0', or None", "leave it out to follow the model"),
    "adapters": (
        _adapters,
        "a dict of at least one unique non-empty name → folder, Hub id or (id, sub-folder); or None",
        "name every expert and its place",
    ),
    "enable_softmax": _FLAG,
    "softmax_temperature": (lambda v: _finite(v) and v > 0, "a finite number above 0", "1.0 is the default"),
    "top_k_lora": (
        lambda v: v is None or _whole(v, 1),
        "a whole number of at least 1, or None",
        "None uses every expert",
    ),
    "enable_softmax_topk": _FLAG,
    "layerwise_scalings": _FLAG,
    "xlora_depth": (lambda v: _whole(v, 1), "a whole number of at least 1", "1 is a single linear layer"),
    "xlora_size": (lambda v: _whole(v, 1), "a whole number of at least 1", "2048 is the default"),
    "enable_relu_and_dropout": _FLAG,
    "use_bias": _FLAG,
    "xlora_dropout_p": (lambda v: _finite(v) and 0 <= v < 1, "a number from 0 to below 1", "0.0 turns it off"),
    "use_trainable_adapters": _FLAG,
    "scaling_pass_value": (
        lambda v: v is None or _finite(v),
        "a finite number, or None for 1/experts",
        "0.0 makes the first pass the base model",
    ),
    "global_scaling_weight": (_finite, "a finite number", "1.0 is the default"),
    "stop_token_id": (
        lambda v: v is None or type(v) is int,
        "a whole number or None",
        "leave it out: it has no effect",
    ),
    "router_dtype": _one_of("float32", "float64"),
    "scaling_pass_topk": _FLAG,
    "scaling_pass_dropout": _FLAG,
    "expert_dropout": _one_of("auto", "off", "shared", "independent"),
    "expert_dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "kernel": _one_of("auto", "fused", "loop"),
    "modules_to_save": (
        lambda v: (
            isinstance(v, str) and (v in MODULES_TO_SAVE or re.fullmatch(r"(?:take|train):.+", v, re.S) is not None)
        ),
        f"one of {', '.join(MODULES_TO_SAVE)}, take:<expert>, train:<expert>",
        "choose one of these",
    ),
    "pooled_gate": _one_of("auto", "first", "last", "mean"),
    "gate_lora_bias": _FLAG,
    "gate_refresh": (lambda v: _whole(v, 1), "a whole number of at least 1", "1 is exact"),
    "gate_freeze_after": (
        lambda v: v is None or _whole(v, 1),
        "a whole number of at least 1, or None",
        "None is exact",
    ),
}


def problems(config: Any, *, experts: int | None = None, hidden: int | None = None) -> list[str]:
    """A line `field: got …, need …; …` for all that is wrong; `experts` E and `hidden` H where they are known."""
    found = []
    for name, (valid, need, remedy) in CHECKS.items():
        value = getattr(config, name)
        if not valid(value):
            found.append(_line(name, value, need, remedy))
    if found:
        return found
    k = config.top_k_lora
    if config.enable_softmax_topk and k is None:
        found.append(_line("enable_softmax_topk", True, "top_k_lora to be set", "set top_k_lora, or turn this off"))
    if config.enable_softmax_topk and config.enable_softmax:
        found.append(
            _line("enable_softmax_topk", True, "enable_softmax to be False", "set enable_softmax=False, or this off")
        )
    if experts is not None and k is not None and k > experts:
        found.append(_line("top_k_lora", k, f"at most the number of experts, {experts}", "lower it or add experts"))
    if hidden is not None and config.hidden_size not in (None, hidden):
        found.append(_line("hidden_size", config.hidden_size, f"the model's, {hidden}", "leave it out to take that"))
    return found


def _line(name: str, value: Any, need: str, remedy: str) -> str:
    return f"{name}: got {value!r}, need {need}; {remedy}"
