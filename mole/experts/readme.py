"""The README beside an expert: for people; it is generated from the card and never read back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mole.experts.card import Card


def escaped(text: object) -> str:
    """Text of a card for Markdown: nothing in it can become a link, a table cell, HTML or code."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(str(text).split()))


def readme(card: Card) -> str:
    """A page about one expert: what it is, for which backbone, how good, how to load it."""
    rows = [("kind", card.kind), ("backbone", card.backbone.name), ("tasks", ", ".join(card.tasks) or "none given")]
    if card.adapter:
        rank = f", rank {card.adapter['rank']}" if card.adapter["rank"] is not None else ""
        rows.append(("adapter", f"{card.adapter['method']}{rank}"))
        rows.append(("parameters", f"{card.adapter['parameters']:,}"))
    rows += [("license", card.license or "none given"), ("created", card.created), ("revision", card.revision)]
    rows += [(score["metric"], f"{score['value']:.6g} on {score['task'] or 'all'}") for score in card.scores]
    table = "\n".join(f"| {escaped(name)} | {escaped(value)} |" for name, value in rows)
    title = escaped(card.tasks[0] if card.tasks else card.kind)
    how = "Load it with `mole evaluate` or `mole generate`.\n"
    if card.kind == "adapter":
        how = 'Load it with `mole.experts.load_expert("<this folder>")`.\n'
    if card.kind == "adapter" and "adapter_config.json" in card.files:
        how = (
            'Load it with `mole.experts.load_expert("<this folder>")`, or, as it is a plain PEFT folder, with\n'
            '`peft.PeftModel.from_pretrained(backbone, "<this folder>")`.\n'
        )
    text = f"{escaped(card.description)}\n\n" if card.description else ""
    return f"# {title}\n\n{text}| | |\n| --- | --- |\n{table}\n\n{how}"
