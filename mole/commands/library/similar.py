"""`mole library similar`: which experts of a library are alike, from their factors alone; no backbone, no data."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mole.adapters import Adapter
from mole.commands.library.output import print_json, print_table
from mole.experts import ExpertLibrary
from mole.experts.clustering import MOST, mbc, random_clusters
from mole.experts.damage import sound_cards
from mole.experts.retrieval import nearest
from mole.experts.similarity import cosines, gram, interference, parameter_embedding, svd_embedding
from mole.registry import config_dataclass, unknown


@config_dataclass
class LibrarySimilar:
    """Which experts are compared, by what, and what is told of them."""

    library: str
    experts: tuple[str, ...] | None = None
    show: Literal["cosines", "nearest", "clusters", "interference"] = "cosines"
    to: str | None = None
    k: Annotated[int, Field(ge=1)] = 5
    clusters: Annotated[int, Field(ge=1)] | None = None
    by: Literal["updates", "embedding", "parameters", "chance"] = "updates"
    num_components: Annotated[int, Field(ge=1)] = 64
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 42
    format: Literal["table", "json", "names"] = "table"

    def __post_init__(self):
        problems = []
        if (self.show == "nearest") != (self.to is not None):
            problems.append("show=nearest and to=<expert> go together: give both or neither")
        if self.by == "chance" and self.show != "clusters":
            problems.append("by=chance makes clusters: set show=clusters")
        if self.sparsity and self.by != "parameters":
            problems.append("sparsity cuts parameters: set by=parameters")
        if self.show == "interference" and self.by != "updates":
            problems.append("show=interference compares updates: set by=updates")
        if self.format == "names" and self.show not in ("nearest", "clusters"):
            problems.append("format=names is for show=nearest and show=clusters")
        if problems:
            raise ValueError("; ".join(problems))


def run(config: LibrarySimilar) -> None:
    """Prints cosines of all pairs, the nearest to one, clusters, or how experts get in each other's way."""
    library = ExpertLibrary.open(config.library)
    names = _names(config, library)
    count = config.clusters or min(MOST, len(names))
    if config.show == "clusters" and config.by == "chance":
        return _print_clusters(config, random_clusters(names, count, seed=config.seed))
    experts = {name: library.get_expert(name).adapter for name in names}
    if config.show == "interference":
        return _print_rows(config, [dataclasses.asdict(row) for row in interference(experts)])
    if config.show == "clusters":
        return _print_clusters(config, mbc(_embedding(config, experts), names, count, seed=config.seed))
    table = _likeness(config, experts)
    if config.to is None:
        rows = [
            {"expert": name, **dict(zip(names, row, strict=True))}
            for name, row in zip(names, table.tolist(), strict=True)
        ]
        return _print_rows(config, rows)
    row = table[names.index(config.to)].tolist()
    likeness = {name: value for name, value in zip(names, row, strict=True) if name != config.to}
    found = nearest(likeness, min(config.k, len(likeness)))
    if config.format == "names":
        return print("".join(f"{name}\n" for name in found), end="")
    return _print_rows(config, [{"expert": name, "cosine": likeness[name]} for name in found])


def _names(config: LibrarySimilar, library: ExpertLibrary) -> list[str]:
    cards = sound_cards(library, [*(config.experts or ()), *([config.to] if config.to else [])])
    known = [name for name, card in cards.items() if card.kind == "adapter"]
    wanted = list(dict.fromkeys(config.experts or known))
    for name in [*wanted, *([config.to] if config.to else [])]:
        if name not in known:
            raise ValueError(f"{library.url}: {unknown('expert', name, known)}")
    wanted += [config.to] if config.to and config.to not in wanted else []
    if len(wanted) < 2:
        raise ValueError(f"{library.url}: two experts at least are compared, there is {len(wanted)}")
    return wanted


def _embedding(config: LibrarySimilar, experts: Mapping[str, Adapter]) -> Tensor:
    if config.by == "parameters":
        return parameter_embedding(experts, sparsity=config.sparsity, num_components=config.num_components)
    return svd_embedding(gram(experts), config.num_components)


def _likeness(config: LibrarySimilar, experts: Mapping[str, Adapter]) -> Tensor:
    """Cosines [E, E]."""
    if config.by == "updates":
        return cosines(gram(experts))
    rows = _embedding(config, experts)
    return rows @ rows.T


def _print_clusters(config: LibrarySimilar, clusters: list[list[str]]) -> None:
    if config.format == "json":
        return print_json(clusters)
    if config.format == "names":
        return print("".join(f"{' '.join(cluster)}\n" for cluster in clusters), end="")
    rows = [[str(number), str(len(cluster)), ", ".join(cluster)] for number, cluster in enumerate(clusters)]
    return print_table(("cluster", "size", "experts"), rows)


def _print_rows(config: LibrarySimilar, rows: list[dict]) -> None:
    if config.format == "json":
        return print_json(rows)
    cells = [[value if isinstance(value, str) else f"{value:.3f}" for value in row.values()] for row in rows]
    return print_table(tuple(rows[0]), cells)
