"""What the modules that routers read are given, for samples of data: means of it, and what routers make of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from mole.data import Sample


@torch.no_grad()
def module_inputs(model: Any, samples: Iterable[Sample], *, expert: str | None = None) -> Iterator[dict[str, Tensor]]:
    """For each sample, path of a routed module → its input [T, d] at every token, in float32.

    One sample at a time: no padding, whatever the modules do with their rows. The backbone is in eval mode and alone,
    or has `expert` at work. Of modules that share a router, the one that comes first.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(model.experts_off() if expert is None else model.fixed_routing({expert: 1.0}))
            seen = stack.enter_context(_watched(model))
            for sample in samples:
                seen.clear()
                ids = torch.tensor([sample.input_ids], device=model.device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                yield {site: x.reshape(-1, x.shape[-1]) for site, x in seen.items()}
    finally:
        for module in training:
            module.training = True


@contextmanager
def _watched(model: Any) -> Iterator[dict[str, Tensor]]:
    """Path of a module with a router → its input in the latest forward."""
    seen: dict[str, Tensor] = {}

    def note(site: str) -> Any:
        def hook(module: Any, given: tuple, named: dict[str, Any]) -> None:
            seen.setdefault(site, module.read(given, named).detach().float())

        return hook

    hooks = [model.layers[site].register_forward_pre_hook(note(site), with_kwargs=True) for site in model.routers()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mean_inputs(
    model: Any, samples: Sequence[Sample], *, pool: str = "mean", expert: str | None = None
) -> dict[str, Tensor]:
    """Path of a routed module → the mean over samples of its input's mean over tokens (or the last), of length 1: [d].

    Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples to average the activations of")
    sums: dict[str, Tensor] = {}
    for inputs in module_inputs(model, samples, expert=expert):
        for site, x in inputs.items():
            one = x[-1] if pool == "last" else x.mean(0)
            sums[site] = sums[site] + one.double() if site in sums else one.double()
    return {site: torch.nn.functional.normalize(total, dim=0) for site, total in sums.items()}


def norm_statistics(model: Any, samples: Sequence[Sample]) -> dict[str, dict[int, tuple[float, float]]]:
    """Path of a routed module → mixture index → mean and standard deviation of ‖ΔW_e x‖ over all tokens of the samples.

    For routers that have `norms`. Raises ValueError if there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples to calibrate norms on")
    routers: Mapping[str, Any] = model.routers()
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for inputs in module_inputs(model, samples):
        for site, x in inputs.items():
            norms = routers[site].norms(x).double().cpu()
            first, second, count = sums.get(site, (torch.zeros(()), torch.zeros(()), 0))
            sums[site] = (first + norms.sum(0), second + norms.square().sum(0), count + len(norms))
    found = {}
    for site, (first, second, count) in sums.items():
        mean = first / count
        deviation = (second / count - mean.square()).clamp_min(0).sqrt()
        found[site] = dict(enumerate(zip(mean.tolist(), deviation.tolist(), strict=True)))
    return found
