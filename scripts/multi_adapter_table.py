"""What scripts/multi_adapter.sh came to: per target the scores, the own expert's weight, and what follows from them.

Usage: python scripts/multi_adapter_table.py <folder of the runs>

A target whose expert does not beat a head alone by two standard deviations over the seeds is inconclusive: neither
passed nor failed. Writes claims.json and table.md into the folder.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from mole.routing.weights_log import read_weights


def score(run: Path) -> float | None:
    """The main score of a finished run on the whole validation set."""
    file = run / "run.json"
    return json.loads(file.read_text())["validation"]["score"] if file.is_file() else None


def facts_of(seed: Path, target: str) -> dict[str, Any]:
    """What one seed says of a target."""
    log = read_weights(seed / "mixtures" / target / "scalings" / "weights.jsonl")
    own = target.replace("_", "-")
    mean = log.values.mean(1)  # over the sets of weights
    half = mean[len(mean) // 2]
    last = dict(zip(log.branches, map(float, mean[-1]), strict=True))
    return {
        "head": score(seed / "heads" / target),
        "single": score(seed / "experts" / target),
        "multi": score(seed / "mixtures" / target),
        "fusion": score(seed / "fusions" / target),
        "weights": last,
        "own": last[own],
        "largest": max(last, key=lambda name: last[name]) == own,
        "largest_at_half": log.branches[int(half.argmax())] == own,
    }


def spread(values: list[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 of one); None if one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def verdict(rows: list[dict[str, Any]]) -> str:
    """passed, failed (with what does not hold), or inconclusive."""
    single, multi, head = (spread([row[name] for row in rows]) for name in ("single", "multi", "head"))
    assert single is not None
    assert multi is not None
    if head is not None and single[0] - head[0] <= 2 * max(single[1], head[1]):
        return "inconclusive: the expert does not beat a head alone by 2 sd"
    wrong = []
    if not all(row["largest"] and row["own"] > 0.5 for row in rows):
        wrong.append("own weight")
    if multi[0] < single[0] - max(single[1], 0.02):
        wrong.append("multi below single")
    return f"failed: {', '.join(wrong)}" if wrong else "passed"


def shown(pair: tuple[float, float] | None) -> str:
    return "–" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


def main(folder: Path) -> None:
    seeds = sorted(folder.glob("seed-*"))
    targets = list(dict.fromkeys(run.name for seed in seeds for run in sorted((seed / "mixtures").iterdir())))
    found = {target: [facts_of(seed, target) for seed in seeds] for target in targets}
    lines = [
        "| target | head alone | expert | multi-adapter | fusion | own weight | claim |",
        "| --- |" + " ---: |" * 6,
    ]
    for target, rows in found.items():
        cells = [shown(spread([row[name] for row in rows])) for name in ("head", "single", "multi", "fusion", "own")]
        lines.append(f"| {target} | {' | '.join(cells)} | {verdict(rows)} |")
    table = "\n".join([*lines, "", f"Main score on the validation set, {len(seeds)} seed(s).", ""])
    (folder / "table.md").write_text(table)
    claims = {target: {"verdict": verdict(rows), "seeds": rows} for target, rows in found.items()}
    (folder / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
