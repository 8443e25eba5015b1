"""`mole config show`: the YAML file of one option, or of a command, with its comments."""

from mole.config.engine import folders
from mole.registry import config_dataclass, unknown


@config_dataclass
class ConfigShow:
    """What to show: <group>/<option>, or a command such as train-expert."""

    what: str


def run(config: ConfigShow) -> None:
    """Prints the file, the user's if there are two. Raises ValueError if there is none."""
    name = config.what.removesuffix(".yaml").replace(" ", "-")
    known: list[str] = []
    for root in folders():
        for file in sorted([*root.glob("*.yaml"), *root.glob("*/*.yaml")]):
            found = file.relative_to(root).with_suffix("").as_posix()
            if found == name:
                print(f"# {file}")
                print(file.read_text(encoding="utf-8"), end="")
                return
            known.append(found)
    group = name.partition("/")[0]
    near = [k for k in known if k.partition("/")[0] == group] or known
    raise ValueError(unknown("configuration", config.what, dict.fromkeys(near)))
