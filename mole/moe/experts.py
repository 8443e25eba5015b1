"""The experts of a block: from a list, a factory, or copies of one module; and what can be told of them beforehand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

Experts = Sequence[nn.Module] | nn.ModuleList | nn.Module | Callable[..., nn.Module]


def upcycled(module: nn.Module, num_experts: int, init_noise: float = 0.0, seed: int = 0) -> list[nn.Module]:
    """`num_experts` experts out of one module: itself, as the object that it is, and copies of it.

    Each floating-point parameter w of a copy becomes w + init_noise · std(w) · N(0, 1); the noise is drawn on the CPU
    from a generator of its own. `requires_grad` stays. Source: Komatsuzaki et al. 2022, arXiv 2212.05055.
    """
    generator = torch.Generator().manual_seed(seed)
    return [module, *(_noisy(copy.deepcopy(module), init_noise, generator) for _ in range(num_experts - 1))]


@torch.no_grad()
def _noisy(module: nn.Module, init_noise: float, generator: torch.Generator) -> nn.Module:
    for parameter in module.parameters() if init_noise else ():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2 or parameter.is_meta:  # packed weights
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        spread = parameter.float().std(correction=0)
        parameter.add_((init_noise * spread * noise.to(parameter.device)).to(parameter.dtype))
    return module


def built(experts: Experts, num_experts: int | None, shared: int, init_noise: float) -> list[nn.Module]:
    """The experts of a block, the `shared` ones last.

    A list holds all of them; a factory is called for each, with its index if it takes an argument; a module is copied.
    Raises ValueError for an empty list, one of another length, or a count that is missing.
    """
    if isinstance(experts, nn.ModuleList | list | tuple):
        found = list(experts)
        if not found:
            raise ValueError("experts is an empty list: give at least one module")
        if num_experts is not None and len(found) != num_experts + shared:
            raise ValueError(
                f"num_experts={num_experts} with shared_experts={shared} and a list of {len(found)} experts: leave "
                "num_experts out, or make them agree"
            )
        if len(found) <= shared:
            raise ValueError(f"shared_experts={shared} leaves none of the {len(found)} experts to choose from")
    else:
        if num_experts is None:
            raise ValueError("a module to copy or a factory needs num_experts, how many experts to make of it")
        if isinstance(experts, nn.Module):
            return upcycled(experts, num_experts + shared, init_noise)
        if not callable(experts):
            raise ValueError(f"experts must be a list of modules, a module or a factory, got {type(experts).__name__}")
        takes = _takes_index(experts)
        found = [experts(index) if takes else experts() for index in range(num_experts + shared)]
    if init_noise:
        raise ValueError(f"init_noise={init_noise:g} is for copies of one module: give the module itself")
    wrong = [type(one).__name__ for one in found if not isinstance(one, nn.Module)]
    if wrong:
        raise ValueError(f"every expert must be an nn.Module, got {wrong[0]}")
    return found


def _takes_index(factory: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin
        return False
    needed = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return bool(needed) and needed[0].default is inspect.Parameter.empty


def width_of(expert: nn.Module, route: str) -> int | None:
    """The width of what an expert reads, from its first layer; None where no layer says it.

    Of images: their channels.
    """
    for module in expert.modules():
        if route == "images" and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module.in_channels
        found = getattr(module, "in_features", None) or getattr(module, "embed_dim", None)
        if isinstance(found, int):
            return found
        if type(module).__name__ == "Conv1D" and hasattr(module, "nx"):  # transformers' linear layer of GPT-2
            return int(module.get_parameter("weight").shape[0])
    return None


def first_width(expert: nn.Module) -> int | None:
    """The width that an expert must be given for sure: of a linear layer, or of a chain that begins with one."""
    while isinstance(expert, nn.Sequential) and len(expert):
        expert = next(expert.children())
    return expert.in_features if isinstance(expert, nn.Linear) else None


def architecture(expert: nn.Module) -> tuple:
    """Equal for experts that do the same with other weights."""
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in expert.named_parameters()]
    return repr(expert), tuple(shapes), tuple((name, tuple(b.shape)) for name, b in expert.named_buffers())
