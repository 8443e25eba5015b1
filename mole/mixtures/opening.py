"""Open whatever a user calls a model: a run, a mixture, an expert, or a whole library; always as a mixture."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mole.adapters import Adapter
from mole.backbones import Backbone
from mole.experts import Card, Expert, ExpertLibrary, LibraryError, check_backbone, load_expert
from mole.experts.address import split_expert
from mole.experts.damage import sound_cards
from mole.experts.folder import has_card, read_card
from mole.mixtures.exploding import exploded, parent_of
from mole.mixtures.files import Origin, load_mixture
from mole.mixtures.model import MultiExpertModel
from mole.registry import unknown
from mole.routers import UniformConfig

logger = logging.getLogger(__name__)
BLOCKS = "moe.json"  # as mole.moe.save writes it


def open_model(place: str, backbone: Backbone, *, allow_other_backbone: bool = False) -> MultiExpertModel:
    """The model at `place` on `backbone`, in eval mode: a mixture as it was saved, an expert as a mixture of one.

    `place` is a run folder (with mixture/ or expert/), a mixture's or an expert's folder, a plain PEFT folder, or
    `<library>/<name>`; a library, by folder or address, gives the uniform mixture of all its experts. An expert brings
    its head along. Raises ValueError if there is nothing of these, or it was made for another backbone.
    """
    folder = Path(place).expanduser()
    if (mixture := _mixture_in(folder)) is not None:
        home = mixture.parent  # of a mixture that lies in a library, which has the experts that it refers to
        find = partial(referred, ExpertLibrary.open(str(home))) if (home / ".mole").is_dir() else None
        return load_mixture(mixture, backbone, allow_other_backbone=allow_other_backbone, find=find)
    if (library := library_at(place)) is not None:
        experts = experts_of(library, [name for name, card in sound_cards(library).items() if card.kind == "adapter"])
    else:
        expert = load_expert(place)
        if expert.card.kind == "mixture":
            return _from_library(expert, split_expert(place)[0], backbone, allow_other_backbone)
        experts = {expert.card.tasks[0] if expert.card.tasks else "expert": expert}
    policy = _policy(experts)
    return mixture_of(
        experts,
        backbone,
        UniformConfig(),
        train="none",
        allow_other_backbone=allow_other_backbone,
        modules_to_save=policy,
    ).eval()


def cards_at(place: str) -> dict[str, Card]:
    """The cards of what `open_model` opens at `place`: of the mixture, the expert, or each expert of the library."""
    folder = Path(place).expanduser()
    if (mixture := _mixture_in(folder)) is not None:
        return {folder.name: read_card(mixture)}
    if (library := library_at(place)) is not None:
        return {name: card for name, card in sound_cards(library).items() if card.kind == "adapter"}
    return {folder.name: load_expert(place).card}


def _policy(experts: dict[str, Expert]) -> str:
    """What becomes of heads that experts brought: that of the one expert; of several a mix, under which each by itself
    has its own.
    """
    if not any(expert.card.adapter and expert.card.adapter["full_modules"] for expert in experts.values()):
        return "error"
    return f"take:{next(iter(experts))}" if len(experts) == 1 else "mix"


def _from_library(expert: Expert, address: str, backbone: Backbone, allow_other_backbone: bool) -> MultiExpertModel:
    """The mixture that lies in the library at `address`; experts that it refers to are looked for there."""
    library = ExpertLibrary.open(address)
    with tempfile.TemporaryDirectory(prefix="mole-mixture-") as place:
        expert.write_into(Path(place))
        find = partial(referred, library)
        return load_mixture(place, backbone, allow_other_backbone=allow_other_backbone, find=find)


def referred(library: ExpertLibrary, origin: Origin) -> Adapter:
    """The expert that a mixture refers to: by its content, under whatever name it has now.

    Raises LibraryError, with both revisions, if it is there no more.
    """
    where = library if origin.library is None else ExpertLibrary.open(origin.library)
    name = parent_of(origin.name)
    cards = where.look()[0]
    same = [known for known in (name, *cards) if known in cards and cards[known].content == origin.content]
    if same:
        return where.get_expert(same[0]).adapter
    wanted = origin.revision[:8] if origin.revision else "unknown"
    try:
        old = where.get_expert(name, origin.revision)
    except LibraryError as error:
        now = f"is at revision {cards[name].revision[:8]} now" if name in cards else "is gone"
        raise LibraryError(
            f"the mixture was made with {name!r} of {where.url} at revision {wanted}, which {now}; publish "
            "mixtures with embed=true to keep their experts with them"
        ) from error
    if old.card.content != origin.content:
        raise LibraryError(f"{where.url}/{name}@{wanted} has other content than the mixture was made with")
    return old.adapter


def mixture_folder(place: str) -> Path:
    """The folder of the mixture at `place`, a run or that folder itself. Raises ValueError if there is none."""
    folder = Path(place).expanduser()
    if (found := _mixture_in(folder)) is None:
        if (blocks := blocks_in(place)) is not None:
            raise ValueError(
                f"{blocks} holds the blocks that mole moefy made of a backbone's own modules, which are no adapters "
                f"and no expert: mole evaluate and mole generate open them with model={place}, Python by mole.moe.load"
            )
        raise ValueError(f"no mixture in {place}: give the folder of a run that built one, or its mixture/")
    return found


def blocks_in(place: str) -> Path | None:
    """The folder with the blocks of a run of `mole moefy`, or that folder itself; None where there are none."""
    folder = Path(place).expanduser()
    return next((one for one in (folder / "mixture", folder) if (one / BLOCKS).is_file()), None)


def _mixture_in(folder: Path) -> Path | None:
    for candidate in (folder / "mixture", folder):
        if has_card(candidate) and read_card(candidate).kind == "mixture":
            return candidate
    return None


def experts_of(library: ExpertLibrary, names: Iterable[str] | None) -> dict[str, Expert]:
    """Name → expert, in the order given; if `names` is None all adapters of the library by name but for merged ones,
    whose parts are there already.

    Raises ValueError for an empty library, and for a name that it does not have.
    """
    if names is None:
        adapters = {name: card for name, card in sound_cards(library).items() if card.kind == "adapter"}
        wanted = [name for name, card in adapters.items() if not card.is_merged]
        if merged := [name for name, card in adapters.items() if card.is_merged]:
            logger.info("left out, as merged themselves: %s; experts=[…] takes them in", ", ".join(merged))
    else:
        wanted = list(names)
    if not wanted:
        raise ValueError(
            f"the library {library.url} has no experts: add some with mole train-expert library={library.url}"
        )
    return {name: library.get_expert(name) for name in wanted}


def mixture_of(
    experts: dict[str, Expert],
    backbone: Backbone,
    router_config: object,
    *,
    train: str = "router",
    allow_other_backbone: bool = False,
    explode: str | None = None,
    **options: Any,
) -> MultiExpertModel:
    """A new mixture of experts, each checked against the backbone; `options` are those of `MixtureOptions`.

    `explode` rank_one makes every part of rank one of an expert an expert, see exploding.py. Raises ValueError, naming
    the expert.
    """
    if explode not in (None, "rank_one"):
        raise ValueError(unknown("explode", explode, ["rank_one"]))
    for name, expert in experts.items():
        try:
            check_backbone(expert.card, backbone.name, backbone.shapes, allow_other_backbone=allow_other_backbone)
        except ValueError as error:
            raise ValueError(f"expert {name!r}: {error}") from error
    adapters = {name: expert.adapter for name, expert in experts.items()}
    if explode is not None:
        adapters = exploded(adapters)
    return MultiExpertModel(
        backbone.model,
        adapters,
        router_config,
        tasks={name: experts[name if name in experts else parent_of(name)].card.tasks for name in adapters},
        train=train,
        **options,
    )


def pinned(experts: dict[str, Expert], library: str | None) -> dict[str, Origin]:
    """Where the experts of a mixture come from; `library` is its address as given, left out if it is a path."""
    source = library if library and "://" in library else None
    return {
        name: Origin(
            name=name,
            tasks=expert.card.tasks,
            library=source,
            revision=expert.revision,
            content=expert.card.content,
        )
        for name, expert in experts.items()
    }


def library_at(place: str) -> ExpertLibrary | None:
    """The library at an address; None where there is none, or an expert. Raises Unreachable."""
    if "://" in place:
        try:
            library = ExpertLibrary.open(place)
        except LibraryError:  # of an expert in it, which is no library's address
            return None
        return library if library.exists() else None
    folder = Path(place).expanduser()
    if not folder.is_dir() or has_card(folder) or (folder / "adapter_config.json").is_file():
        return None
    is_one = not has_card(folder / "expert") and any(has_card(entry) for entry in folder.iterdir() if entry.is_dir())
    return ExpertLibrary.open(place) if is_one else None
