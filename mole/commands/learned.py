"""Whether training has changed what it should (an adapter, a router), and where a result goes that is not sound."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mole.adapters import Adapter, LoraWeights
from mole.mixtures import MultiExpertModel

WAY_ON = "raise training.learning_rate, or train for more steps"


def check_adapter(start: Adapter, end: Adapter) -> None:
    """Raises ValueError if no weight of the adapter differs from its start, or if a low-rank B is still zero.

    A module whose A was zero too gets no gradient at all, and is left out.
    """
    before, after = start.tensors(), end.tensors()
    if before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after):
        raise ValueError(f"the adapter has learned nothing, all its weights are as they were at the start: {WAY_ON}")
    low_rank = {path: part for path, part in end.modules.items() if isinstance(part, LoraWeights)}
    idle = [path for path, part in low_rank.items() if not part.B.any() and part.A.any()]
    if idle:
        raise ValueError(
            f"{len(idle)} of {len(end.modules)} modules have learned nothing, their B is zero ({', '.join(idle[:4])}"
            f"{' …' if len(idle) > 4 else ''}): {WAY_ON}, or leave them out of adapter.targets"
        )


def weights_of_routers(model: MultiExpertModel) -> dict[str, Tensor]:
    """Copies of what is trained of the routers, by name; none if they are not trained."""
    return {
        f"{place}.{name}": parameter.detach().cpu().clone()
        for place, router in model.routers().items()
        for name, parameter in router.named_parameters()
        if parameter.requires_grad
    }


def check_routers(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    """Raises ValueError if routers were trained and all that they have is as it was at the start."""
    if start and all(name in end and torch.equal(weights, end[name]) for name, weights in start.items()):
        raise ValueError(f"the router has learned nothing, all its weights are as they were at the start: {WAY_ON}")


def reject(folder: Path) -> None:
    """Renames a result to `<name>.rejected`, in the place of an earlier one."""
    rejected = folder.with_name(f"{folder.name}.rejected")
    shutil.rmtree(rejected, ignore_errors=True)
    folder.rename(rejected)
