"""What may be wrong with experts, alone and beside each other, and what another program would make of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mole.adapters import Adapter, LoraWeights, peft_format
from mole.adapters.normalised import normalised
from mole.commands.library.opening import open_library
from mole.experts import Card, Expert, LibraryError, load_expert
from mole.experts.damage import sound_cards
from mole.experts.folder import has_card
from mole.experts.similarity import cosines, gram

ALIKE = 0.99  # cosine of two updates from which on they are the same expert twice
OUT_OF_LINE = 10.0  # times the median size of an update, or that part of it
SERVERS = ("vllm", "lorax", "llamacpp", "mistralrs")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `state` is ok, note (worth knowing) or wrong."""

    about: str
    state: str
    text: str


def examine_experts(places: Iterable[str], target: str | None = None) -> Iterator[Finding]:
    """Each expert by itself, for `target` (peft, or one of SERVERS), then all beside each other.

    `places` are experts' folders, runs, addresses, PEFT folders, and libraries, which stand for all that they have.
    """
    found = dict(pair for place in places for pair in _experts(place))
    loaded: dict[str, tuple[Card, Adapter]] = {}
    for name, expert in found.items():
        try:
            loaded[name] = expert.card, expert.adapter
        except (ValueError, OSError) as error:
            yield Finding(name, "wrong", str(error))
            continue
        problems = list(_alone(expert.adapter, target))
        yield from (Finding(name, "wrong", problem) for problem in problems)
        if not problems:
            yield Finding(name, "ok", _told(expert.card))
    if len(loaded) > 1:
        yield from _unlike(loaded)
        yield from _updates({name: adapter for name, (_, adapter) in loaded.items()})


def _experts(place: str) -> Iterator[tuple[str, Expert]]:
    """Name → expert: one, or all adapters of a library. Raises LibraryError where there is none."""
    folder = Path(place).expanduser()
    is_one = folder.is_dir() and (has_card(folder) or has_card(folder / "expert"))
    library = None if is_one else open_library(place)
    if library is None or not library.exists():
        yield place, load_expert(place)
        return
    names = [name for name, card in sound_cards(library).items() if card.kind == "adapter"]
    if not names:
        raise LibraryError(f"{place}: the library has no experts")
    yield from ((name, library.get_expert(name)) for name in names)


def _alone(adapter: Adapter, target: str | None) -> Iterator[str]:
    """What is wrong with one expert."""
    updates = [part.B for part in adapter.modules.values() if isinstance(part, LoraWeights) and part.magnitude is None]
    if updates and not any(bool(B.any()) for B in updates):
        yield "it has learned nothing: B is zero in every module"
    if target in SERVERS:
        yield from _for_servers(adapter, str(target))
    if target == "peft" and not peft_format.has_place_for(adapter.method):
        yield f"PEFT has no method like {adapter.method}: it runs in mole alone"


def _for_servers(adapter: Adapter, target: str) -> Iterator[str]:
    try:
        plain = normalised(adapter)
    except ValueError as error:
        yield f"{target} does not read it: {str(error).partition(': use format')[0].partition('; use format')[0]}"
        return
    parts = list(adapter.modules.values())
    settings = {(part.rank, float(part.alpha), part.rslora) for part in parts}
    if len(settings) > 1 or parts[0].rslora:
        (rank,) = {part.rank for part in plain.modules.values()}
        yield (
            f"{target} reads one rank and one alpha, and scales by alpha / rank: it would compute something else; "
            f"mole library export … format=normalised writes it at rank {rank} for all modules"
        )


def _told(card: Card) -> str:
    adapter = card.adapter or {}
    rank = "" if adapter.get("rank") is None else f", rank {adapter['rank']}"
    return f"{adapter.get('method')}{rank}, {adapter.get('parameters', 0):,} parameters in {adapter.get('dtype')}"


def _unlike(experts: Mapping[str, tuple[Card, Adapter]]) -> Iterator[Finding]:
    """In what their cards differ."""
    shapes = {name: card.backbone.shapes for name, (card, _) in experts.items() if card.backbone.shapes}
    facts = {
        "backbone shapes": shapes,
        "backbone": {name: card.backbone.name for name, (card, _) in experts.items()},
        **{
            key: {name: _text((card.adapter or {}).get(key)) for name, (card, _) in experts.items()}
            for key in ("method", "targets", "rank", "dtype")
        },
    }
    for about, values in facts.items():
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            groups.setdefault(value, []).append(name)
        if len(groups) > 1:
            text = "; ".join(f"{value[:60]}: {', '.join(names)}" for value, names in groups.items())
            yield Finding(about, "wrong" if about == "backbone shapes" else "note", f"not the same for all: {text}")


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _updates(adapters: dict[str, Adapter]) -> Iterator[Finding]:
    """Sizes of the updates and their cosines, of the experts that are low-rank factors."""
    low_rank = {n: a for n, a in adapters.items() if all(isinstance(p, LoraWeights) for p in a.modules.values())}
    try:
        G = gram(low_rank)
    except ValueError as error:
        yield Finding("updates", "note", f"not compared: {error}")
        return
    yield from _sizes(list(low_rank), G)
    likeness = cosines(G)
    names = list(low_rank)
    for one, other in torch.nonzero(torch.triu(likeness, diagonal=1) > ALIKE).tolist():
        text = f"cosine {likeness[one, other]:.4f} with {names[other]}: the same expert twice?"
        yield Finding(names[one], "note", text)


def _sizes(names: list[str], G: Tensor) -> Iterator[Finding]:
    sizes = G.diagonal().clamp_min(0).sqrt().tolist()
    middle = median(sizes) if sizes else 0.0
    for name, size in zip(names, sizes, strict=True):
        if middle and not middle / OUT_OF_LINE <= size <= middle * OUT_OF_LINE:
            yield Finding(name, "note", f"its update has size {size:.3g}, the median of all is {middle:.3g}")
