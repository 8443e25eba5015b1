"""The table of an evaluation: a row per model (base, each expert, uniform, oracle, mixture), a column per task."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole.registry import unknown
from mole.run_folder import RunFolder, write_atomically

HIGHER_IS_BETTER = {
    "exact_match": True,
    "loss": False,
    **dict.fromkeys(("score", "accuracy", "f1", "macro_f1", "mcc", "pearson", "spearman"), True),
    **dict.fromkeys(("accuracy_f1", "accuracy_macro_f1", "pearson_spearman"), True),
}
MEAN = "mean"
ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """Scores: `rows` is row name → task name → value of `metric`.

    A row may lack tasks, and then has no mean; a value that is not finite never is the best. `higher_is_better` None:
    known from the metric. `routing` statistics of the mixture's routing, kept beside. Raises ValueError for a metric of
    which it is not known, and for a table without any value.
    """

    metric: str
    rows: Mapping[str, Mapping[str, float]]
    higher_is_better: bool | None = None
    routing: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self):
        if self.higher_is_better is None:
            if self.metric not in HIGHER_IS_BETTER:
                raise ValueError(f"{unknown('metric', self.metric, HIGHER_IS_BETTER)}; say higher_is_better for it")
            object.__setattr__(self, "higher_is_better", HIGHER_IS_BETTER[self.metric])
        tasks = tuple(dict.fromkeys(task for row in self.rows.values() for task in row))
        if not tasks:
            raise ValueError(f"a table of {self.metric} needs at least one row with a value, got {dict(self.rows)}")
        object.__setattr__(self, "tasks", tasks)

    # ---- values
    def value(self, row: str, task: str) -> float | None:
        """The value, None where the row has none."""
        return self.rows[row].get(task)

    def mean(self, row: str) -> float | None:
        """The plain mean over all tasks of the table; None if the row lacks one."""
        values = [self.rows[row].get(task) for task in self.tasks]
        present = [value for value in values if value is not None]
        if len(present) < len(values):
            return None
        return math.fsum(present) / len(present) if all(map(math.isfinite, present)) else math.nan

    def column(self, task: str | None) -> dict[str, float | None]:
        """Row name → value for this task, or the mean for None."""
        return {row: self.mean(row) if task is None else self.value(row, task) for row in self.rows}

    def best(self, task: str | None) -> frozenset[str]:
        """The rows with the best value for this task (None: the best mean); several if they are equal."""
        values = {row: v for row, v in self.column(task).items() if v is not None and math.isfinite(v)}
        if not values:
            return frozenset()
        top = (max if self.higher_is_better else min)(values.values())
        return frozenset(row for row, value in values.items() if value == top)

    # ---- forms
    def as_json(self) -> str:
        """{"metric": …, "rows": {row: {task: value}}} and "routing" if there is any; what is not finite is null."""
        rows = {
            row: {task: value if math.isfinite(value) else None for task, value in values.items()}
            for row, values in self.rows.items()
        }
        routing = {"routing": dict(self.routing)} if self.routing else {}
        return json.dumps({"metric": self.metric, "rows": rows} | routing, indent=2, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        """A Markdown table; the best of each column is bold."""
        lines = ["| " + " | ".join(_escaped(cell) for cell in self._header()) + " |"]
        lines.append("| --- |" + " ---: |" * (len(self.tasks) + 1))
        for row in self.rows:
            cells = [f"**{text}**" if best else text for text, best in self._cells(row)]
            lines.append("| " + " | ".join([_escaped(row), *cells]) + " |")
        return "\n".join([*lines, "", f"{self._caption()}; bold: the best of a column.", ""])

    def as_csv(self) -> str:
        """Values in full precision, empty where there is none, and the mean as the last column."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["row", *self.tasks, MEAN])
        for row in self.rows:
            values = [*(self.value(row, task) for task in self.tasks), self.mean(row)]
            writer.writerow([row, *("" if value is None else repr(float(value)) for value in values)])
        return buffer.getvalue()

    def rendered(self) -> Any:
        """A table for rich's console; the best of each column is marked with a star and green."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self._caption()), caption="* best of the column", title_justify="left")
        header, *columns = self._header()
        table.add_column(Text(header), overflow="fold")
        for name in columns:
            table.add_column(Text(name), justify="right", overflow="fold")
        for row in self.rows:
            cells = [
                Text(f"{text} *", style="bold green") if best else Text(f"{text}  ") for text, best in self._cells(row)
            ]
            table.add_row(Text(row), *cells)
        return table

    def _header(self) -> list[str]:
        return ["", *self.tasks, MEAN]

    def _caption(self) -> str:
        return f"{self.metric} ({'higher' if self.higher_is_better else 'lower'} is better)"

    def _cells(self, row: str) -> list[tuple[str, bool]]:
        columns: list[str | None] = [*self.tasks, None]
        return [(_shown(self.column(task)[row]), row in self.best(task)) for task in columns]

    # ---- files
    def write(self, run: RunFolder) -> None:
        """Writes evaluation.json, table.md and table.csv of the run, each whole or not at all."""
        write_atomically(run.table_md, self.as_markdown())
        write_atomically(run.table_csv, self.as_csv())
        write_atomically(run.evaluation, self.as_json())

    @classmethod
    def read(cls, path: str | Path, higher_is_better: bool | None = None) -> Table:
        """The table in an evaluation.json. Raises ValueError, naming the file, if it is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = {
                str(row): {str(task): math.nan if value is None else float(value) for task, value in values.items()}
                for row, values in data["rows"].items()
            }
            return cls(data["metric"], rows, higher_is_better, data.get("routing", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an evaluation that can be read: {error}") from None


def _shown(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.3f}" if abs(value) < 1e5 or not math.isfinite(value) else f"{value:.3g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
