"""`mole compare`: the tables of several evaluations as one, best first, and a picture of it."""

import logging
from pathlib import Path

import yaml
from rich.console import Console

from mole.analysis import MissingExtra, draw_comparison
from mole.evaluation import Table
from mole.registry import config_dataclass
from mole.run_folder import RunFolder

logger = logging.getLogger(__name__)


@config_dataclass
class Compare:
    """Which evaluations, and where their common table goes."""

    runs: tuple[str, ...]
    to: str = "outputs/comparison"
    experts: bool = False

    def __post_init__(self):
        if not self.runs:
            raise ValueError("runs: name at least one folder that mole evaluate left")


def run(config: Compare) -> None:
    """Prints the table; writes table.md, table.csv, evaluation.json and plots/comparison.png."""
    tables = {folder: Table.read(RunFolder(folder).evaluation) for folder in config.runs}
    table = joined(tables, with_experts=config.experts)
    target = RunFolder(config.to)
    target.path.mkdir(parents=True, exist_ok=True)
    table.write(target)
    Console().print(table.rendered())
    try:
        print(draw_comparison(table, target.plots / "comparison.png"))
    except MissingExtra as missing:
        logger.warning("no picture: %s", missing)


def joined(tables: dict[str, Table], *, with_experts: bool) -> Table:
    """One table, best mean first. A row `mixture` is called after its evaluation, what all have appears once.

    Raises ValueError for tables of other metrics, and for a row that two of them have with other figures.
    """
    metrics = {table.metric for table in tables.values()}
    if len(metrics) > 1:
        raise ValueError(f"these evaluations measure different things: {', '.join(sorted(metrics))}")
    rows: dict[str, dict[str, float]] = {}
    for folder, table in tables.items():
        known = {"base", "uniform", "oracle", "mixture"}
        for row, values in table.rows.items():
            if row not in known and not with_experts:
                continue
            name = _name(Path(folder)) if row == "mixture" else row
            if name in rows and rows[name] != dict(values):
                raise ValueError(
                    f"{folder}: its row {name!r} differs from that of another evaluation: evaluate on the same data, "
                    "and give each evaluation a name of its own (name=…)"
                )
            rows[name] = dict(values)
    together = Table(metrics.pop(), rows)
    sign = -1 if together.higher_is_better else 1
    missing = float("inf")
    order = sorted(rows, key=lambda row: (sign * mean if (mean := together.mean(row)) is not None else missing, row))
    return Table(together.metric, {row: rows[row] for row in order})


def _name(folder: Path) -> str:
    """What the evaluation was called; its folder's name where that is not known."""
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return folder.name
    name = saved.get("name") if isinstance(saved, dict) else None
    return name if isinstance(name, str) and name and name != "evaluation" else folder.name
