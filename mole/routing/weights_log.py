"""Learned weights that depend on no input, over training: `scalings/weights.jsonl` in the folder of a run.

The first line names the branches that are weighted, the sites in the order in which they run, and the set of weights
that each site uses. Every further line has the weights of all sets after one optimizer step.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mole.run_folder import write_atomically

WEIGHTS = "weights.jsonl"
FORMAT = 1
Weights = Mapping[str, Mapping[str, float]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsRow:
    """Set → branch → weight after optimizer step `step`, at `epoch` epochs. NaN: the weight was not finite."""

    step: int
    epoch: float
    weights: dict[str, dict[str, float]]


@dataclass(frozen=True)
class LoggedWeights:
    """A log of weights as read back. `mode`: how the router makes its weights, None where the log does not say."""

    branches: tuple[str, ...]
    sites: tuple[str, ...]
    set_of_site: dict[str, str]
    mode: str | None
    rows: tuple[WeightsRow, ...]

    @cached_property
    def sets(self) -> tuple[str, ...]:
        """The names of the sets, in the order of the first site of each."""
        return tuple(dict.fromkeys(self.set_of_site[site] for site in self.sites))

    @cached_property
    def values(self) -> np.ndarray:
        """Weights [N, G, E] of N rows, G sets and E branches."""
        rows = [[[row.weights[one][b] for b in self.branches] for one in self.sets] for row in self.rows]
        return np.array(rows, dtype=np.float64).reshape(len(self.rows), len(self.sets), len(self.branches))


class WeightsLog:
    """Writes the log at `path`, line by line; whoever reads it meanwhile, or after a kill, finds whole lines.

    `branches` are the names of what is weighted (experts in the mixture's order, then `base` if it takes part),
    `sites` those of the places in the order in which they run. `sets` has for each set the indices of its sites, as a
    router's `groups` have. Of the steps that it sees, the log keeps 0, each multiple of `every` (None: each step) and
    the last. With `resume` it goes on with a file that is there. Raises ValueError if the names do not fit together.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        branches: Sequence[str],
        sites: Sequence[str],
        sets: Mapping[str, Sequence[int]],
        mode: str | None = None,
        every: int | None = None,
        resume: bool = False,
    ):
        self.path, self.every, self.resume = Path(path), 1 if every is None else every, resume
        if self.every < 1:
            raise ValueError(f"a log of weights keeps every n-th step, n ≥ 1 (None: each); got every={every}")
        for what, names in (("branches", branches), ("sites", sites)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{what} of a log of weights: one or more different names are needed, got {[*names]}")
        if sorted(index for members in sets.values() for index in members) != list(range(len(sites))):
            raise ValueError(
                f"sets of a log of weights: each of the sites 0 … {len(sites) - 1} belongs to one set, got "
                f"{ {name: [*members] for name, members in sets.items()} }"
            )
        set_of = {index: name for name, members in sets.items() for index in members}
        self.header = {
            "format": FORMAT,
            "mode": mode,
            "branches": [*branches],
            "sites": [*sites],
            "set_of_site": {site: set_of[index] for index, site in enumerate(sites)},
        }
        self._started, self._length = False, 0  # bytes of whole lines
        self._seen = self._written = -1  # the newest steps
        self._newest: dict[str, Any] = {}
        self._waiting = b""

    def start(self, step: int = 0) -> None:
        """Begins the file; with `resume`, keeps the lines up to `step` and takes away what is done again.

        Raises ValueError if the file that is there is damaged, or has other branches, sites or sets.
        """
        rows: Sequence[WeightsRow] = ()
        if self.resume and self.path.is_file():
            lines = _lines(self.path)
            if lines and (found := lines[0][1]) != self.header:
                names = [
                    key for key in self.header if not isinstance(found, dict) or found.get(key) != self.header[key]
                ]
                raise ValueError(
                    f"{self.path}: a log with other {', '.join(names) or 'facts'} than this run's: put the run's own "
                    "file back, or start the run again in another folder"
                )
            rows = [row for row in _logged(self.path, lines).rows if row.step <= step] if lines else ()
        text = "".join(_line(record) for record in (self.header, *(_record(row) for row in rows)))
        write_atomically(self.path, text)
        self._started, self._length = True, len(text.encode())
        self._seen = self._written = rows[-1].step if rows else -1

    def see(self, step: int, epoch: float, weights: Weights, *, last: bool = False) -> None:
        """Takes the weights (set → branch → weight) after optimizer step `step`, and writes them if their turn is.

        The first call starts the log at its step. A step that is written already is not written again. Raises
        ValueError for a step that lies before one seen.
        """
        if not self._started:
            self.start(step)
        if step < self._seen:
            raise ValueError(f"{self.path}: step {step} after step {self._seen}: steps only go up")
        _require_whole(weights, self.header)
        self._seen, self._newest = step, _record(WeightsRow(step, epoch, weights))  # type: ignore[arg-type]
        if last or step % self.every == 0:
            self.finish()

    def finish(self) -> None:
        """Writes the newest weights seen, if they are not there: once training has reached its end, early or not."""
        if self._seen <= self._written:
            return
        self._written = self._seen
        self._waiting += _line(self._newest).encode()
        try:
            self._append()
        except OSError as error:
            log.warning("%s cannot be written (%s); its lines wait in memory", self.path, error.strerror or error)

    def _append(self) -> None:
        with open(self.path, "ab", buffering=0) as file:
            file.truncate(self._length)  # a part that a full disk left of an earlier try
            while self._waiting:
                count = file.write(self._waiting)
                self._waiting = self._waiting[count:]
                self._length += count


def read_weights(path: str | Path) -> LoggedWeights:
    """The log at `path`, also while a run writes it: half a last line is left out.

    Raises FileNotFoundError if there is none; ValueError, naming file and line, for any other line that is damaged.
    """
    lines = _lines(Path(path))
    if not lines:
        raise ValueError(f"{path}:1: not a log of weights: its first line, with the names, is not there")
    return _logged(Path(path), lines)


# ---- lines
def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _record(row: WeightsRow) -> dict[str, Any]:
    """As a line has it: nine digits are every digit of a float32; JSON has null for what is not finite."""

    def plain(value: float) -> float | None:
        return float(f"{value:.9g}") if math.isfinite(value) else None

    weights = {one: {name: plain(value) for name, value in values.items()} for one, values in row.weights.items()}
    return {"step": int(row.step), "epoch": float(row.epoch), "weights": weights}


def _lines(path: Path) -> list[tuple[int, Any]]:
    """Number and content of each line. A last one without its end is left out unless it is whole."""
    *whole, rest = path.read_bytes().split(b"\n")  # names may have what str.splitlines takes for the end of a line
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            found.append((number, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from None
    try:
        return [*found, (len(whole) + 1, json.loads(rest))]
    except ValueError:
        return found


def _logged(path: Path, lines: Sequence[tuple[int, Any]]) -> LoggedWeights:
    number, rows = lines[0][0], []
    try:
        header = lines[0][1]
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, this version reads {FORMAT!r}")
        set_of_site = {site: str(header["set_of_site"][site]) for site in header["sites"]}
        names = tuple(map(str, header["branches"])), tuple(map(str, header["sites"]))
        for line in lines[1:]:
            number = line[0]
            row = _row(line[1])
            _require_whole(row.weights, header)
            if rows and row.step <= rows[-1].step:
                raise ValueError(f"step {row.step} after step {rows[-1].step}")
            rows.append(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}:{number}: not a line of a log of weights: {reason}") from None
    return LoggedWeights(*names, set_of_site, header.get("mode"), tuple(rows))


def _row(record: Mapping[str, Any]) -> WeightsRow:
    weights = {
        one: {name: math.nan if value is None else float(value) for name, value in values.items()}
        for one, values in record["weights"].items()
    }
    return WeightsRow(int(record["step"]), float(record["epoch"]), weights)


def _require_whole(weights: Weights, header: Mapping[str, Any]) -> None:
    """Raises ValueError unless every set has a weight for every branch, and nothing else is there."""
    sets, branches = set(header["set_of_site"].values()), set(header["branches"])
    if set(weights) != sets:
        raise ValueError(f"weights of the sets {sorted(weights)}, but the log has {sorted(sets)}")
    for one, values in weights.items():
        if set(values) != branches:
            raise ValueError(f"{one}: weights of {sorted(values)}, but the branches are {sorted(branches)}")
