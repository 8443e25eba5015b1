"""Experts out of a module of a model: started anew, or the modules of the same name of other models."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def fresh(module: nn.Module, num_experts: int, *, seed: int) -> list[nn.Module]:
    """`num_experts` copies of `module`, each started anew by its parts' own `reset_parameters`.

    Raises ValueError for a part that has parameters and no such method.
    """
    for name, part in module.named_modules():
        if next(part.parameters(recurse=False), None) is not None and not hasattr(part, "reset_parameters"):
            raise ValueError(
                f"init=fresh: {name or 'the module'}, a {type(part).__name__}, has parameters but no "
                "reset_parameters(): use init=copy with init_noise"
            )
    with torch.random.fork_rng(devices=_devices(module)):
        torch.manual_seed(seed)
        return [_reset(copy.deepcopy(module)) for _ in range(num_experts)]


def _devices(module: nn.Module) -> list[torch.device]:
    return list({parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"})


def _reset(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if next(part.parameters(recurse=False), None) is not None:
            part.reset_parameters()  # type: ignore[operator]
    return module


def of_models(module: nn.Module, name: str, models: Sequence[nn.Module]) -> list[nn.Module]:
    """`module` and the module called `name` of each of `models`, as copies.

    Raises ValueError where a model has no such module, or one with other parameters or shapes.
    """
    found = [module]
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    for index, model in enumerate(models):
        try:
            other = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"init: model {index} has no module {name}") from None
        shapes = {key: tuple(tensor.shape) for key, tensor in other.state_dict().items()}
        if shapes != wanted:
            odd = next(key for key in sorted({*shapes, *wanted}) if shapes.get(key) != wanted.get(key))
            raise ValueError(
                f"init: {name} of model {index} does not fit: {odd} is {shapes.get(odd, 'absent')} there, "
                f"{wanted.get(odd, 'absent')} here"
            )
        first = next(module.parameters(), None)
        expert = copy.deepcopy(other)
        found.append(expert if first is None else expert.to(first.device))
    return found
