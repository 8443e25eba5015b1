"""The mixture at a module whose experts change how it is called: an attention with prefixes, a model with prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mole.backbones.sites import Site
from mole.mixtures.adapter_mixture import MixtureLayer
from mole.mixtures.banks import CallBank, OutputBank
from mole.mixtures.fitting import Fit
from mole.mixtures.output_mixture import OutputMixture, SplitMixture
from mole.routing import RoutingContext


class CallMixture(MixtureLayer):
    """A MixtureLayer whose bank is a CallBank. The routing is that of the hidden states, or of the whole example."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base module, with the experts at work."""
        base, bank, frame = self.base, self.bank, self.context.current
        if frame is None or not frame.experts_enabled:
            return base(*args, **kwargs)
        x = args[0] if args else kwargs.get("hidden_states")
        routing = self._routing(x, x, frame)  # type: ignore[arg-type]
        if routing is None:
            return base(*args, **kwargs)
        frame.see(self.fit.site, routing)
        if isinstance(x, Tensor) and x.is_floating_point():
            self._check(routing.weights.shape, x.shape)
        return bank.call(base, args, kwargs, routing)

    def _check(self, weights: Any, rows: Any) -> None:
        if weights[0] not in (1, rows[0]) or weights[1] not in (1, rows[1]):
            raise ValueError(f"the routing for {self.site} has shape {tuple(weights)}, and its input {tuple(rows)}")


def mixture_at(
    base: nn.Module, bank: nn.Module, fit: Fit, context: RoutingContext, split: Site | None = None
) -> MixtureLayer:
    """The mixture layer on `base` for that bank; `split` the site that `base` closes, if it is the norm of one."""
    if isinstance(bank, OutputBank) and split is not None:
        return SplitMixture(base, bank, fit, context, split)
    if isinstance(bank, OutputBank):
        return OutputMixture(base, bank, fit, context)
    return (CallMixture if isinstance(bank, CallBank) else MixtureLayer)(base, bank, fit, context)


def check_own_weight(config: Any, layers: Mapping[str, MixtureLayer]) -> None:
    """Raises ValueError if a multi-adapter's weights may leave another share for the backbone than they leave of 1."""
    calls = [site for site, layer in layers.items() if isinstance(layer, CallMixture)]
    if calls and hasattr(config, "has_flex") and config.normalise != "softmax":
        raise ValueError(
            f"{calls[0]}: router.normalise={config.normalise} gives the backbone a weight of its own, and prefixes and "
            "prompts leave it what their weights leave of 1: set router.normalise=softmax"
        )


def check_calls(name: str, router: Any, layers: Mapping[str, MixtureLayer]) -> None:
    """Raises ValueError if a router of the class `router` cannot route for prompts or prefixes among `layers`."""
    for site, layer in layers.items():
        if layer.fit.takes == "sequence" and (router.scope == "layer" or "hidden_states" in router.needs):
            raise ValueError(
                f"{site}: prompt experts act on whole sequences, and router={name} routes for tokens or single "
                "modules: use a router for the whole model that routes examples (task, single, uniform, predictor …), "
                "or prefix experts"
            )
        if isinstance(layer, CallMixture) and "outputs" in router.needs:
            raise ValueError(
                f"{site}: router={name} goes by what experts add to an output, and {layer.bank.kind} experts add "
                "nothing: use another router"
            )
