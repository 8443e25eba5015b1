"""`mole library show`: the card of one expert."""

from typing import Literal

from mole.commands.library.naming import name_and_revision
from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json, print_table, size_text
from mole.experts import Card
from mole.registry import config_dataclass


@config_dataclass
class LibraryShow:
    """Which expert, as `name` or `name@revision`, and how its card is shown."""

    library: str
    name: str
    revision: str | None = None
    format: Literal["table", "json", "names"] = "table"


def run(config: LibraryShow) -> None:
    """Prints the card: as a table, as it is (JSON), or the names of the files."""
    library = open_library(config.library)
    name, revision = name_and_revision(config.name, config.revision)
    card = library.card(name, revision)
    if config.format == "json":
        print_json(card.to_dict())
    elif config.format == "names":
        print("\n".join(card.files))
    else:
        kept = [] if revision else library.artefacts(name)
        rows = [(f"artefact {row.card.kind}", f"{row.card.key[:16]}, {size_text(row.card.size)}") for row in kept]
        print_table(("field", config.name), [*_rows(card), *rows])


def _rows(card: Card) -> list[tuple[str, str]]:
    rows = [("kind", card.kind), ("tasks", ", ".join(card.tasks) or "none given")]
    rows += [("description", card.description)] if card.description else []
    rows += [("backbone", card.backbone.name), ("backbone shapes", card.backbone.shapes or "unknown")]
    rows += [(f"adapter {key}", _text(value)) for key, value in (card.adapter or {}).items() if value not in (None, [])]
    rows += [(f"head, {card.head['type']}", ", ".join(card.head["labels"]) or "a number")] if card.head else []
    rows += [("tags", ", ".join(card.tags))] if card.tags else []
    rows += [("license", card.license or "none given")]
    rows += [("author", card.author)] if card.author else []
    rows += [
        (f"data {row['name']}", " ".join(_text(row[k]) for k in ("split", "examples") if row[k] is not None))
        for row in card.data
    ]
    rows += [(f"training {key}", _text(value)) for key, value in card.training.items()]
    rows += [(f"score {row['metric']}", _score(row)) for row in card.scores]
    rows += [(f"from {row['relation']}", _text(row["name"] or row["source"])) for row in card.derived_from]
    rows += [(f"extra {key}", _text(value)) for key, value in card.extra.items()]
    rows += [(f"file {name}", size_text(row["size"])) for name, row in card.files.items()]
    rows += [("created", card.created), ("message", card.message or "none")]
    rows += [("content", card.content), ("revision", card.revision)]
    rows += [(f"before {row['revision'][:8]}", f"{row['created']} {row['message']}".rstrip()) for row in card.history]
    return rows


def _score(row: dict) -> str:
    parts = [
        f"{row['value']:.6g}",
        *(f"{key} {row[key]}" for key in ("task", "dataset", "split", "examples") if row[key]),
    ]
    return ", ".join(parts)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if type(value) is int else f"{value:.6g}" if isinstance(value, float) else str(value)
