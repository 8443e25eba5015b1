"""Those who are told of a mixture's routings: the log is a listener, the statistics observe."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mole.routing import Frame


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


def report(model: Any, frame: Frame, phase: str) -> None:
    """Tells `model.observers` of the frame, and `model.listeners` of the routing of every site, [B, T, L, E].

    L is 1 if all sites share one routing.
    """
    for observer in model.observers:
        observer.observe(frame, phase)
    if not model.listeners:
        return
    seen = [frame.seen[site] for site in model.sites if site in frame.seen]
    distinct = seen[:1] if all(routing is seen[0] for routing in seen) else seen
    names, ids, mask = frame.inputs.task_names, frame.inputs.input_ids, frame.inputs.attention_mask
    shape = [routing.weights.shape for routing in distinct]
    rows = ids.shape[0] if ids is not None else max(s[0] for s in shape)
    length = ids.shape[1] if ids is not None else max(s[1] for s in shape)
    dense = [routing.detach().logged(model.shape.num_experts).expand(rows, length, -1) for routing in distinct]
    for listener in model.listeners:
        listener.record(
            torch.stack(dense, dim=2),
            token_ids=ids,
            mask=mask[:, -length:] if mask is not None and mask.dim() == 2 else None,
            task_names=None if names is None else [names[row * len(names) // rows] for row in range(rows)],
            phase=phase,
        )


def own_statistics(model: Any) -> dict[str, Any]:
    """What the routers say of themselves: `router/<name>`, of one router or the mean over those of the layers.

    Of each router of the layers as `router/<site>/<name>` too.
    """
    by_site = {site: said for site, router in model.routers().items() if (said := router.own_statistics())}
    if set(by_site) <= {""}:
        return {f"router/{name}": value for name, value in by_site.get("", {}).items()}
    found: dict[str, Any] = {}
    for name in next(iter(by_site.values())):
        values = [said[name] for said in by_site.values()]
        if isinstance(values[0], dict):
            mean: Any = {key: sum(value[key] for value in values) / len(values) for key in values[0]}
        else:
            mean = sum(values) / len(values)
        found[f"router/{name}"] = mean
    return found | {f"router/{site}/{name}": value for site, said in by_site.items() for name, value in said.items()}
