"""One expert alone under trainable gates: what PHATGOOSE trains, in the mixture that the gates are for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mole.routers import GateConfig, GateRouter, Router
from mole.routing import Frame


@contextmanager
def gated(model: Any, expert: str) -> Iterator[dict[str, GateRouter]]:
    """Inside the body the model is y = f(x) + σ(v · x) δ(x) with that expert alone, and v, from 0, is all that trains.

    Gives path of a routed module → its gate; modules that share a router share a gate. Modules that the expert does
    not adapt have a gate without effect. Afterwards every router is back and trains as it did.
    """
    routers: dict[str, Router] = model.routers()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gates = {}
    for site, router in routers.items():
        gate = GateRouter(GateConfig(only=(expert,)), model.shape, input_dim=router.input_dim, sites=router.sites)
        gates[site] = gate.to(model.device).train(model.training)
    model.requires_grad_(False)
    try:
        for site, gate in gates.items():
            model.layers[site].router = gate
            gate.requires_grad_(_adapts(model, site, gate, expert))
        yield gates
    finally:
        for site, router in routers.items():
            model.layers[site].router = router
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _adapts(model: Any, site: str, gate: GateRouter, expert: str) -> bool:
    """Whether the expert has something at one of the gate's modules."""
    index = model.expert_names.index(expert)
    return any(index in model.layers[other].bank.present for other in gate.sites)


class MeanGate:
    """Observes a mixture and takes the mean weight of the only expert that works, over valid tokens and `sites`."""

    def __init__(self, sites: Iterable[str]):
        self.sites, self.total, self.count = tuple(sites), 0.0, 0

    def observe(self, frame: Frame, phase: str) -> None:
        """As `Observer.observe`."""
        mask = frame.inputs.attention_mask
        for site in self.sites:
            gates = frame.seen[site].weights[..., 0].float()
            valid = torch.ones_like(gates) if mask is None else mask.to(gates)
            self.total += float((gates * valid).sum())
            self.count += int(valid.sum())

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)
