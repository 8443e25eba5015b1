"""Experts out of one module: itself and copies of it, with or without noise; fresh ones; the same of other models.

Komatsuzaki et al. 2022, "Sparse upcycling", arXiv 2212.05055.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def copies(
    module: nn.Module, num_experts: int, *, init_noise: float = 0.0, generator: torch.Generator | None = None
) -> list[nn.Module]:
    """`module` itself, as the object that it is, and `num_experts` − 1 copies of it.

    Each floating-point parameter w of a copy becomes w + init_noise·std(w)·N(0, 1); the noise is drawn on the CPU from
    `generator` (None: torch's own), so that it does not depend on the device. `requires_grad` is kept.
    """
    return [module, *(_noisy(copy.deepcopy(module), init_noise, generator) for _ in range(num_experts - 1))]


@torch.no_grad()
def _noisy(module: nn.Module, init_noise: float, generator: torch.Generator | None) -> nn.Module:
    for parameter in module.parameters() if init_noise else ():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:  # packed weights stay as they are
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        spread = parameter.float().std(correction=0)
        parameter.add_((init_noise * spread * noise.to(parameter.device)).to(parameter.dtype))
    return module


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
