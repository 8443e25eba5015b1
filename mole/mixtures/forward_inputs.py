"""What a mixture's forward is given: checked before anything is computed, then as the backbone takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from mole.routing.losses import UNLABELLED, check_losses

_IF_TAKEN = ("position_ids", "token_type_ids")  # `generate` and tokenizers make them for every backbone


def inputs_of(
    model: Any, named: Mapping[str, Any], others: Mapping[str, Any], use_cache: bool | None
) -> dict[str, Any]:
    """The backbone's inputs: of the `named` ones those that are given and that it takes, all `others`.

    Raises ValueError for a cache that is none of transformers', for one of a backbone that takes none, and for a
    mixture that is taken apart.
    """
    check_standing(model)
    cache = named["past_key_values"]
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values: got a {type(cache).__name__}, need a transformers Cache: tuples of keys and values, as "
            "older versions had them, are not taken; give what an earlier forward returned, or a new DynamicCache()"
        )
    found = {name: value for name, value in named.items() if value is not None}
    found = {name: value for name, value in found.items() if name not in _IF_TAKEN or name in model.takes}
    return {**found, **others, **_cache_wanted(model, use_cache)}


def _cache_wanted(model: Any, use_cache: bool | None) -> dict[str, bool]:
    """What the backbone is told of a cache, if it knows any."""
    if use_cache and not model.can_cache:
        raise ValueError(
            f"use_cache=True: a {type(model.backbone).__name__} takes no cache, or its tokens see later ones"
        )
    wanted = bool(getattr(model.config, "use_cache", False)) and not model.training
    return {"use_cache": wanted if use_cache is None else use_cache} if model.can_cache else {}


def wants_tuple(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether the caller wants the output as a tuple; `inputs` then ask for one by name, which mixtures work with."""
    wanted = inputs.get("return_dict")
    wanted = getattr(model.config, "return_dict", True) if wanted is None else wanted
    if not wanted:
        inputs["return_dict"] = True
    return not wanted


def check_standing(model: Any) -> None:
    """Raises ValueError for a mixture that is taken apart."""
    if not model.layers:
        raise ValueError(
            "unload() gave the backbone back, and there is no mixture any more: call the backbone that it returned, or "
            "build a new one"
        )


def check_supervision(model: Any, labels: Tensor | None) -> None:
    """Raises ValueError for losses that are not known, and for `expert_labels` that no loss reads or no expert has."""
    check_losses(model.losses)
    if labels is None:
        return
    if "expert_label" not in model.losses:
        raise ValueError(
            f"expert_labels: no loss reads them, as losses is {model.losses}: set losses['expert_label'] to a "
            "coefficient, or leave them out"
        )
    odd = labels[(labels != UNLABELLED) & ((labels < 0) | (labels >= model.shape.num_experts))]
    if len(odd):
        names = ", ".join(f"{index} {name}" for index, name in enumerate(model.expert_names[:20]))
        raise ValueError(f"expert_labels: got {int(odd[0])}, need the index of an expert ({names}) or {UNLABELLED}")
