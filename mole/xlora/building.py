"""add_xlora_to_model: put X-LoRA on a base model, experts from folders or the Hub, the router fresh."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mole.xlora.config import xLoRAConfig
from mole.xlora.expert_search import read_experts
from mole.xlora.model import XLoraModel


def add_xlora_to_model(
    model: PreTrainedModel,
    xlora_config: Any,
    *args: Any,
    adapters: Mapping[str, Any] | None = None,
    verbose: bool = False,
    subfolders: Sequence[str | None] | None = None,
    local_files_only: bool = False,
) -> XLoraModel:
    """`model` as an X-LoRA of the experts in the config or in `adapters` (name → folder or Hub id), with a new router.

    Both forms of the original work: (model, config, adapters, verbose) and (model, config, verbose). `xlora_config` may
    be an xLoRAConfig, PEFT's XLoraConfig or a mapping; the model gets a copy. `subfolders` has one for each expert on
    the Hub. Raises ValueError for a config or experts that do not fit the model, TypeError for other arguments.
    """
    for value in args:
        if isinstance(value, Mapping) and adapters is None:
            adapters = value
        elif isinstance(value, bool):
            verbose = value
        elif value is not None:
            raise TypeError(
                f"add_xlora_to_model: {type(value).__name__} by place; it is either (model, xlora_config, adapters: "
                "dict, verbose: bool) or (model, xlora_config, verbose: bool)"
            )
    config = copy.copy(xLoRAConfig.of(xlora_config))
    config.check(hidden=model.config.get_text_config().hidden_size)
    places = _adapters(config, adapters)
    if subfolders is not None:
        if len(subfolders) != len(places):
            raise ValueError(f"subfolders: got {len(subfolders)}, need one for each of {len(places)} experts")
        pairs = zip(places.items(), subfolders, strict=True)
        places = {name: place if sub is None else (place, sub) for (name, place), sub in pairs}
    config.adapters = places
    config.check(experts=len(places))
    wanted = {name: (name, place, None) for name, place in places.items()}
    experts = read_experts(wanted, Path(), "xlora_config", local_files_only=local_files_only)
    built = XLoraModel(model, config, experts)
    if verbose:
        describe(built)
    return built


def describe(model: XLoraModel) -> None:
    """Prints what `verbose` asks for."""
    print(f"X-LoRA: {len(model.experts)} experts ({', '.join(model.experts)}) on {len(model.sites)} layers")
    model.print_trainable_parameters()


def _adapters(config: xLoRAConfig, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(config.adapters, list):
        raise ValueError(f"adapters: got the names {config.adapters}, need name → path to build a model")
    if given is None and config.adapters is None:
        raise ValueError("adapters: got none, need name → path in the config or as the third argument")
    if given is not None and config.adapters is not None and list(given.items()) != list(config.adapters.items()):
        raise ValueError(
            f"adapters: got {list(given)} beside the config's {list(config.adapters)}, need the same names and places "
            "in the same order, which is that of the gates; give them once"
        )
    return dict(given or config.adapters or {})
