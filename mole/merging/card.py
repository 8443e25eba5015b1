"""What the card of a merged expert says: its parents, the method with its settings, and the error of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole.experts import licences
from mole.experts.card import Card
from mole.merging.merge import Merged
from mole.registry import unknown

MOST_FACTS = 64  # of a card's `training`


def parents(cards: Mapping[str, Card], library: str | None) -> list[dict[str, Any]]:
    """One row of `derived_from` for each expert that was merged; `library` is its address, left out if it is a path."""
    source = library if library and "://" in library else None
    return [
        {"relation": "merged", "source": source, "name": name, "revision": card.revision, "content": card.content}
        for name, card in cards.items()
    ]


def common_facts(cards: Mapping[str, Card], library: str | None) -> dict[str, Any]:
    """What follows from the parents' cards: tasks of all, the licence, the head if they agree, where they come from.

    Raises ValueError for heads with other labels, whose outputs mean other things.
    """
    rows = list(cards.values())
    for name, card in cards.items():
        if card.head != rows[0].head:
            raise ValueError(
                f"the experts {next(iter(cards))!r} and {name!r} have heads with other labels; they cannot become one"
            )
    tasks = dict.fromkeys(task for card in rows for task in card.tasks)
    return {
        "tasks": list(tasks)[:64],
        **licences.facts({name: card.license for name, card in cards.items()}),
        "head": rows[0].head,
        "derived_from": parents(cards, library)[:256],
    }


def method_facts(merged: Merged, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `training` of the card: method and settings, the error in all, then layer by layer, the worst first.

    `settings` are plain; of what has no room in a card (64 facts) merge.json in the run's folder tells.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in value.items() if inner is not None}
        elif value is not None:
            found[name] = value
    if merged.layers:
        found["error"] = merged.error
        found["largest_rank"] = max(layer.rank for layer in merged.layers)
    if "factors" in str(settings.get("space", "")):
        found["note"] = "factors were merged apart: the result depends on how each expert's factors are rotated"
    room = max(0, MOST_FACTS - len(found))
    worst = sorted(merged.layers, key=lambda layer: (-layer.error, layer.path))
    found |= {f"error.{layer.path}"[:64]: layer.error for layer in worst[:room]}
    return dict(list(found.items())[:MOST_FACTS])


def check_same_backbone(cards: Mapping[str, Card]) -> None:
    """Raises ValueError unless all are for backbones of equal names, and of equal shapes where these are known."""
    first, *others = cards
    for other in others:
        one, two = cards[first].backbone, cards[other].backbone
        if one.name != two.name or (None not in (one.shapes, two.shapes) and one.shapes != two.shapes):
            raise ValueError(
                f"the expert {first!r} was made for the backbone {one.name!r}, {other!r} for {two.name!r}"
                + ("" if one.name != two.name else " with other shapes")
                + "; merge experts of one backbone, or say allow_other_backbone=true if these are the same"
            )


def chosen(cards: Mapping[str, Card], names: tuple[str, ...] | None) -> tuple[list[str], list[str]]:
    """The experts that are meant, and those left out: without names all adapters that are not merged themselves.

    Raises ValueError for an unknown name, one given twice, a mixture, and an empty choice.
    """
    if names is not None:
        for name in names:
            if name not in cards:
                raise ValueError(f"experts: {unknown('expert', name, cards)}")
            if cards[name].kind != "adapter":
                raise ValueError(f"experts: {name!r} is a {cards[name].kind}, which cannot be merged")
        if len(set(names)) < len(names):
            raise ValueError(f"experts: {', '.join(names)} names one twice")
    adapters = [name for name, card in cards.items() if card.kind == "adapter"]
    found = list(names) if names is not None else [name for name in adapters if not cards[name].is_merged]
    if not found:
        raise ValueError("there is no expert to merge: add some with mole train-expert, or name them in experts=[…]")
    return found, [name for name in adapters if name not in found] if names is None else []
