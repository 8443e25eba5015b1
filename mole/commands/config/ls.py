"""`mole config ls`: the groups of conf/ and their options, those of the user's folders among them."""

import json
from typing import Literal

from mole.config.engine import folders
from mole.config.yaml_files import sentence
from mole.registry import config_dataclass, unknown


@config_dataclass
class ConfigLs:
    """One group, or all of them."""

    group: str | None = None
    format: Literal["table", "json", "names"] = "table"


def run(config: ConfigLs) -> None:
    """Prints group, option, and the sentence at the top of its file. Raises ValueError for an unknown group."""
    found = options()
    if config.group is not None:
        if config.group not in found:
            raise ValueError(unknown("group", config.group, found))
        found = {config.group: found[config.group]}
    if config.format == "json":
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif config.format == "names":
        print("\n".join(f"{group}/{option}" for group, members in found.items() for option in members))
    else:
        print("\n".join(_table(found)))


def options() -> dict[str, dict[str, str]]:
    """Group → option → its sentence, everything sorted; the first folder that has an option counts."""
    found: dict[str, dict[str, str]] = {}
    for root in folders():
        for file in root.glob("*/*.yaml"):
            found.setdefault(file.parent.name, {}).setdefault(file.stem, sentence(file))
    return {group: dict(sorted(members.items())) for group, members in sorted(found.items())}


def _table(found: dict[str, dict[str, str]]) -> list[str]:
    width = max((len(option) for members in found.values() for option in members), default=0) + 2
    lines: list[str] = []
    for group, members in found.items():
        lines += [group, *(f"  {option:<{width}}{text}".rstrip() for option, text in members.items())]
    return lines
