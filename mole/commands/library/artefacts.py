"""`mole library artefacts`: what was computed from experts and is kept beside them."""

from mole.commands.library.done import Format
from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json, print_table, size_text
from mole.registry import config_dataclass


@config_dataclass
class LibraryArtefacts:
    """Of which library or expert, of which kind, and whether they are listed or removed."""

    library: str
    name: str | None = None
    kind: str | None = None
    remove: bool = False
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryArtefacts) -> None:
    """Prints the artefacts, or what was removed."""
    library = open_library(config.library)
    rows = library.artefacts(config.name, config.kind)
    if config.remove and not config.dry_run:
        library.remove_artefacts(rows)
    if config.format == "json":
        print_json([{"name": row.name, "experts": row.experts, **_facts(row.card)} for row in rows])
    elif config.format == "names":
        print("".join(f"{row.name}\n" for row in rows), end="")
    else:
        columns = ("kind", "experts", "key", "size", "file")
        cells = [
            (r.card.kind, ", ".join(r.experts) or "gone", r.card.key[:16], size_text(r.card.size), *r.card.files)
            for r in rows
        ]
        if rows:
            print_table(columns, cells)
        what = "in" if not config.remove else "would be removed from" if config.dry_run else "removed from"
        print(f"{len(rows)} artefacts {what} {library.url}")


def _facts(card) -> dict:
    """The card without what its name or its digests say."""
    return {key: value for key, value in card.to_dict().items() if key not in ("experts", "format")}
