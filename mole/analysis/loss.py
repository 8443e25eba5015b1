"""Training curves: the loss of the steps, and what evaluation measured on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mole.analysis.record import CannotPlot, RunRecord, number
from mole.figure import FAINT, INK, LINE, colours, headline, new_figure, panel, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, GAP = 8.0, 2.9, 0.75
ALL = "all tasks"
NOT_METRICS = {"step", "phase", "seconds"}
Curve = tuple[np.ndarray, np.ndarray]


def draw_loss(record: RunRecord) -> Figure:
    """One panel for the loss in training and validation, and one per further family of metrics.

    A family is what stands before the slash: `exact_match/sums` and `exact_match/words` share a panel.
    """
    lines = record.metrics
    train = _curve([line for line in lines if line.get("phase", "train") == "train"], "loss")
    evaluated = [line for line in lines if line.get("phase") == "evaluation"]
    names = list(dict.fromkeys(name for line in evaluated for name in line if name not in NOT_METRICS))
    curves = {name: curve for name in names if (curve := _curve(evaluated, name)) is not None}
    if train is None and not curves:
        raise CannotPlot(f"{record.folder.metrics} has no loss and no evaluation to draw")
    families: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        if name != "validation_loss":
            families.setdefault(name.partition("/")[0], {})[name] = curve
    with_loss = train is not None or "validation_loss" in curves
    panels = int(with_loss) + len(families)
    figure = new_figure(WIDTH + 2.6, panels * (HEIGHT + GAP) + 0.6)
    places = [panel(figure, 0.8, 0.6 + i * (HEIGHT + GAP), WIDTH, HEIGHT) for i in reversed(range(panels))]
    headline(places[0], "Training curves", f"{record.name} · {max(line['step'] for line in lines):,} steps")
    if with_loss:
        _draw_losses(places[0], train, curves.get("validation_loss"))
    for axes, (family, members) in zip(places[int(with_loss) :], families.items(), strict=True):
        _draw_family(axes, family, members)
    last = max(line["step"] for line in lines)
    for axes in places:
        _finish(axes, last)
    places[-1].set_xlabel("optimizer step", fontsize=10, color=INK)
    return figure


def _curve(lines: Sequence[dict[str, Any]], name: str) -> Curve | None:
    points = [(line["step"], number(line[name])) for line in lines if name in line]
    points = [point for point in points if np.isfinite(point[1])]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values)


def _draw_losses(axes: Axes, train: Curve | None, validation: Curve | None) -> None:
    blue, orange = colours(2)
    if train is not None:
        steps, values = train
        window = min(25, max(1, len(values) // 25))
        if window > 2:
            axes.plot(steps, values, color=blue, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _smoothed(values, window), color=blue, linewidth=1.8,
                      label=f"training\n(mean of {window} points)")  # fmt: skip
        else:
            axes.plot(steps, values, color=blue, linewidth=1.8, marker="o" if len(values) == 1 else None,
                      label="training")  # fmt: skip
    if validation is not None:
        steps, values = validation
        axes.plot(steps, values, color=orange, linewidth=1.8, marker="o", markersize=4, label="validation")
        best = int(values.argmin())
        axes.plot(steps[best], values[best], color=orange, marker="*", markersize=13, markeredgecolor="white",
                  linestyle="", label=f"best: {values[best]:.3f}\nat step {steps[best]:,}")  # fmt: skip
    axes.set_ylabel("loss (nats per token)", fontsize=10, color=INK)
    everything = np.concatenate([curve[1] for curve in (train, validation) if curve is not None])
    if everything.min() > 0 and everything.max() / everything.min() > 30:
        axes.set_yscale("log")


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the values around each; at the ends, of those that there are."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _draw_family(axes: Axes, family: str, members: dict[str, Curve]) -> None:
    for colour, (name, (steps, values)) in zip(colours(len(members)), members.items(), strict=True):
        label = name.partition("/")[2] or ALL
        overall = len(members) > 1 and label == ALL
        axes.plot(steps, values, color=INK if overall else colour, linewidth=2.4 if overall else 1.5, marker="o",
                  markersize=3.5, label=shortened(label, 26))  # fmt: skip
    unit = " (nats per token)" if family.endswith("loss") else ""
    axes.set_ylabel(f"{family.replace('_', ' ')}{unit}", fontsize=10, color=INK)
    low, high = axes.get_ylim()
    if low >= -0.06 and high <= 1.06:
        axes.set_ylim(-0.03, 1.03)


def _finish(axes: Axes, last: int) -> None:
    axes.set_xlim(-0.01 * max(last, 1), max(last, 1) * 1.02)
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    labels = axes.get_legend_handles_labels()[1]
    if labels == [ALL]:  # one curve, and the axis says which
        return
    count = len(labels)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, labelcolor=FAINT, borderaxespad=0,
                fontsize=9 if count <= 12 else 6.5, ncols=1 if count <= 20 else 2)  # fmt: skip
