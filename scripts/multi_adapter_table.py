"""What scripts/multi_adapter.sh came to: per target the scores, the own expert's weight, and what follows from them.

Usage: python scripts/multi_adapter_table.py <folder of the runs>

A target whose expert does not beat a head alone by two standard deviations over the seeds is inconclusive: neither
passed nor failed. Writes claims.json, table.md and weights.png into the folder.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from mole.figure import INK, colours, headline, new_figure, panel, png
from mole.routing.weights_log import LoggedWeights, read_weights


def score(run: Path) -> float | None:
    """The main score of a finished run on the whole validation set."""
    file = run / "run.json"
    return json.loads(file.read_text())["validation"]["score"] if file.is_file() else None


def weights_of(seed: Path, target: str) -> LoggedWeights:
    """The weights of a target's multi-adapter over its training."""
    return read_weights(seed / "mixtures" / target / "scalings" / "weights.jsonl")


def facts_of(seed: Path, target: str) -> dict[str, Any]:
    """What one seed says of a target."""
    log = weights_of(seed, target)
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
    if head is not None and single[0] - head[0] <= 2 * max(single[1], head[1], 0.01):  # one seed has no spread
        return "inconclusive: the expert does not beat a head alone by 2 sd"
    wrong = []
    if not all(row["largest"] and row["own"] > 0.5 for row in rows):
        wrong.append("own weight")
    if multi[0] < single[0] - max(single[1], 0.02):
        wrong.append("multi below single")
    return f"failed: {', '.join(wrong)}" if wrong else "passed"


def shown(pair: tuple[float, float] | None) -> str:
    return "–" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


def draw(seeds: list[Path], targets: list[str]) -> bytes:
    """A panel for each target: the weight of every branch over the steps, a line for each seed."""
    width, height = 3.1, 2.2
    figure = new_figure(0.8 + len(targets) * (width + 0.35) + 1.4, height + 1.4)
    branches = weights_of(seeds[0], targets[0]).branches
    tints = dict(zip([name for name in branches if name != "base"], colours(len(branches) - 1), strict=True))
    for column, target in enumerate(targets):
        axes = panel(figure, 0.7 + column * (width + 0.35), 0.6, width, height)
        for seed in seeds:
            log = weights_of(seed, target)
            mean = log.values.mean(1)
            for branch, name in enumerate(log.branches):
                look = {"color": tints.get(name, INK), "ls": "--" if name == "base" else "-", "lw": 1.4}
                axes.plot([row.step for row in log.rows], mean[:, branch], label=name, **look)
        axes.set_title(f"target {target}", fontsize=10, color=INK, loc="left")
        axes.set_ylim(0, 1)
        axes.tick_params(labelleft=column == 0)
        axes.set_xlabel("optimizer step", fontsize=9, color=INK)
        if column == 0:
            axes.set_ylabel("weight", fontsize=9, color=INK)
    handles, names = axes.get_legend_handles_labels()
    known = dict(zip(names, handles, strict=True))
    axes.legend(known.values(), known.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    frame = panel(figure, 0.7, 0.85, len(targets) * (width + 0.35), height)
    frame.axis("off")
    headline(frame, "Weights of multi-adapters over training", f"{len(seeds)} seeds, a line for each")
    return png(figure)


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
    (folder / "weights.png").write_bytes(draw(seeds, targets))
    print(table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
