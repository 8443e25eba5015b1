"""`start_from` of build-moe: the mixture of another run goes on, with its experts and what its router has learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mole import mixtures
from mole.backbones import Backbone
from mole.commands.library.opening import library_of
from mole.experts.folder import read_card
from mole.mixtures import MultiExpertModel, Origin
from mole.mixtures.exploding import parent_of
from mole.mixtures.growing import Parts, carry, check_router, take_apart
from mole.registry import LIBRARIES


def origins_of(config: Any) -> dict[str, Origin]:
    """The experts of the mixture that `config.start_from` names, those of `config.experts` in its order if it lists
    some, and where they came from.

    Raises ValueError for experts that it does not have: those listed, and those of a library that was given.
    """
    known = {parent_of(n): o for n, o in mixtures.origins_of(mixtures.mixture_folder(config.start_from)).items()}
    wanted = config.experts
    if wanted is None and not _is_default(config.library):
        cards = library_of(config.library).cards()
        wanted = [name for name, card in cards.items() if card.kind == "adapter" and not card.is_merged]
    strangers = [name for name in wanted or () if name not in known]
    if strangers:
        named = ",".join(strangers)
        raise ValueError(
            f"start_from={config.start_from}: its mixture has no expert {', '.join(strangers)} (it has "
            f"{', '.join(known)}): mole edit-moe {config.start_from} library=… add=[{named}] adds them; without "
            "library= and experts= it goes on with its own"
        )
    return {name: known[name] for name in config.experts or known}


def _is_default(library: Any) -> bool:
    default: Any = LIBRARIES["local"].config()
    return library.name == default.name and Path(library.url).absolute() == Path(default.url).absolute()


def parts_of(config: Any, backbone: Backbone) -> Parts:
    """That mixture taken apart, with the experts that are wanted. Raises ValueError if `config.router` does not fit."""
    folder = mixtures.mixture_folder(config.start_from)
    other = config.allow_other_backbone
    parts = take_apart(mixtures.load_mixture(folder, backbone, allow_other_backbone=other))
    try:
        check_router(parts.router_config, config.router)
    except ValueError as error:
        raise ValueError(f"start_from={config.start_from}: {error}") from None
    order = list(origins_of(config))
    kept = sorted((n for n in parts.experts if parent_of(n) in order), key=lambda n: order.index(parent_of(n)))
    return replace(parts, experts={name: parts.experts[name] for name in kept})


def mixture_of_parts(config: Any, parts: Parts, mixing: dict[str, Any]) -> MultiExpertModel:
    """The mixture of these parts under `config.router`, which takes over what theirs knew; see mixture_of."""
    experts, explode = parts.experts, mixing.pop("explode", None)
    if explode is not None and all(parent_of(name) == name for name in experts):
        raise ValueError(f"mixing.explode: the mixture of {config.start_from} was built without: set it to null")
    tasks = {name: parts.tasks[name] for name in experts}
    model = MultiExpertModel(parts.backbone, experts, config.router, tasks=tasks, **mixing)
    carry(model, parts)
    return model


def licences_of(config: Any) -> dict[str, str | None]:
    """The licence of that mixture, as parts of a new work are named."""
    return {"the mixture": read_card(mixtures.mixture_folder(config.start_from)).license}
