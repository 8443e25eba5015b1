"""Build the router of a mixture: one for the model, or one in the first layer of every group of layers."""

from __future__ import annotations

from typing import Any

from mole.backbones.modules import device_of, in_out_features, reads_left_to_right
from mole.backbones.sites import is_norm
from mole.mixtures.banks import OutputBank
from mole.mixtures.call_mixture import CallMixture, check_calls, check_own_weight
from mole.mixtures.flex import Flex
from mole.mixtures.fusion_start import start_from_fusion
from mole.mixtures.groups import groups_of
from mole.mixtures.output_mixture import OutputMixture
from mole.mixtures.subtraction import subtract
from mole.mixtures.two_pass.encoder_decoder import is_one
from mole.registry import ROUTERS
from mole.routers import Router


def build_router(model: Any) -> None:
    """Gives the model or its layers the routers of `model.router_config`, and tells the banks how to spend.

    Raises ValueError for what the router and the mixture cannot do together.
    """
    config = model.router_config
    build: Any = ROUTERS[config.name].implementation
    check_calls(config.name, build, model.layers)
    check_own_weight(config, model.layers)
    if build.scope == "model":
        model.router = build(config, model.shape).to(model.device)
    else:
        model.groups = groups_of(model.sites, config)
        for group, sites in model.groups.items():
            _build_for_layers(model, build, group, sites)
    subtract(model)
    combine, missing = getattr(config, "combine", "outputs"), getattr(config, "missing", "drop")
    for site, layer in model.layers.items():
        try:
            layer.bank.spend(combine=combine, missing=missing)
        except ValueError as error:
            raise ValueError(f"{site}: {error}") from error
    if getattr(config, "has_flex", False):
        add_flex(model)
    if getattr(config, "from_folder", None) is not None:
        start_from_fusion(model)
    for router in model.routers().values():
        if "experts" in router.needs:
            router.take_experts([_weights_at(model, site) for site in router.sites])


def add_flex(model: Any) -> None:
    """A flex adapter after the mix at every sub-layer. Raises ValueError for mixtures at other modules."""
    config = model.router_config
    for site, layer in model.layers.items():
        if isinstance(layer, OutputMixture):
            norm = layer.norm if config.flex_norm else None
        elif is_norm(layer.base):
            continue
        elif layer.fit.takes == "features" and not isinstance(layer, CallMixture):
            norm = None
        else:
            raise ValueError(f"router.mode=flex: {site} gives no hidden states: use router.mode=base")
        device = device_of(layer.base)
        layer.flex = Flex(_widths(layer)[1], config.flex_size, norm).to(device)


def _build_for_layers(model: Any, build: Any, group: str, sites: tuple[str, ...]) -> None:
    """One router for the modules of a group, in the first of them; the others spend its routing."""
    for site in sites:
        if model.layers[site].fit.takes != "features":
            raise ValueError(
                f"router={model.router_config.name} goes by the input of each module, and that of {site} "
                "(embedding, convolution or whole module) cannot be read: use a router for the whole model"
            )
        bank = model.layers[site].bank
        if "outputs" in build.needs and isinstance(bank, OutputBank) and bank.has_norms:
            raise ValueError(
                f"router={model.router_config.name} mixes before the norm that closes {site}, and experts trained "
                "norms of their own there: use router=adapter_fusion router.norms=base, which leaves them out"
            )
    owner = model.layers[sites[0]]
    width, made = _widths(owner)
    place: dict[str, Any] = {"input_dim": width, "sites": sites}
    if "outputs" in build.needs:
        place["output_dim"] = made
    owner.router = router = build(model.router_config, model.shape, **place).to(model.device)
    _check_reading(model, router)
    for site in sites if router.num_splits > 1 else ():
        if any(size % router.num_splits for size in _widths(model.layers[site])):
            raise ValueError(
                f"router.num_splits={router.num_splits} cuts the inputs and outputs of each module in as many equal "
                f"blocks, and those of {site} are {_widths(model.layers[site])}: choose a divisor of both"
            )
    for site in sites if len(sites) > 1 else ():
        model.layers[site].group = group


def _check_reading(model: Any, router: Router) -> None:
    """Raises ValueError for a router that reads later tokens, or an encoder, where there must be none or is none."""
    name, kind = model.router_config.name, type(model.backbone).__name__
    if router.reads_ahead and reads_left_to_right(model.backbone):
        raise ValueError(
            f"router={name} would read later tokens, and the tokens of a {kind} see earlier ones only: set router.pool "
            "to prompt or causal"
        )
    if "encoder_states" in router.needs and not is_one(model.backbone):
        raise ValueError(
            f"router={name} reads an encoder's output, and a {kind} has no encoder: set router.source=input"
        )


def _weights_at(model: Any, site: str) -> dict[int, Any]:
    """Mixture index → what the expert has at the module."""
    bank = model.layers[site].bank
    found = {index: bank.weights(index) for index in range(model.shape.num_experts)}
    return {index: weights for index, weights in found.items() if weights is not None}


def _widths(layer: Any) -> tuple[int, int]:
    """Features of the input and the output of the mixed module."""
    return layer.fit.widths or in_out_features(layer.base)
