"""What a mixture tells of its routings: to its listeners and observers, and its routers of themselves."""

from __future__ import annotations

from typing import Any

from mole.routing import Frame
from mole.routing.listening import Listener, Observer, tell

__all__ = ["Listener", "Observer", "own_statistics", "report"]


def report(model: Any, frame: Frame, phase: str) -> None:
    """Tells those who listen to `model` of a forward."""
    tell(frame, phase, model.sites, model.shape.num_experts, model.listeners, model.observers)


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
