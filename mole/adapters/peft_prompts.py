"""Prompts and prefixes in PEFT's format: one tensor, `prompt_embeddings`, and numbers that say how it is cut.

A prompt's is [m, d]. A prefix's is [m, 2 L h d_head]: for each block its keys, then its values, head by head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.places import PROMPT, prefix_symbol
from mole.adapters.prefix import PrefixWeights
from mole.adapters.prompt import PromptWeights
from mole.untrusted import Damaged, Refused, shown

_TENSOR = "prompt_embeddings"
_MOST = 4096


def read_prompt(settings: dict[str, Any], tensors: dict[str, Tensor], what: str) -> dict[str, PromptWeights]:
    """The one prompt, under its symbol. Raises Damaged, Refused."""
    numbers = _numbers(settings, ("num_virtual_tokens", "token_dim"), what)
    tensor = _only(tensors, what)
    if tuple(tensor.shape) != (numbers["num_virtual_tokens"], numbers["token_dim"]):
        raise Damaged(f"{what}: {_TENSOR} of shape {tuple(tensor.shape)}, and the config says {numbers}")
    return {PROMPT: PromptWeights(tensor)}


def read_prefix(settings: dict[str, Any], tensors: dict[str, Tensor], what: str) -> dict[str, PrefixWeights]:
    """The prefix of each block, under its symbol. Raises Damaged, Refused."""
    names = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
    numbers = _numbers(settings, names, what)
    tensor = _only(tensors, what)
    tokens, width, blocks, heads = (numbers[name] for name in names)
    if width % heads or tuple(tensor.shape) != (tokens, 2 * blocks * width):
        raise Damaged(f"{what}: {_TENSOR} of shape {tuple(tensor.shape)}, and the config says {numbers}")
    parts = tensor.view(tokens, blocks, 2, heads, width // heads)
    return {
        prefix_symbol(block): PrefixWeights(parts[:, block, 0].clone(), parts[:, block, 1].clone(), block)
        for block in range(blocks)
    }


def _numbers(settings: dict[str, Any], names: tuple[str, ...], what: str) -> dict[str, int]:
    if settings.get("num_transformer_submodules") not in (None, 1):
        raise Refused(f"{what}: num_transformer_submodules is not 1: it is for a model with an encoder and a decoder")
    for name in names:
        value = settings.get(name)
        if type(value) is not int or not 1 <= value <= (_MOST if name == "num_virtual_tokens" else 1 << 20):
            raise Damaged(f"{what}: {name} must be a whole number from 1 on, got {shown(value)}")
    return {name: settings[name] for name in names}


def _only(tensors: dict[str, Tensor], what: str) -> Tensor:
    for name in tensors:
        if name != _TENSOR:
            raise Refused(f"{what}: tensor {shown(name)} is not {_TENSOR}")
    if _TENSOR not in tensors:
        raise Damaged(f"{what}: no {_TENSOR} in it")
    return tensors[_TENSOR]


def named(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's name → tensor. Raises ValueError for a prefix that some blocks lack, or that differs in shape."""
    parts = list(adapter.modules.values())
    if adapter.method == "prompt":
        return {_TENSOR: parts[0].embeddings}
    shapes = {tuple(part.keys.shape) for part in parts}
    if len(shapes) > 1 or [part.block for part in parts] != list(range(len(parts))):
        raise ValueError("PEFT has no place for a prefix of other lengths, or of some blocks only")
    both = torch.stack([torch.stack([part.keys, part.values], dim=1) for part in parts], dim=1)
    return {_TENSOR: both.flatten(1)}  # from [m, L, 2, heads, d_head]


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """What the config says beside what every method's does."""
    parts = list(adapter.modules.values())
    if adapter.method == "prompt":
        tokens, width = parts[0].embeddings.shape
        own = {"num_attention_heads": None, "num_layers": None, "prompt_tuning_init": "RANDOM"}
    else:
        tokens, heads, head_dim = parts[0].keys.shape
        width = heads * head_dim
        own = {"num_attention_heads": heads, "num_layers": len(parts), "prefix_projection": False}
        own["encoder_hidden_size"] = width
    return {"num_transformer_submodules": 1, "num_virtual_tokens": tokens, "token_dim": width, **own}
