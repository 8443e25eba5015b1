"""`mole library cluster`: experts that are alike, and the commands that train one new expert for each group."""

import shlex
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json, print_table
from mole.config import yaml_files
from mole.experts import Card, is_name
from mole.experts.clustering import MOST, mbc, random_clusters
from mole.experts.damage import sound_cards
from mole.experts.embeddings import comparable, embedding
from mole.registry import config_dataclass


@config_dataclass
class LibraryCluster:
    """Which experts, how many groups, and the names that the new experts would get."""

    library: str
    experts: tuple[str, ...] | None = None
    clusters: Annotated[int, Field(ge=1)] | None = None
    by: Literal["updates", "chance"] = "updates"
    num_components: Annotated[int, Field(ge=1)] = 64
    prefix: str = "cluster"
    into: str | None = None
    seed: int = 42
    recipe: bool = True
    format: Literal["table", "json", "names"] = "table"

    def __post_init__(self) -> None:
        if not is_name(f"{self.prefix}-0"):
            raise ValueError(f"prefix: {self.prefix!r} with a number behind it is no expert's name")


def run(config: LibraryCluster) -> None:
    """Prints the groups, largest first, and the commands of the joint training."""
    library = open_library(config.library)
    names = comparable(library, config.experts)
    count = config.clusters or min(MOST, len(names))
    if config.by == "chance":
        groups = random_clusters(names, count, seed=config.seed)
    else:
        groups = mbc(embedding(library, names, config.num_components), names, count, seed=config.seed)
    cards = sound_cards(library, names)
    into = config.into or config.library
    lines = [training(f"{config.prefix}-{n}", [cards[name] for name in group], into) for n, group in enumerate(groups)]
    news = [f"{config.prefix}-{n}" for n in range(len(groups))]
    mixing = (
        f"mole build-moe library={shlex.quote(into)} {shlex.quote('experts=[' + ','.join(news) + ']')} router=arrow"
    )
    if config.format == "json":
        rows = [
            {"name": name, "experts": group, "train": line}
            for name, group, line in zip(news, groups, lines, strict=True)
        ]
        return print_json({"clusters": rows, "mix": mixing})
    if config.format == "names":
        return print("".join(f"{' '.join(group)}\n" for group in groups), end="")
    print_table(
        ("cluster", "size", "experts"),
        [[name, str(len(group)), ", ".join(group)] for name, group in zip(news, groups, strict=True)],
    )
    if config.recipe:
        print("\none expert for each, trained on the data of all its members; then a router over them:\n")
        print("\n".join([*lines, mixing]))
    return None


def training(name: str, cards: list[Card], library: str) -> str:
    """The command that trains one expert on the data of all these cards.

    Data that is no option of conf/dataset has no path in a card: its name stands there, for a dataset of one's own.
    """
    rows = {row["name"]: row for card in cards for row in card.data}
    known = {file.stem for file in (yaml_files.conf_dir() / "dataset").glob("*.yaml")}
    data = sorted(rows) or sorted({task for card in cards for task in card.tasks})
    words: list[str] = ["mole", "train-expert", *_backbone(cards), f"dataset=[{','.join(data)}]"]
    adapter: dict[str, Any] = _commonest(cards)
    words.append(f"adapter={adapter['method']}")
    if adapter["method"] == "lora":
        words += [f"adapter.rank={adapter['rank']}", f"adapter.alpha={adapter['alpha']:g}"]
    words += [f"name={name}", f"library={library}"]
    line = " ".join(map(shlex.quote, words))
    if own := [one for one in data if one not in known]:
        line = f"# your own data: {', '.join(own)}\n{line}"
    return line


def _backbone(cards: list[Card]) -> list[str]:
    names = {card.backbone.name for card in cards}
    if len(names) > 1:
        raise ValueError(
            f"experts for several backbones ({', '.join(sorted(names))}) are not trained as one: experts=[…]"
        )
    (name,) = names
    return ["backbone=tiny"] if name == "mole/tiny" else ["backbone=pretrained", f"backbone.path={name}"]


def _commonest(cards: list[Card]) -> dict[str, Any]:
    """The method that most have, with the largest rank among them and its alpha."""
    adapters = [card.adapter for card in cards if card.adapter]
    method = Counter(adapter["method"] for adapter in adapters).most_common(1)[0][0]
    return max((a for a in adapters if a["method"] == method), key=lambda adapter: adapter["rank"] or 0)
