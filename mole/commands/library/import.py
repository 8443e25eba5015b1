"""`mole library import`: an adapter that others made, checked and rewritten, into a library."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mole.commands.library.done import Format, print_change, print_unchanged
from mole.commands.library.naming import own_name
from mole.commands.library.opening import open_library
from mole.experts.importing import Hints, import_expert
from mole.registry import config_dataclass


@config_dataclass
class LibraryImport:
    """What comes from where, what its files do not say, and what its card says beside."""

    source: str
    library: str
    name: str | None = None
    from_: Literal["auto", "peft", "loralib", "adapterhub", "nlpr"] = Field(default="auto", alias="from")
    backbone: str | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    blocks: tuple[bool, ...] | None = None
    transposed: bool = False
    heads: bool = False
    tasks: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str | None = None
    description: str = ""
    message: str = ""
    dry_run: bool = False
    format: Format = "table"


def run(config: LibraryImport) -> None:
    """Checks every byte that is taken, publishes the expert; prints one line."""
    hints = Hints(config.backbone, config.alpha, config.blocks, config.transposed, config.heads)
    facts = {key: getattr(config, key) for key in ("tasks", "tags", "license", "description", "message")}
    expert = import_expert(config.source, layout=config.from_, hints=hints, **facts)
    name = config.name or own_name(expert, expert.card.derived_from[0]["name"] or "")
    library = open_library(config.library)
    adapter = expert.card.adapter or {}
    what = f"{adapter['method']}, {adapter['parameters']:,} parameters, for {expert.card.backbone.name}"
    if library.exists() and name in library and library.card(name).content == expert.card.content:
        return print_unchanged(name, library.card(name), library.url, form=config.format, how="with these weights")
    library.check_free(name)
    if not config.dry_run:
        library.add_expert(expert, name)
    facts: dict[str, Any] = {"dry_run": config.dry_run, "form": config.format}
    return print_change("import", name, expert.card, library.url, what=f" ({what})", at="to", **facts)
