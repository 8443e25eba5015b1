"""Shapes and inputs that the tests of single routers share."""

import torch

from mole.routers import MixtureShape
from mole.routing import Frame, RoutingInputs

DIM = 6


def shape(num_experts=3, sites=("layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up"), tasks=None) -> MixtureShape:
    """Experts e0, e1, … of which each lists the task t0, t1, …"""
    names = tuple(f"e{i}" for i in range(num_experts))
    tasks = tuple((f"t{i}",) for i in range(num_experts)) if tasks is None else tasks
    return MixtureShape(names, tasks, sites=tuple(sites), hidden_size=DIM)


def named(names, sites=("layers.0.q",)) -> MixtureShape:
    """Experts of these names."""
    return MixtureShape(tuple(names), tuple((f"task-{n}",) for n in names), sites=tuple(sites), hidden_size=DIM)


def build(router, config, shape, seed=0, **place):
    """A layer router in eval mode, built under a seed."""
    torch.manual_seed(seed)
    return router(config, shape, **{"input_dim": DIM, "sites": shape.sites[:1], **place}).eval()


def inputs(*size, seed=3, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def frame(**given) -> Frame:
    """A frame with these inputs; `generating`, `goes_on`, `recording` and `kept` are the frame's own."""
    own = {name: given.pop(name) for name in ("generating", "goes_on", "recording", "kept") if name in given}
    return Frame(inputs=RoutingInputs(**given), **own)
