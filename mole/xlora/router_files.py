"""The router's tensors under the names that the original and PEFT give them, written and read with every check.

original   inner.{k·q}.weight …, last.weight …      q = 3 with ReLU and dropout, else 1
PEFT       base_model.internal_xlora_classifier.layers.{k·q}.weight …   q = 3 with dropout above 0, else 2; last too
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mole.routers import XLoraRouter
from mole.untrusted import FLOATS, Damaged, safetensors_tensors, shown

PEFT_PREFIX = "base_model.internal_xlora_classifier."
_ORIGINAL = re.compile(r"(?:inner\.(\d{1,6})|last)\.(weight|bias)", re.ASCII)
_PEFT = re.compile(r"layers\.(\d{1,6})\.(weight|bias)", re.ASCII)
_LAST = 1 << 30

Layers = list[tuple[Tensor, Tensor | None]]  # weight [out, in] and bias [out] of each linear layer, first to last


def linears(router: XLoraRouter) -> list[nn.Linear]:
    """The router's linear layers, first to last."""
    return [layer for layer in router.classifier if isinstance(layer, nn.Linear)]


def layers_of(router: XLoraRouter) -> Layers:
    """Copies of the router's weights on the CPU."""
    return [
        (layer.weight.detach().cpu().clone(), None if layer.bias is None else layer.bias.detach().cpu().clone())
        for layer in linears(router)
    ]


def put_layers(router: XLoraRouter, layers: Layers) -> None:
    """Fills the router, whose shapes were checked before."""
    with torch.no_grad():
        for linear, (weight, bias) in zip(linears(router), layers, strict=True):
            linear.weight.copy_(weight)
            if linear.bias is not None:
                assert bias is not None
                linear.bias.copy_(bias)


def original_step(config: Any) -> int:
    """q of the original's indices."""
    return 3 if config.enable_relu_and_dropout else 1


def peft_step(config: Any) -> int:
    """q of PEFT's indices."""
    return 3 if config.xlora_dropout_p > 0 else 2


def dump_original(layers: Layers, config: Any) -> bytes:
    """The original's `xlora_classifier.safetensors`."""
    step, tensors = original_step(config), {}
    for k, (weight, bias) in enumerate(layers):
        stem = "last" if k == len(layers) - 1 else f"inner.{k * step}"
        tensors |= {f"{stem}.weight": weight.contiguous()} | ({} if bias is None else {f"{stem}.bias": bias})
    return save(tensors, metadata={"format": "pt"})


def dump_peft(layers: Layers, config: Any) -> bytes:
    """PEFT's `adapter_model.safetensors`; it knows no router without biases: absent ones are zero."""
    step, tensors = peft_step(config), {}
    for k, (weight, bias) in enumerate(layers):
        stem = f"{PEFT_PREFIX}layers.{k * step}"
        tensors[f"{stem}.weight"] = weight.contiguous()
        tensors[f"{stem}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    return save(tensors, metadata={"format": "pt"})


def parse_original(data: bytes, what: str, *, depth: int) -> tuple[Layers, int | None]:
    """The layers in the original's file, and the spacing of its indices where depth ≥ 3 shows it."""
    found = _by_index(_tensors(data, what), _ORIGINAL, what)
    indices = sorted(found)
    wanted = depth - 1
    if not indices or indices[-1] != _LAST:
        raise Damaged(f"{what}: expected last.weight, got {_names(found)}; the router is incomplete: save it again")
    inner = indices[:-1]
    if len(inner) != wanted:
        raise Damaged(
            f"{what}: expected {wanted} hidden layers for xlora_depth={depth}, got {len(inner)} ({_names(found)}); "
            "the config and the router are of different checkpoints"
        )
    step = inner[1] - inner[0] if len(inner) > 1 else None
    if inner and inner != [k * (step or 0) for k in range(len(inner))]:
        raise Damaged(f"{what}: expected evenly spaced indices of hidden layers from 0, got {inner}")
    return [found[index] for index in indices], step


def parse_peft(data: bytes, what: str, config: Any) -> Layers:
    """The layers in PEFT's file. Raises Damaged, with the cause, if PEFT lost some of them on saving."""
    tensors = _tensors(data, what)
    short = {}
    for name, tensor in tensors.items():
        key = name.removeprefix(PEFT_PREFIX)
        if key == name:
            raise Damaged(f"{what}: expected names that begin with {PEFT_PREFIX}, got {shown(name)}; no X-LoRA router")
        if re.fullmatch(r"layers\.(weight|bias)", key):
            raise _lost(what, f"{shown(name)} has lost its index", len(tensors))
        short[key] = tensor
    step = peft_step(config)
    wanted = [k * step for k in range(config.xlora_depth)]
    found = _by_index(short, _PEFT, what, missing_ok=True)
    missing = [f"layers.{k}.{part}" for k in wanted for part in ("weight", "bias") if f"layers.{k}.{part}" not in short]
    if missing:
        raise _lost(what, f"expected {', '.join(missing)}", len(tensors))
    surplus = sorted(set(found) - set(wanted))
    if surplus:
        raise Damaged(f"{what}: expected layers {wanted}, got also {surplus}; config and router do not belong together")
    return [found[index] for index in wanted]


def _lost(what: str, expected: str, got: int) -> Damaged:
    return Damaged(
        f"{what}: {expected}, got {got} router tensors. PEFT 0.20.0 to 0.21.2 drops or renames, on saving, every "
        "router tensor whose index equals an expert's name; these weights are lost. Save again with PEFT 0.19.1 or "
        "older, or keep the live model and save it with mole"
    )


def _tensors(data: bytes, what: str) -> dict[str, Tensor]:
    return safetensors_tensors(data, what, dtypes={**FLOATS, "F64": 8})


def _by_index(
    tensors: Mapping[str, Tensor], pattern: re.Pattern, what: str, *, missing_ok: bool = False
) -> dict[int, tuple[Tensor, Tensor | None]]:
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if not match:
            raise Damaged(f"{what}: expected tensors of an X-LoRA router only, got {shown(name)}")
        parts.setdefault(_LAST if match[1] is None else int(match[1]), {})[match[2]] = tensor
    for index, pair in parts.items():
        if "weight" not in pair and not missing_ok:
            raise Damaged(f"{what}: expected a weight beside the bias of layer {index}; save the router again")
    return {index: (pair["weight"], pair.get("bias")) for index, pair in parts.items() if "weight" in pair}


def _names(found: Mapping[int, Any]) -> str:
    return ", ".join("last" if index == _LAST else f"inner.{index}" for index in sorted(found)) or "no tensors"


def check_shapes(layers: Layers, config: Any, hidden: int, outputs: int, what: str) -> None:
    """Raises Damaged unless shapes are the chain H → size → … → O, O = `outputs`, biases as configured."""
    width = hidden
    for k, (weight, bias) in enumerate(layers):
        height = outputs if k == len(layers) - 1 else config.xlora_size
        shape = tuple(weight.shape)
        if shape != (height, width):
            raise Damaged(
                f"{what}: layer {k + 1} of {len(layers)}: expected shape {(height, width)}, got {shape}; the router "
                "was trained for other experts, layers or another base model"
            )
        if (bias is not None) != config.use_bias or (bias is not None and tuple(bias.shape) != shape[:1]):
            got = "none" if bias is None else f"shape {tuple(bias.shape)}"
            raise Damaged(f"{what}: layer {k + 1}: expected {_biases(config, shape)}, got {got}")
        width = height


def _biases(config: Any, shape: tuple) -> str:
    return f"a bias of shape ({shape[0]},) (use_bias=True)" if config.use_bias else "no bias (use_bias=False)"
