"""`mole library map`: a picture of a library, in which experts that are alike lie near each other."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mole.commands.library.opening import open_library
from mole.commands.library.output import print_json, print_table
from mole.experts.clustering import mbc
from mole.experts.embeddings import comparable, layout, stored_gram
from mole.experts.similarity import svd_embedding
from mole.registry import config_dataclass
from mole.run_folder import write_atomically


@config_dataclass
class LibraryMap:
    """Which experts, in how many colours, and where the picture goes."""

    library: str
    dest: str | None = None
    experts: tuple[str, ...] | None = None
    clusters: Annotated[int, Field(ge=1)] | None = None
    seed: int = 42
    format: Literal["table", "json", "names"] = "table"

    def __post_init__(self) -> None:
        if self.dest is not None and Path(self.dest).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError("dest: the picture is a .png, .svg or .pdf file")


def run(config: LibraryMap) -> None:
    """Prints where each expert lies, and writes the picture if `dest` names a file."""
    library = open_library(config.library)
    names = comparable(library, config.experts)
    G = stored_gram(library, names)
    places = layout(G).tolist()
    count = config.clusters or max(1, min(10, round((len(names) / 2) ** 0.5)))
    groups = mbc(svd_embedding(G), names, count, seed=config.seed)
    cluster = {name: number for number, group in enumerate(groups) for name in group}
    if config.dest is not None:
        from mole.analysis.library_map import draw_map
        from mole.figure import picture

        dest = Path(config.dest).expanduser()
        figure = draw_map(library.url, places, names, [cluster[name] for name in names])
        write_atomically(dest, picture(figure, dest.suffix[1:]))
    rows = [
        {"expert": name, "x": x, "y": y, "cluster": cluster[name]} for name, (x, y) in zip(names, places, strict=True)
    ]
    if config.format == "json":
        return print_json(rows)
    if config.format == "names":
        return print("".join(f"{name}\n" for name in sorted(names, key=lambda name: (cluster[name], name))), end="")
    print_table(
        ("expert", "x", "y", "cluster"),
        [[row["expert"], f"{row['x']:.3f}", f"{row['y']:.3f}", str(row["cluster"])] for row in rows],
    )
    if config.dest is not None:
        print(config.dest)
    return None
