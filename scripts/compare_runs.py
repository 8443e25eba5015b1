"""Validation losses of two runs at the end of training, side by side, and where the second's tokens went by task.

Usage: python scripts/compare_runs.py <run> <run>
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np

from mole.routing.log_files import load_routing_log


def losses(run: Path) -> dict[str, float]:
    """Name → loss of the weights that the run kept."""
    metrics = json.loads((run / "run.json").read_text(encoding="utf-8"))["result"]["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("validation_loss")}


def loads_by_task(run: Path) -> dict[str, np.ndarray]:
    """Task → share of its tokens that each expert of each layer got [L, E], in the logged evaluation."""
    log = load_routing_log(run / "scalings")
    found: dict[str, np.ndarray] = {}
    for entry in (entry for entry in log.entries if entry.phase == "eval"):
        for row, task in enumerate(entry.task_names or ()):
            counts = (entry.weights[row][entry.mask[row]] != 0).sum(0)
            found[task] = found.get(task, 0) + counts
    return {task: counts / counts.sum(1, keepdims=True) for task, counts in found.items()}


def main() -> None:
    runs = [Path(word) for word in sys.argv[1:]]
    if len(runs) != 2:
        sys.exit(__doc__)
    first, second = (losses(run) for run in runs)
    start = json.loads((runs[1] / "run.json").read_text(encoding="utf-8"))["dense_loss"]
    print(f"{'nats per token':<34}{'untrained':>12}{runs[0].name:>12}{runs[1].name:>12}")
    for name in first:
        print(f"{name:<34}{start.get(name, float('nan')):>12.4f}{first[name]:>12.4f}{second[name]:>12.4f}")
    shares = loads_by_task(runs[1])
    for one, other in itertools.combinations(shares, 2):
        distance = 0.5 * np.abs(shares[one] - shares[other]).sum(1)
        print(f"distance of the loads of {one} and {other}, by layer: {', '.join(f'{d:.2f}' for d in distance)}")
    if shares:
        mean = np.mean(list(shares.values()), axis=0)
        dead = int((mean < 0.01 / mean.shape[1]).sum())
        print(f"experts with less than a hundredth of their even share: {dead} of {mean.size}")


if __name__ == "__main__":
    main()
