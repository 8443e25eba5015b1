"""Those who are told of routings: the log is a listener, the statistics observe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mole.routing.context import Frame


class Listener(Protocol):
    """Told of the routing of every forward, once; the routing log is one."""

    def record(
        self,
        scalings: Tensor,
        *,
        token_ids: Tensor | None,
        mask: Tensor | None,
        task_names: list[str] | None,
        phase: str,
    ) -> None:
        """`scalings` [B, T, L, E], or [B, T, 1, E] where all layers share them."""
        ...


class Observer(Protocol):
    """Told of every forward whose routing is recorded, with its frame; the statistics are one."""

    def observe(self, frame: Frame, phase: str) -> None:
        """`frame.seen` has the routings as spent, site → routing."""
        ...


def tell(
    frame: Frame,
    phase: str,
    sites: Sequence[str],
    num_experts: int,
    listeners: Sequence[Listener],
    observers: Sequence[Observer] = (),
) -> None:
    """Tells `observers` of the frame, and `listeners` of the routing of every site, [B, T, L, E].

    L is 1 if all sites share one routing.
    """
    for observer in observers:
        observer.observe(frame, phase)
    if not listeners:
        return
    seen = [frame.seen[site] for site in sites if site in frame.seen]
    distinct = seen[:1] if all(routing is seen[0] for routing in seen) else seen
    names, ids, mask = frame.inputs.task_names, frame.inputs.input_ids, frame.inputs.attention_mask
    shape = [routing.weights.shape for routing in distinct]
    rows = ids.shape[0] if ids is not None else max(s[0] for s in shape)
    length = ids.shape[1] if ids is not None else max(s[1] for s in shape)
    dense = [routing.detach().logged(num_experts).expand(rows, length, -1) for routing in distinct]
    for listener in listeners:
        listener.record(
            torch.stack(dense, dim=2),
            token_ids=ids,
            mask=mask[:, -length:] if mask is not None and mask.dim() == 2 else None,
            task_names=None if names is None else [names[row * len(names) // rows] for row in range(rows)],
            phase=phase,
        )
