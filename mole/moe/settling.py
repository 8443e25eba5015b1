"""From what a caller gives to what a block is built of: one configuration, the modules, the width of their input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mole.moe.config import MoEConfig, counts, from_flat
from mole.moe.experts import Experts, built, first_width, width_of
from mole.moe.quiet import quietly

_BESIDE = ("layer_id",)  # flat arguments that go with a whole configuration


def settled(
    experts: Experts, num_experts: int | None, config: MoEConfig | None, given: dict[str, Any], **place: bool
) -> tuple[MoEConfig, list[nn.Module], int]:
    """The configuration, all modules with the shared ones last, and how many of them are chosen from.

    `given`: flat arguments; `place`: causal and allow_noncausal. Raises ValueError for what does not go together.
    """
    if config is not None:
        clash = [name for name in given if name not in _BESIDE]
        if num_experts is not None:
            clash.append("num_experts")
        if clash:
            raise ValueError(f"config and {', '.join(clash)} are given: set {clash[0]} in the configuration")
        config = replace(config, **{name: given[name] for name in _BESIDE if name in given})
    else:
        config = from_flat({**given, **({} if num_experts is None else {"num_experts": num_experts})})
    places = {name: True for name, value in place.items() if value}
    if places:
        config = replace(config, **places)
    modules = built(experts, config.num_experts, config.shared_experts, config.init_noise)
    count = len(modules) - config.shared_experts
    problems = counts(config, count)
    if problems:
        raise ValueError("; ".join(problems))
    return config, modules, count


def input_width(experts: Sequence[nn.Module], input_dim: int | None, config: MoEConfig) -> int | None:
    """The width of the input: as given, or as the experts tell. Raises ValueError where the two differ."""
    found = {width for expert in experts if (width := first_width(expert)) is not None}
    if config.route == "images":
        found = set()
    for width in found:
        if input_dim is not None and width != input_dim:
            raise ValueError(f"input_dim={input_dim}, but the experts' first linear layer takes {width}")
    if len(found) > 1:
        raise ValueError(f"the experts' first linear layers take inputs of {', '.join(map(str, sorted(found)))}")
    if input_dim is not None:
        return input_dim
    return next(iter(found)) if found else width_of(experts[0], config.route)


def constant_width(expert: nn.Module, call: Any, config: MoEConfig, input_dim: int | None) -> int | None:
    """The width of an expert's output, if the configuration has constants. Raises ValueError if it cannot be told."""
    if "constant" not in config.null_experts:
        return None
    like = next((p for p in expert.parameters() if p.is_floating_point()), torch.zeros(()))
    shape = (1, 1, input_dim or 1)
    try:
        with quietly([expert], like.device):
            out = call(expert, torch.zeros(shape, dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"null_experts: constant needs the width of the experts' output: {error}") from None
    return int(out.shape[-1])
