"""A forward over packed rows: what it refuses, and what routers get to see of it, which is each sample alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from mole.mixtures.two_pass.encoder_decoder import is_one
from mole.routing import Packing, RoutingInputs


def packed(
    model: Any, seen: RoutingInputs, segment_ids: Tensor | None, inputs: dict[str, Any]
) -> tuple[RoutingInputs, Packing | None]:
    """What routers see, and where the samples lie; `seen` and None where rows are not packed.

    Puts what the backbone needs into `inputs`. Raises ValueError where a backbone, an expert or another input would let
    samples see each other, and for names or texts that are not one for each sample.
    """
    if segment_ids is None:
        return seen, None
    if is_one(model.backbone) or "position_ids" not in model.takes:
        raise ValueError(
            f"packed rows: a {type(model.backbone).__name__} cannot be told by positions where a text begins"
        )
    if inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        raise ValueError("packed rows: segment_ids go with neither an attention_mask nor a cache")
    prompts = [site for site, layer in model.layers.items() if layer.fit.takes == "sequence"]
    if prompts:
        raise ValueError(f"packed rows: prompt experts ({prompts[0]}) stand before a whole row, not before each sample")
    packing = Packing(segment_ids)
    inputs.setdefault("position_ids", packing.position_ids)
    if "use_cache" in model.takes:
        inputs["use_cache"] = False
    return _of_samples(seen, packing), packing


def _of_samples(seen: RoutingInputs, packing: Packing) -> RoutingInputs:
    for name in ("task_names", "texts"):
        given = getattr(seen, name)
        if given is not None and len(given) != packing.num_samples:
            raise ValueError(f"packed rows hold {packing.num_samples} samples, and there are {len(given)} {name}")
    prompt = None if seen.prompt_mask is None else packing.apart(seen.prompt_mask) & packing.mask
    ids = None if seen.input_ids is None else packing.apart(seen.input_ids)
    return replace(seen, input_ids=ids, attention_mask=packing.mask, prompt_mask=prompt)
