"""`mole library export`: an expert as a folder for other programs, or several as a map of pinned addresses."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mole.commands.library.done import print_done
from mole.commands.library.opening import open_library
from mole.experts import Card
from mole.experts.damage import sound_cards
from mole.experts.exporting import Form, export, export_map, files_of, left_out
from mole.experts.filters import keep
from mole.registry import config_dataclass


@config_dataclass
class LibraryExport:
    """Which expert (of format adapter-weights: which ones), in which form, and the place that is to hold it."""

    library: str
    name: str | tuple[str, ...]
    dest: str
    format: Literal["peft", "normalised", "adapterhub", "adapter-weights"] = "peft"
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    backbone: str | None = None
    card: bool = False
    model_type: str | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    num_layers: Annotated[int, Field(ge=1)] | None = None
    allow_partial: bool = False
    dry_run: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        problems = []
        many = self.format == "adapter-weights"
        if len(_names(self.name)) != 1 and not many:
            problems.append("name: several experts are exported as format=adapter-weights alone")
        if many and (self.revision or self.dtype or self.card):
            problems.append("format=adapter-weights writes addresses: revision, dtype and card are for folders")
        if self.backbone is not None and (many or self.card):
            problems.append(
                "backbone names it for other programs: leave it out with format=adapter-weights, and with card=true, "
                "since a card names no places of one machine"
            )
        for_hub = self.model_type or self.width or self.num_layers or self.allow_partial
        if for_hub and self.format != "adapterhub":
            problems.append("model_type, width, num_layers and allow_partial are for format=adapterhub")
        if problems:
            raise ValueError("; ".join(problems))


def run(config: LibraryExport) -> None:
    """Writes the folder or the file, whole or not at all; prints one line, or with `json` the same as JSON."""
    library = open_library(config.library)
    rows: dict[str, Card]
    dest = Path(config.dest).expanduser()
    if config.format == "adapter-weights":
        rows = keep(sound_cards(library), {"names": _names(config.name)})
        told = f"{len(rows)} addresses ({', '.join(rows)}) to {dest}"
        if not config.dry_run:
            export_map(config.library, rows, dest)
    else:
        assert isinstance(config.name, str)
        expert = library.get_expert(config.name, config.revision)
        rows = {config.name: expert.card}
        fields = ("format", "dtype", "card", "model_type", "width", "num_layers", "allow_partial")
        form = Form(**{field: getattr(config, field) for field in fields}, backbone=_whole(config.backbone))
        told = f"{config.name}, revision {expert.revision[:8]}, as {config.format} to {dest}"
        if config.allow_partial and (lost := left_out(expert, form)):
            told += f" without {', '.join(lost)}"
        if config.dry_run:
            told += f" ({', '.join(files_of(expert, config.name, form))})"
        else:
            export(expert, config.name, dest, form)
    facts = {"action": "export", "library": library.url, "dest": str(dest), "format": config.format}
    print_done(
        [{"name": n, **facts, "revision": card.revision, "dry_run": config.dry_run} for n, card in rows.items()],
        [f"{'would write' if config.dry_run else 'wrote'} {told}"],
        "json" if config.json else "table",
    )


def _whole(backbone: str | None) -> str | None:
    """A folder by its whole path, so that it is found from anywhere; else what was given."""
    folder = None if backbone is None else Path(backbone).expanduser()
    return str(folder.resolve()) if folder is not None and folder.is_dir() else backbone


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names as a list has them; an operand `[a,b]` is one word by the time that it comes here."""
    if isinstance(given, tuple):
        return given
    return tuple(name.strip() for name in given.removeprefix("[").removesuffix("]").split(",") if name.strip())
