"""Frozen experts' own tensors, kept where the model holds rounded ones: a saved copy has them, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mole.adapters import Adapter
from mole.xlora.places import ReadExpert


def kept(expert: ReadExpert, now: Adapter) -> ReadExpert:
    """The expert with its own tensors only where the model, which holds `now`, has others."""
    assert expert.adapter is not None
    mine, models = expert.adapter.tensors(), now.tensors()
    same = mine.keys() == models.keys() and all(
        tensor.dtype == models[name].dtype and torch.equal(tensor, models[name].to(tensor.device))
        for name, tensor in mine.items()
    )
    return replace(expert, adapter=None if same else expert.adapter)


def rounds(module: nn.Module, change: Callable[[Tensor], Tensor]) -> bool:
    """Whether `change`, which `nn.Module._apply` does to every tensor, gives parameters of `module` another dtype."""
    kinds = {(p.dtype, p.device) for p in module.parameters() if p.dtype.is_floating_point and p.device.type != "meta"}
    return any(change(torch.empty(1, dtype=dtype, device=device)).dtype != dtype for dtype, device in kinds)


def before_rounding(
    sources: Mapping[str, ReadExpert], adapters: Callable[[], Mapping[str, Adapter]]
) -> dict[str, ReadExpert]:
    """`sources` with the tensors that the model holds of frozen experts, on the CPU, before they are rounded."""
    if all(expert.adapter is not None or expert.changed for expert in sources.values()):
        return dict(sources)
    now, found = adapters(), {}
    for name, expert in sources.items():
        if expert.adapter is None and not expert.changed:
            # the copy has these in the place of the model's, which on the CPU they share their storage with
            memo = {id(tensor): tensor.detach().cpu() for tensor in now[name].tensors().values()}
            expert = replace(expert, adapter=copy.deepcopy(now[name], memo))
        found[name] = expert
    return found
