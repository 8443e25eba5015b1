"""The weights of a run's branches over its training: from the log of learned weights, else from the routing log."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mole.analysis.record import CannotPlot, RunRecord
from mole.analysis.shares import mean_by_layer
from mole.figure import without_common_start
from mole.routing.weights_log import WEIGHTS

Axis = Literal["step", "epoch"]
MEAN, ALL = "mean", "all"
SAME = 1e-7  # layers whose weights differ by no more share their routing


@dataclass(frozen=True)
class WeightHistory:
    """Weights [N, G, E] of N moments, G sets and E branches; `site_sets` [L] is the set of each of the L sites.

    `moments` [N] are optimizer steps or, `of_steps` false, the numbers of the training forwards in a routing log;
    `epochs` [N] is None where nothing says them. `run` is the run's name, for titles.
    """

    run: str
    branches: tuple[str, ...]
    sites: tuple[str, ...]
    site_sets: np.ndarray
    values: np.ndarray
    moments: np.ndarray
    epochs: np.ndarray | None
    of_steps: bool = True

    @property
    def layers(self) -> list[str]:
        """layer_00, layer_01, …: the sites as they are called, in the order in which they run."""
        return [layer_name(index) for index in range(len(self.sites))]

    @property
    def num_sets(self) -> int:
        """How many sets of weights the sites share."""
        return self.values.shape[1]

    def of(self, layer: int | None) -> np.ndarray:
        """Weights [N, E] of one site, or (None) the mean over all."""
        return self.values[:, self.site_sets].mean(1) if layer is None else self.values[:, self.site_sets[layer]]

    def final(self) -> np.ndarray:
        """Weights [L, E] of every site at the last moment."""
        return self.values[-1][self.site_sets]

    def sites_of(self, one: int) -> list[int]:
        """The indices of the sites that use a set."""
        return np.flatnonzero(self.site_sets == one).tolist()

    def title_of(self, one: int) -> str:
        """A set by its sites: "layer_03 · 1.attention" of one, "layer_00 – layer_05" of several neighbours."""
        members = self.sites_of(one)
        if len(members) == 1:
            return f"{layer_name(members[0])} · {without_common_start(self.sites)[1][members[0]]}"
        first, last = layer_name(members[0]), layer_name(members[-1])
        if members == list(range(members[0], members[-1] + 1)):
            return f"{first} – {last}"
        return f"{first} … {last}, {len(members)} sites"

    def over(self, axis: Axis) -> tuple[np.ndarray, str]:
        """Where the moments lie [N], and the words for it. Raises CannotPlot for epochs that the log does not say."""
        if not self.of_steps:
            if axis == "epoch":
                raise CannotPlot("x=epoch: the routing log counts training forwards and knows no epochs: use x=step")
            return self.moments, "logged training forward"
        if axis == "epoch":
            assert self.epochs is not None
            return self.epochs, "epoch"
        return self.moments, "optimizer step"

    def index_of(self, layers: str) -> int:
        """The site that `layers` names. Raises ValueError for one that is not there, with the ones that are."""
        if layers not in self.layers:
            known = f"{self.layers[0]} … {self.layers[-1]}" if len(self.sites) > 1 else self.layers[0]
            raise ValueError(f"layers={layers}: known are {MEAN}, {ALL} and this run's sites, {known}")
        return self.layers.index(layers)


def layer_name(index: int) -> str:
    """What a site is called by its place in the order in which the sites run."""
    return f"layer_{index:02d}"


def history_of(record: RunRecord) -> WeightHistory:
    """The weights of a run over time, of a running one so far.

    From its log of weights; where it has none, from the training forwards in its routing log, the mean over their
    tokens. Raises CannotPlot, saying what is there, if neither has a course to show; ValueError for a damaged log.
    """
    if (record.folder.scalings / WEIGHTS).is_file():
        return logged_history(record)
    return _routed_history(record)


def logged_history(record: RunRecord) -> WeightHistory:
    """The weights in scalings/weights.jsonl. Raises CannotPlot if there are none yet, ValueError if it is damaged."""
    found = record.weights
    if not found.rows:
        raise CannotPlot(f"{record.folder.scalings / WEIGHTS} has no step yet: try again when training has begun")
    index = {one: place for place, one in enumerate(found.sets)}
    return WeightHistory(
        run=record.name,
        branches=found.branches,
        sites=found.sites,
        site_sets=np.array([index[found.set_of_site[site]] for site in found.sites]),
        values=found.values,
        moments=np.array([row.step for row in found.rows]),
        epochs=np.array([row.epoch for row in found.rows]),
    )


def _routed_history(record: RunRecord) -> WeightHistory:
    lacking = f"{record.folder.path} has no scalings/{WEIGHTS} (which learned static weights leave)"
    try:
        run = record.routing
    except CannotPlot:
        raise CannotPlot(f"{lacking}, and no routing log in its place, which is written when training ends") from None
    entries = [entry for entry in run.entries if entry.phase == "train" and entry.mask.any()]
    if len(entries) < 2:
        raise CannotPlot(
            f"{lacking}, and its routing log has {len(entries)} training forward(s) among {len(run.entries)} forwards: "
            "a course over time takes two or more; train with a lower log_every"
        )
    values = np.stack([mean_by_layer([entry]).values for entry in entries])
    shared = bool(np.abs(values - values[:, :1]).max() <= SAME)
    layers = len(run.layer_names)
    return WeightHistory(
        run=record.name,
        branches=run.expert_names,
        sites=run.layer_names,
        site_sets=np.zeros(layers, dtype=int) if shared else np.arange(layers),
        values=values[:, :1] if shared else values,
        moments=np.arange(1, len(entries) + 1),
        epochs=None,
        of_steps=False,
    )


def get_latest_log(run_folder: str | Path) -> dict[str, Any]:
    """The logged weights of a run, with those of its sets spread over their sites.

    Returns {"branches": […], "sites": […], "weights": [{"tgs": {"epoch": …, "global_step": …}, "weights": {"layer_00":
    {branch: weight, …}, …}}, …]}, one entry for each logged step; layer_NN is the site NN in the order in which the
    sites run. Raises ValueError if there is no such folder or the log is damaged, CannotPlot without such a log.
    """
    found = RunRecord(run_folder).weights
    names = {layer_name(index): found.set_of_site[site] for index, site in enumerate(found.sites)}
    entries = [
        {
            "tgs": {"epoch": row.epoch, "global_step": row.step},
            "weights": {layer: dict(row.weights[one]) for layer, one in names.items()},
        }
        for row in found.rows
    ]
    return {"branches": list(found.branches), "sites": list(found.sites), "weights": entries}


def weights_csv(history: WeightHistory, layers: Mapping[str, int | None]) -> str:
    """Rows of step (forward, where a routing log counts those), epoch, layer, branch and weight.

    `layers`: what each is called → the index of its site, None for the mean over all.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step" if history.of_steps else "forward", "epoch", "layer", "branch", "weight"])
    epochs: Sequence[Any] = [""] * len(history.moments) if history.epochs is None else history.epochs.tolist()
    values = {name: history.of(index).tolist() for name, index in layers.items()}
    for row, (moment, epoch) in enumerate(zip(history.moments.tolist(), epochs, strict=True)):
        for name, weights in values.items():
            writer.writerows([moment, epoch, name, *pair] for pair in zip(history.branches, weights[row], strict=True))
    return text.getvalue()
