"""`mole library convert`: what a trained mixture can be in a library, and which of it is exact."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mole import backbones, mixtures
from mole.commands import merge
from mole.commands.library import distilling
from mole.commands.library.done import Format, print_done
from mole.commands.library.opening import open_library
from mole.config.nodes import RunConfig, not_chosen
from mole.experts import Card, Expert, ExpertLibrary, LibraryError, UnknownExpert, check_name
from mole.experts.card import bytes_facts, digest_of, new_card
from mole.experts.expert import summary
from mole.experts.folder import read_card, verified_files
from mole.merging.products import check_rank
from mole.registry import BACKBONES, DATASETS, ROUTERS, config_dataclass
from mole.routers import Router

EXPLAINED = """What can be uploaded of a mixture; say which with as=…
  member     each expert that was trained inside it, under its own name; exact
  merged     one LoRA, where the routing does not depend on the input; exact (rank=<r> cuts it, and says what is lost)
  distilled  one LoRA by the mean routing over a dataset; not exact: needs approximate=true and dataset=…
  mixture    the whole: its router, and its experts by reference (embed=true: themselves); exact"""

UNTRAINED = "its experts are as they came from the library"
UNPINNED = "embed=true, as it does not say where its experts lie"


@config_dataclass
class LibraryConvert:
    """Which mixture becomes what, where, and under which name."""

    backbone: BACKBONES.union() | None = None  # type: ignore[valid-type]
    dataset: DATASETS.union() | None = None  # type: ignore[valid-type]
    datasets: dict[str, DATASETS.union()] = Field(default_factory=dict)  # type: ignore[valid-type]
    mixture: str
    library: str
    as_: Literal["member", "merged", "distilled", "mixture"] | None = Field(default=None, alias="as")
    name: str | None = None
    rank: int | str = "exact"
    approximate: bool = False
    embed: bool = False
    examples: Annotated[int, Field(ge=1)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 8
    tags: tuple[str, ...] = ()
    license: str | None = None
    description: str = ""
    allow_other_backbone: bool = False
    seed: int = 0
    dry_run: bool = False
    format: Format = "table"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        problems = []
        if self.name is not None:
            check_name(self.name)
        if self.as_ in ("merged", "distilled", "mixture") and self.name is None:
            problems.append(f"as={self.as_} makes one entry: which name shall it have? name=…")
        if self.as_ == "member" and self.name is not None:
            problems.append("as=member keeps each expert's own name: leave out name")
        if self.as_ in ("merged", "distilled") and self.backbone is None:
            problems.append(not_chosen("backbone", BACKBONES.names()))
        if self.as_ == "distilled" and self.dataset is None and not self.datasets:
            problems.append(not_chosen("dataset", DATASETS.names()))
        if self.as_ == "distilled" and not self.approximate:
            problems.append("as=distilled is not exact: the mean routing stands for all; say approximate=true")
        if problems:
            raise ValueError("; ".join(problems))


def run(config: LibraryConvert) -> None:
    """Publishes what the mixture becomes, checked against it where that is exact; prints one line for each entry."""
    folder = mixtures.mixture_folder(config.mixture)
    if config.as_ is None:
        ways = _fitting(folder)
        lines = [EXPLAINED, *(f"  here: {line}" for _, _, line in ways)]
        rows = [{"name": name, "applies": applies, "why": line} for name, applies, line in ways]
        return print_done(rows, lines, config.format)
    library = open_library(config.library)
    if config.as_ == "member":
        made, parents = _members(folder, library)
    else:
        assert config.name is not None
        library.check_free(config.name)
        parents: dict[str, Card] = {}
        build = {"merged": _merged, "distilled": _distilled, "mixture": _whole}[config.as_]
        made = {config.name: build(config, folder, library)}
    rows, lines = [], []
    with library.batch(f"Convert a mixture to {', '.join(made)}") as batch:
        for name, expert in made.items():
            before = parents.get(name)
            what = f"{name} as {config.as_}" if before is None else f"{name}, the revision after {before.revision[:8]}"
            if config.dry_run:
                lines.append(f"would publish {what} in {library.url}")
                rows.append({"name": name, "as": config.as_, "revision": expert.revision})
            elif before is None:
                batch.add_expert(expert, name)
            else:
                batch.update_expert(name, expert, expect=before.revision, message="trained in a mixture")
    for name in () if config.dry_run else made:
        revision = library.card(name).revision
        lines.append(f"published {name} in {library.url}, revision {revision[:8]}")
        rows.append({"name": name, "as": config.as_, "revision": revision})
    facts = {"action": "convert", "library": library.url, "dry_run": config.dry_run}
    return print_done([{**row, **facts} for row in rows], lines, config.format)


def _fitting(folder: Path) -> list[tuple[str, bool, str]]:
    """Each of the four ways, whether it applies to this mixture, and why, or how."""
    found = mixtures.experts_in(folder)
    trained = [name for name, (origin, files) in found.items() if files and _content(files) != origin.content]
    pinned = all(origin.content for origin, _ in found.values())
    router = mixtures.router_name(folder)
    own = getattr(ROUTERS[router].implementation, "mergeable", Router.mergeable)
    fixed = own is not Router.mergeable and router != "multi_adapter"  # which has branches, and no factors to add up
    why = "weighs all inputs alike" if fixed else "weighs each input anew"
    return [
        ("member", bool(trained), f"member: {', '.join(trained)}" if trained else f"no member: {UNTRAINED}"),
        ("merged", fixed, f"{'merged' if fixed else 'no merged'}: router={router} {why}"),
        ("distilled", True, f"distilled: approximate=true and dataset=…{'; merged is exact' if fixed else ''}"),
        ("mixture", True, f"mixture: {'by reference or embedded' if pinned else UNPINNED}"),
    ]


def _content(files: dict[str, bytes]) -> str:
    """The content that a card of these files has."""
    return digest_of({name: bytes_facts(data) for name, data in files.items()})


def _members(folder: Path, library: ExpertLibrary) -> tuple[dict[str, Expert], dict[str, Card]]:
    """The experts that were trained inside the mixture, and the cards of those that they follow in the library."""
    from mole.adapters import files as adapter_files

    card = read_card(folder)
    made: dict[str, Expert] = {}
    parents: dict[str, Card] = {}
    for name, (origin, files) in mixtures.experts_in(folder).items():
        if not files or _content(files) == origin.content:
            continue
        adapter = adapter_files.parse(files, f"{folder}/{name}").adapter
        row = {"relation": "converted", "source": origin.library, "name": name, "revision": origin.revision}
        facts: dict[str, Any] = {
            "tasks": list(origin.tasks),
            "license": card.license,
            "training": card.training,
            "derived_from": [{**row, "content": origin.content}],
        }
        rows = {file: bytes_facts(data) for file, data in files.items()}
        own = new_card(rows, card.backbone, adapter=summary(adapter), **facts)
        made[name] = Expert(own, fetch=lambda place, files=files: _write(files, place))
        try:
            there = library.card(name) if library.exists() else None
        except UnknownExpert:
            there = None
        if there is not None and there.content == origin.content:
            parents[name] = there
    if not made:
        raise LibraryError(f"no expert was trained inside {folder}: its experts are as they came from their library")
    return made, parents


def _write(files: dict[str, bytes], place: Path) -> None:
    for name, data in files.items():
        (place / name).write_bytes(data)


def _merged(config: LibraryConvert, folder: Path, library: ExpertLibrary) -> Expert:
    settings = merge.Merge(
        backbone=config.backbone,
        mixture=str(folder),
        name=config.name or "merged",
        rank=config.rank,
        publish=False,
        tags=config.tags,
        license=config.license,
        description=config.description,
        allow_other_backbone=config.allow_other_backbone,
        seed=config.seed,
        run=RunConfig(folder=str(folder)),
    )
    merged, expert = merge.from_mixture(settings, str(folder))
    _tell_loss(merged)
    return _converted(expert, folder)


def _distilled(config: LibraryConvert, folder: Path, library: ExpertLibrary) -> Expert:
    backbone = backbones.load(config.backbone)
    merged, facts = distilling.distilled(config, folder, backbone)
    _tell_loss(merged)
    expert = distilling.described(merged, backbone, facts)
    return _converted(expert, folder)


def _tell_loss(merged: Any) -> None:
    lossy = sorted((layer for layer in merged.layers if layer.error > 0), key=lambda layer: -layer.error)
    for layer in lossy[: merge.SHOWN]:
        print(f"lost {layer.error:.2%} of {layer.path} at rank {layer.rank}")
    print(f"lost in all: {merged.error:.2%}" if lossy else "nothing was lost")


def _converted(expert: Expert, folder: Path) -> Expert:
    rows = [{**row, "relation": "converted"} for row in read_card(folder).derived_from]
    return expert.with_card(expert.card.edited(derived_from=rows))


def _whole(config: LibraryConvert, folder: Path, library: ExpertLibrary) -> Expert:
    """The mixture itself; without `embed` its experts are named by content, and have to be where they are named."""
    card = read_card(folder)
    files = verified_files(folder, card)
    if not config.embed:
        for origin, own in mixtures.experts_in(folder).values():
            if own and _content(own) != origin.content:
                raise LibraryError(
                    f"expert {origin.name!r} is not what it was in its library (trained along, or kept in another "
                    "dtype): embed=true keeps it with the mixture"
                )
            mixtures.referred(library, origin)
        files = {name: data for name, data in files.items() if not name.startswith("expert-")}
    changes: dict[str, Any] = {"tags": list(config.tags) or list(card.tags)}
    changes |= {"license": config.license} if config.license else {}
    changes |= {"description": config.description} if config.description else {}
    own_card = card.edited(files={name: bytes_facts(data) for name, data in files.items()}, **changes)
    return Expert(own_card, fetch=lambda place: _write(files, place))
