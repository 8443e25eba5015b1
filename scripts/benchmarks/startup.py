"""How long the command line takes to answer, beside a bare interpreter: whole processes, interleaved, medians.

Usage: python scripts/benchmarks/startup.py [runs]
"""

import statistics
import subprocess
import sys
import time

CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "mole --help": [sys.executable, "-m", "mole", "--help"],
    "mole --version": [sys.executable, "-m", "mole", "--version"],
    "mole trian-expert": [sys.executable, "-m", "mole", "trian-expert"],
    "mole library list --help": [sys.executable, "-m", "mole", "library", "list", "--help"],
    "mole train-expert --help": [sys.executable, "-m", "mole", "train-expert", "--help"],
    "mole train-expert --cfg job": [sys.executable, "-m", "mole", "train-expert", "--cfg", "job"],
}


def main(runs: int) -> None:
    """Prints the median of each case and what it adds to the bare interpreter."""
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for round_number in range(runs + 1):
        for name, command in CASES.items():
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            if round_number:  # the first round warms the caches
                times[name].append(time.perf_counter() - began)
    bare = statistics.median(times["python -c pass"])
    print(f"{'command':<30}{'median s':>10}{'min s':>8}{'beyond bare python':>20}")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:<30}{median:>10.3f}{min(found):>8.3f}{median - bare:>20.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
