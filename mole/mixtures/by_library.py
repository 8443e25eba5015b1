"""Mixtures of a library's experts in one call: a new one, or one that grows and keeps what its router has learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mole.backbones import Backbone
from mole.experts import ExpertLibrary, LibraryError, check_backbone
from mole.experts.damage import sound_cards
from mole.experts.filters import keep
from mole.mixtures.growing import put_together, take_apart
from mole.mixtures.model import MultiExpertModel
from mole.mixtures.opening import experts_of, library_at, mixture_of, open_model
from mole.registry import ROUTERS

Where = Mapping[str, Any] | None


def from_library(
    library: ExpertLibrary | str,
    backbone: Backbone,
    router: object = "uniform",
    *,
    names: Iterable[str] | None = None,
    where: Where = None,
    **options: Any,
) -> MultiExpertModel:
    """A mixture of a library's experts on `backbone`; the address of a mixture in a library opens it as it was saved.

    `library`: a library or its address. `router`: a registry name, or a router's config. `names` in that order, or
    `where` (see `ExpertLibrary.cards`); neither: all adapters. `options` are those of `MixtureOptions`, and `train` and
    `allow_other_backbone`. Raises LibraryError, ValueError.
    """
    if isinstance(library, str):
        found = library_at(library)
        if found is None:
            return open_model(library, backbone, **options)
        library = found
    if names is None and where is not None:
        names = _kept(library, where)
    config = ROUTERS[router].config() if isinstance(router, str) else router
    return mixture_of(experts_of(library, names), backbone, config, **options)


def add_experts_from_library(
    model: MultiExpertModel, library: ExpertLibrary | str, where: Where = None, *, backbone: Backbone | None = None
) -> MultiExpertModel:
    """The mixture with the experts that `where` keeps (None: all) behind its own, in eval mode; `model` is spent.

    Of its own experts the router keeps what it has learned. With `backbone` each card is checked against it. Raises
    LibraryError, before anything is changed, for a name that the mixture has already.
    """
    library = ExpertLibrary.open(library) if isinstance(library, str) else library
    new = experts_of(library, None if where is None else _kept(library, where))
    if taken := [name for name in new if name in model.expert_names]:
        raise LibraryError(f"{', '.join(taken)}: in the mixture already; say where={{'names': […]}} for the others")
    if backbone is not None:
        for expert in new.values():
            check_backbone(expert.card, backbone.name, backbone.shapes)
    adapters = {name: expert.adapter for name, expert in new.items()}
    parts = take_apart(model)
    tasks = {**parts.tasks, **{name: expert.card.tasks for name, expert in new.items()}}
    return put_together(parts, {**parts.experts, **adapters}, tasks)


def _kept(library: ExpertLibrary, where: Mapping[str, Any]) -> list[str]:
    """Names of the adapters that `where` keeps."""
    return [name for name, card in keep(sound_cards(library), where).items() if card.kind == "adapter"]
