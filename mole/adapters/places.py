"""Where methods that adapt more than single linear modules have their place in a backbone: found by its structure.

A block is a member of a list of modules that has an attention as a part of its own; the rest of it is its feed-forward.
Prompts and prefixes know their place in any backbone by itself: their weights are kept under a symbol, `prompt` or
`<number of the block>.prefix`, which is replaced by a path when they are put on a backbone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mole.adapters.adapter import Adapter
from mole.backbones.modules import in_out_features, kind_of, reads_left_to_right

PROMPT = "prompt"
_PREFIX = re.compile(r"(\d+)\.prefix", re.ASCII)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_forward|^ff$|^ffw$", re.IGNORECASE)


def prefix_symbol(block: int) -> str:
    """The symbol of the prefix of that block's attention."""
    return f"{block}.prefix"


def width_of(model: Any) -> int:
    """Features of the hidden states."""
    return model.config.get_text_config().hidden_size


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks, path → module, in order: those of a tower for images or sound left out.

    Raises ValueError for a model without any.
    """
    found: dict[str, nn.Module] = {}
    towers = tuple(f"{path}." for path, module in model.named_modules() if path and _reads_other_than(model, module))
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or path.startswith(towers):
            continue
        if all(_attention_names(block) for block in module):
            found |= {f"{path}.{name}": block for name, block in module.named_children()}
    if not found:
        raise ValueError(f"a {type(model).__name__} has no list of blocks with an attention in each: name the modules")
    return found


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions of all blocks, path → module, in order."""
    return {
        f"{path}.{name}": block.get_submodule(name)
        for path, block in blocks(model).items()
        for name in _attention_names(block)
    }


def feed_forwards(model: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward of each block, path → module. Raises ValueError for a block where it is no module of its own."""
    found = {}
    for path, block in blocks(model).items():
        names = [name for name, _ in block.named_children() if _FEED_FORWARD.search(name)]
        if len(names) != 1:
            raise ValueError(
                f"{path} has {len(names)} modules called mlp, ffn or feed_forward: name the modules in adapter.targets"
            )
        found[f"{path}.{names[0]}"] = block.get_submodule(names[0])
    return found


def outputs_of_blocks(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The last linear module of every attention, and of every feed-forward, that gives hidden states: path → module.

    Raises ValueError for a block without one.
    """
    width, found = width_of(model), ({}, {})
    for path, block in blocks(model).items():
        attention = tuple(f"{name}." for name in _attention_names(block))
        linear = {
            name: module
            for name, module in block.named_modules()
            if kind_of(module) == "linear" and "experts." not in name and in_out_features(module)[1] == width
        }
        parts = ({n: m for n, m in linear.items() if n.startswith(a)} for a in attention)
        rest = {name: module for name, module in linear.items() if not name.startswith(attention)}
        for place, part in [*((0, part) for part in parts), (1, rest)]:
            if not part:
                what = "feed-forward" if place else "attention"
                raise ValueError(
                    f"the {what} of {path} has no linear module that gives hidden states: name the modules"
                )
            name, module = list(part.items())[-1]
            found[place][f"{path}.{name}"] = module
    return found


def check_decoder(model: Any, what: str) -> None:
    """Raises ValueError for a model that sees later tokens, or has an encoder: `what` come before the text."""
    if getattr(model.config, "is_encoder_decoder", False) or not reads_left_to_right(model):
        raise ValueError(f"{what} are for models that read from left to right, without an encoder")


def inner_model(model: Any) -> tuple[str, nn.Module]:
    """The model around the blocks, without a head, with its path: the innermost, as heads may call it at once.

    Raises ValueError where the blocks are in no model of their own.
    """
    parts = next(iter(blocks(model))).split(".")
    for end in range(len(parts) - 2, 0, -1):
        path = ".".join(parts[:end])
        inner = model.get_submodule(path)
        if isinstance(inner, PreTrainedModel):
            return path, inner
    raise ValueError(f"a {type(model).__name__} has no inner model whose input can be extended")


def placed(model: Any, adapter: Adapter) -> Adapter:
    """The adapter with paths of `model` in the place of symbols. Raises ValueError for one that has no place there."""
    if not any(getattr(weights, "symbol", None) == path for path, weights in adapter.modules.items()):
        return adapter
    inside = None
    found = {}
    for path, weights in adapter.modules.items():
        if path == PROMPT:
            path = inner_model(model)[0]
        elif match := _PREFIX.fullmatch(path):
            inside = list(attentions(model)) if inside is None else inside
            if int(match[1]) >= len(inside):
                raise ValueError(f"a prefix for block {match[1]}, and the backbone has {len(inside)} blocks")
            path = inside[int(match[1])]
        found[path] = weights
    return replace(adapter, modules=found)


def symbolic(adapter: Adapter) -> Adapter:
    """The adapter with symbols in the place of paths, where its weights have one."""
    return replace(adapter, modules={getattr(w, "symbol", None) or path: w for path, w in adapter.modules.items()})


def _reads_other_than(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` is a tower for another kind of input than that of `model`."""
    mine = getattr(model, "main_input_name", None)
    return isinstance(module, PreTrainedModel) and module.main_input_name != mine == "input_ids"


def _attention_names(block: nn.Module) -> list[str]:
    """Children that are attentions: not their norms."""
    return [
        name
        for name, child in block.named_children()
        if _ATTENTION.search(name) and any(kind_of(part) == "linear" for part in child.modules())
    ]
