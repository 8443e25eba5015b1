"""What experts hold of the backbone itself: heads and other whole modules, and biases. It is merged linearly.

M = M_0 + Σ c_e (M_e − M_0): an expert without the module counts as the backbone's own. Where the c_e of those that have
it add up to 1, M_0 drops out, and no backbone is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mole.adapters import Adapter

Shares = Callable[[Sequence[str], str], dict[str, float]]


def merged_modules(
    experts: Mapping[str, Adapter], shares: Shares, backbone: nn.Module | None, dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    """Path → parameters of the whole modules. Raises ValueError for unlike ones, or where the backbone is needed."""
    found: dict[str, dict[str, Tensor]] = {}
    for path in _all(experts, lambda adapter: adapter.full_modules):
        parts = {n: experts[n].full_modules[path] for n in sorted(experts) if path in experts[n].full_modules}
        names = {name: sorted(part) for name, part in parts.items()}
        first = next(iter(names))
        for other in names:
            if names[other] != names[first]:
                raise ValueError(f"{path}: the experts {first!r} and {other!r} saved unlike modules there")
        weights = shares(list(parts), path)
        for name in names[first]:
            tensors = {expert: part[name] for expert, part in parts.items()}
            here = f"{path}.{name}"
            found.setdefault(path, {})[name] = _sum(here, tensors, weights, backbone, dtype)
    return found


def merged_biases(
    experts: Mapping[str, Adapter], shares: Shares, backbone: nn.Module | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Path of a module → its bias. Raises ValueError as `merged_modules`."""
    found = {}
    for path in _all(experts, lambda adapter: adapter.biases):
        tensors = {n: experts[n].biases[path] for n in sorted(experts) if path in experts[n].biases}
        found[path] = _sum(f"{path}.bias", tensors, shares(list(tensors), path), backbone, dtype)
    return found


def common_base_weights(experts: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Copies of the backbone's weights that came with experts. Raises ValueError if two came with unlike ones."""
    found: dict[str, tuple[str, Tensor]] = {}
    for name in sorted(experts):
        for path, weight in experts[name].base_weights.items():
            other, there = found.setdefault(path, (name, weight))
            if there.shape != weight.shape or not torch.equal(there.float(), weight.float()):
                raise ValueError(
                    f"{path}: the experts {other!r} and {name!r} came with unlike weights of the backbone: they were "
                    "trained on unlike ones"
                )
    return {path: weight for path, (_, weight) in found.items()}


def _all(experts: Mapping[str, Adapter], parts: Callable[[Adapter], Mapping[str, object]]) -> list[str]:
    return sorted({path for adapter in experts.values() for path in parts(adapter)})


def _sum(
    where: str,
    tensors: Mapping[str, Tensor],
    shares: Mapping[str, float],
    backbone: nn.Module | None,
    dtype: torch.dtype,
) -> Tensor:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{where}: the experts' shapes differ ({told}), as those of heads with other labels do: they "
            "cannot become one"
        )
    left = 1.0 - sum(shares.values())
    total = torch.stack([shares[name] * tensor.detach().double().cpu() for name, tensor in tensors.items()]).sum(0)
    if abs(left) > 1e-9:
        if backbone is None:
            raise ValueError(
                f"{where}: the weights of the experts that have it add up to {1 - left:.4g}, and the rest is the "
                "backbone's own: name the backbone (backbone=…)"
            )
        total = total + left * _own(where, backbone).detach().double().cpu()
    return total.to(dtype)


def _own(where: str, backbone: nn.Module) -> Tensor:
    path, _, name = where.rpartition(".")
    own = getattr(backbone.get_submodule(path), name, None)
    if not isinstance(own, Tensor):
        raise ValueError(f"{where}: the backbone has no such tensor")
    return own
