"""What the benchmarks share: interleaved timing of cases in one process, bytes kept for a backward, the table."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table. `goal` of a ratio: `at least` or `at most` that."""

    part: str
    case: str
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = False
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def __str__(self) -> str:
        return f"{self.part:32}{self.case:40}{self.value:9.3g} {self.unit:3}{self.detail}"


def timed(
    cases: Mapping[str, Callable[[], object]], rounds: int, summary: Callable[[list[float]], float] = statistics.median
) -> dict[str, float]:
    """CPU seconds of each case, interleaved, medians or another summary of the rounds; the first one warms up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(rounds + 1):
        for name, run in cases.items():
            gc.collect()
            began = time.process_time()
            run()
            if round_number:
                times[name].append(time.process_time() - began)
    return {name: summary(found) for name, found in times.items()}


def seconds(found: Mapping[str, float]) -> str:
    """The times, by name."""
    return ", ".join(f"{name} {value:.3f} s" for name, value in found.items())


def milliseconds(found: Mapping[str, float]) -> str:
    """The times, by name."""
    return ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in found.items())


def saved_bytes(run: Callable[[], Any], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that a forward leaves for its backward; each storage once, parameters not at all."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            seen.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()  # while it lives no storage is used again
    total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    del kept
    return total


def write(rows: list[Row], facts: Mapping[str, Any], head: str, place: Path) -> None:
    """The table as Markdown under `head`, and the same as JSON with the facts: `place` with .md and .json."""
    lines = [head, "", "| | | measured | wanted | |", "|---|---|---:|---:|---|"]
    for row in rows:
        wanted = "" if row.goal is None else f"{'≤' if row.at_most else '≥'} {row.goal:g}"
        missed = " **missed**" if row.met is False else ""
        lines.append(f"| {row.part} | {row.case} | {row.value:.3g} {row.unit} | {wanted}{missed} | {row.detail} |")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    listed = [{**asdict(row), "met": row.met} for row in rows]
    place.with_suffix(".json").write_text(json.dumps({**facts, "rows": listed}, indent=1) + "\n", encoding="utf-8")
