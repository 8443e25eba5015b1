"""Compares evaluations to the last digit, and says how much of the way from backbone to oracle a mixture goes.

Usage: python scripts/same_figures.py <evaluation> <evaluation>…
    folders with evaluation.json; the first has all rows
"""

import json
import sys
from pathlib import Path


def rows_of(folder: str) -> dict[str, dict[str, float]]:
    return json.loads((Path(folder) / "evaluation.json").read_text(encoding="utf-8"))["rows"]


def main() -> int:
    first, *others = sys.argv[1:]
    rows = rows_of(first)
    different = [
        f"{folder}: {row} on {task} is {value!r}, {first} has {rows[row][task]!r}"
        for folder in others
        for row, tasks in rows_of(folder).items()
        for task, value in tasks.items()
        if rows[row][task] != value
    ]
    print("\n".join(different) or f"the same figures in {', '.join(others)}")
    base, oracle, mixture = (sum(rows[row].values()) / len(rows[row]) for row in ("base", "oracle", "mixture"))
    print(f"means: base {base:.3f}, oracle {oracle:.3f}, mixture {mixture:.3f}")
    print(f"the mixture closes {(base - mixture) / (base - oracle):.1%} of the gap")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
