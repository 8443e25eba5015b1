"""From what a caller gives to what a block is built of: one configuration, the modules, the width of their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mole.moe.config import MoEConfig, counts
from mole.moe.experts import Experts, built, first_width, width_of
from mole.moe.flat import changed, from_flat
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
        config = changed(config, **{name: given[name] for name in _BESIDE if name in given})
    else:
        listed = len(experts) if isinstance(experts, nn.ModuleList | list | tuple) and len(experts) else None
        config = from_flat({**given, **({} if num_experts is None else {"num_experts": num_experts})}, listed)
    places = {name: True for name, value in place.items() if value}
    if places:
        config = changed(config, **places)
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
        _check_takes(experts, input_dim, config)
        return input_dim
    return next(iter(found)) if found else width_of(experts[0], config.route)


def _check_takes(experts: Sequence[nn.Module], input_dim: int, config: MoEConfig) -> None:
    """Raises ValueError for an expert whose first linear layer has another width, and which does not work on this one.

    The order of a module's layers does not say for sure what it reads, so it is tried.
    """
    for index, expert in enumerate(experts if config.route != "images" else ()):
        taken = width_of(expert, config.route)
        if taken in (None, input_dim):
            continue
        like = next((p for p in expert.parameters() if p.is_floating_point()), torch.zeros(()))
        try:
            with quietly([expert], like.device):
                expert(torch.zeros(1, 2, input_dim, dtype=like.dtype, device=like.device))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"input_dim={input_dim}: expert {index} ({type(expert).__name__}) does not work on it, its first "
                f"linear layer takes {taken}: {str(error).partition(chr(10))[0][:160]}"
            ) from None
        except TypeError:  # it wants more than a tensor: a block's own expert_forward knows what
            continue


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
