"""How many tokens each expert got, by layer and by position: bars, and the counts as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mole.analysis.record import CannotPlot, RunRecord
from mole.analysis.shares import telling
from mole.figure import picture, shortened, without_common_start
from mole.moe.plots import NULL, draw_loads, draw_totals
from mole.routing.log_files import LoggedRouting
from mole.run_folder import write_atomically

NAME = "experts-load"
FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Loads:
    """`counts` [L, E, S]: of each layer, expert and position. `chosen`: they are tokens; else sums of weights."""

    counts: np.ndarray
    layers: tuple[str, ...]
    experts: tuple[str, ...]
    tokens: int
    chosen: bool
    which: str

    @property
    def nulls(self) -> int:
        """How many of the last experts are null ones."""
        found = 0
        while found < len(self.experts) and self.experts[len(self.experts) - 1 - found] in NULL:
            found += 1
        return found


def loads_of(record: RunRecord) -> Loads:
    """The loads in a run's routing log: of evaluation, else of generation, else of the last training forwards.

    Of a routing that chooses, the tokens that chose each expert; of a dense one, the sums of its weights. Raises
    CannotPlot if there is no log, or padding only.
    """
    run = record.routing
    entries, which = telling(run)
    sequences = [entry for entry in entries if entry.mask.any()]
    if not sequences:
        raise CannotPlot("the routing log holds padding only")
    chosen = all(bool((entry.weights[entry.mask] == 0).any()) for entry in sequences) or len(run.expert_names) == 1
    length = max(entry.mask.shape[1] for entry in sequences)
    counts = np.zeros((len(run.layer_names), len(run.expert_names), length))
    for entry in sequences:
        counts[:, :, : entry.mask.shape[1]] += _counted(entry, chosen)
    tokens = sum(int(entry.mask.sum()) for entry in sequences)
    return Loads(counts, run.layer_names, run.expert_names, tokens, chosen, which)


def _counted(entry: LoggedRouting, chosen: bool) -> np.ndarray:
    """[L, E, S] of one forward."""
    weights = (entry.weights != 0) if chosen else entry.weights
    return np.einsum("bsle,bs->les", weights.astype(np.float64), entry.mask.astype(np.float64))


def plot_experts_load(
    folder: str | Path, layer: int | None = None, to: str | Path | None = None, kind: str = "png"
) -> list[Path]:
    """Draws the loads of the run in `folder` into `to` (None: its plots/); returns the files.

    experts-load.<kind> has the totals of all layers, experts-load-<n>.<kind> one layer by position (`layer` None: of
    each), experts-load.json and .csv the counts. Raises ValueError for a layer that is not there; CannotPlot without a
    routing log; MissingExtra without matplotlib.
    """
    record = RunRecord(folder)
    loads = loads_of(record)
    if layer is not None and not 0 <= layer < len(loads.layers):
        raise ValueError(f"layer={layer}: the routing log has {len(loads.layers)} layers, 0 … {len(loads.layers) - 1}")
    shown = range(len(loads.layers)) if layer is None else [layer]
    unit = "slots" if loads.chosen else "weight"
    words = f"{record.name} · {loads.tokens:,} tokens, {loads.which}"
    labels = [NULL.get(name, f"expert {name}" if name.isdigit() else name) for name in loads.experts]
    pictures = {f"{NAME}.{kind}": picture(_totals(loads, labels, shown, words), kind)}
    for index in shown:
        title = f"Experts by position: {loads.layers[index]}"
        figure = draw_loads(loads.counts[index], labels, title, words, nulls=loads.nulls, unit=unit)
        pictures[f"{NAME}-{index}.{kind}"] = picture(figure, kind)
    rows = [_row(loads, index) for index in shown]
    target = record.folder.plots if to is None else Path(to)
    files: dict[str, Any] = {**pictures, f"{NAME}.json": _json(loads, rows), f"{NAME}.csv": _csv(loads, shown)}
    for name, content in files.items():
        write_atomically(target / name, content)
    return [target / name for name in files]


def _totals(loads: Loads, labels: Sequence[str], shown: Sequence[int], words: str) -> Any:
    """The totals of one layer as a figure of its own, of several as one bar chart each."""
    totals = loads.counts.sum(2)
    unit = "slots" if loads.chosen else "weight"
    if len(shown) == 1:
        title = f"Experts' load: {loads.layers[shown[0]]}"
        return draw_totals(totals[shown[0]], labels, title, words, nulls=loads.nulls, unit=unit)
    start, names = without_common_start([loads.layers[index] for index in shown])
    title = f"Experts' load by layer, under {start}" if start else "Experts' load by layer"
    ticks = [name if len(label) > 3 else label for name, label in zip(loads.experts, labels, strict=True)]
    rows = totals[list(shown)]
    return draw_loads(rows, [shortened(n, 24) for n in names], title, words, unit=unit, ticks=ticks, x_label="expert",
                      nulls_across=loads.nulls)  # fmt: skip


def _row(loads: Loads, layer: int) -> dict[str, Any]:
    totals = loads.counts[layer].sum(1)
    real = totals[: len(totals) - loads.nulls]
    return {
        "layer": loads.layers[layer],
        "loads": dict(zip(loads.experts, totals.tolist(), strict=True)),
        "max_violation": float(real.max() / max(float(real.mean()), 1e-30) - 1),
        "by_position": {name: row.tolist() for name, row in zip(loads.experts, loads.counts[layer], strict=True)},
    }


def _json(loads: Loads, rows: Sequence[dict[str, Any]]) -> str:
    facts = {"tokens": loads.tokens, "which": loads.which, "unit": "slots" if loads.chosen else "weight"}
    return json.dumps({**facts, "experts": list(loads.experts), "layers": list(rows)}, indent=1) + "\n"


def _csv(loads: Loads, shown: Sequence[int]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "expert", "position", "load"])
    for layer in shown:
        for expert, name in enumerate(loads.experts):
            for position, load in enumerate(loads.counts[layer, expert].tolist()):
                writer.writerow([loads.layers[layer], name, position, f"{load:g}"])
    return text.getvalue()
