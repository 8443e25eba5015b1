"""What a library costs: listing many experts, pushing and pulling some, on disk and on a Hub on this machine.

Times are wall and processor seconds of this process; requests, commits and bytes are counted.

Usage: python scripts/benchmarks/library.py [listed experts] [pushed experts]
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mole.adapters import Adapter, LoraWeights
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe
from mole.experts.card import new_card

ROOT = Path(__file__).parents[2]
BACKBONE = BackboneRef("user/tiny-llama", None, "ab" * 32)
TOKEN = "hf_benchmark0123456789"


def main(listed: int, pushed: int) -> None:
    """Prints a line for each case."""
    with tempfile.TemporaryDirectory(prefix="mole-benchmark-") as place:
        print(f"{'case':<58}{'wall s':>9}{'cpu s':>9}  counted")
        listing(Path(place), listed)
        start("mole library list --help", [sys.executable, "-m", "mole", "library", "list", "--help"])
        with loopback_hub(Path(place)) as hub:
            copies(Path(place), hub, pushed)


def listing(place: Path, count: int) -> None:
    """A library of cards alone, listed without and with what was read before."""
    make_cards(place / "many", count)
    cache = place / "cache"

    def read() -> int:
        return len(ExpertLibrary.open(str(place / "many"), cache_dir=cache).cards())

    timed(f"list {count:,} experts on disk, first time", read)
    timed(f"list {count:,} experts on disk, again", read)
    for number in range(10):
        edit(place / "many" / f"expert-{number:05d}", number)
    timed(f"list {count:,} experts on disk, 10 changed", read)


def copies(place: Path, hub: Any, count: int) -> None:
    """Push, list, change and pull; memory of a push beside the size of what is pushed."""
    local = ExpertLibrary.open(str(place / "lib"))
    for number in range(count):
        local.add_expert(make_expert(number), f"expert-{number:03d}")
    size = sum(card.size for card in local.cards().values())
    address, cache = "hf://alice/lib", place / "cache"

    def far() -> ExpertLibrary:
        return ExpertLibrary.open(address, settings=_settings(address), cache_dir=cache)

    def push() -> str:
        before = commits(hub)
        steps = far().copy_from(local, readme=True)
        done = sum(step.action != "equal" for step in steps)
        return f"{done} copied, {commits(hub) - before} commits, {size / 1e6:.0f} MB in the library"

    timed(f"push {count} experts", push, hub)
    timed(f"push {count} experts, unchanged", push, hub)
    timed(f"list {count} experts on the Hub, unchanged", lambda: len(far().cards()), hub)
    for number in range(3):
        local.edit_card(f"expert-{number:03d}", tags=["changed"])
    timed(f"push {count} experts, 3 changed", push, hub)
    timed(f"list {count} experts on the Hub, without a cache", lambda: len(ExpertLibrary.open(address).cards()), hub)
    copy = ExpertLibrary.open(str(place / "copy"))
    timed(f"pull {count} experts", lambda: len(copy.copy_from(far())), hub)
    timed(f"pull {count} experts, unchanged", lambda: len(copy.copy_from(far())), hub)
    tracemalloc.start()
    ExpertLibrary.open(str(place / "second")).copy_from(local)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{f'copy {count} experts on disk':<58}{'':>9}{'':>9}  {peak / 1e6:.1f} MB of {size / 1e6:.0f} MB in memory")


def timed(what: str, work: Callable[[], object], hub: Any = None) -> None:
    """Runs and prints a line: seconds, what the work returned, how many requests it took."""
    if hub is not None:
        hub.requests.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    counted = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    told = "" if hub is None else f", {len(hub.seen())} requests"
    print(f"{what:<58}{wall:>9.2f}{cpu:>9.2f}  {counted}{told}")


def start(what: str, command: list[str]) -> None:
    """The quickest of five runs of a command."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    print(f"{what:<58}{min(times):>9.2f}")


def make_cards(folder: Path, count: int) -> None:
    """A library of `count` cards of about 1.4 KB, written as they are: weights are of no matter to a listing."""
    (folder / ".mole").mkdir(parents=True)
    for number in range(count):
        edit(folder / f"expert-{number:05d}", number, tags=["glue", "en"])


def edit(folder: Path, number: int, **facts: Any) -> None:
    """Write a card into the folder of an expert."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    names = ("adapter_config.json", "adapter_model.safetensors")
    task = f"task-{number}"
    score = {"metric": "accuracy", "value": 0.8, "task": task, "dataset": "glue", "split": "validation"}
    card = new_card(
        {name: {"size": 200_000, "sha256": digest} for name in names},
        BACKBONE,
        adapter={
            "method": "lora",
            "rank": 8,
            "alpha": 16.0,
            "targets": ["q_proj", "v_proj"],
            "full_modules": [],
            "parameters": 294_912,
            "dtype": "float32",
        },
        tasks=[task],
        scores=[{**score, "examples": 408, "higher_is_better": True, "config": None}],
        training={"steps": 500, "seed": 0, "learning_rate": 3e-4},
        **facts,
    )
    folder.mkdir(exist_ok=True)
    (folder / "expert.json").write_bytes(card.to_bytes())


def make_expert(seed: int) -> Expert:
    """An expert of about 200 KB."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((8, 3072), (3072, 8)))
    adapter = Adapter("lora", {"model.layers.0.mlp.up_proj": LoraWeights(A=A, B=B, alpha=16.0)}, targets=("up_proj",))
    return Expert(describe(adapter, BACKBONE, tasks=[f"task-{seed}"], license="mit"), adapter)


@contextmanager
def loopback_hub(place: Path) -> Iterator[Any]:
    """The Hub of the tests, on this machine."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server.server import HubServer
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with HubServer(place / "hub", tokens={TOKEN: ["alice"]}) as hub:
        os.environ.update(hub.environment(TOKEN))
        constants.ENDPOINT = hub.endpoint  # the client has read its environment when it was imported
        constants.HF_HUB_DISABLE_XET = True
        yield hub


def _settings(address: str) -> Any:
    from mole.experts.backends.hub import HubConfig

    return HubConfig(url=address, create=True)


def commits(hub: Any) -> int:
    """How many commits the repository has; 0 before it is made."""
    repo = hub.repo("alice/lib")
    if repo is None:
        return 0
    command = ["git", "rev-list", "--count", "main"]
    return int(subprocess.run(command, cwd=repo.path, capture_output=True, check=True).stdout)


if __name__ == "__main__":
    listed, pushed = [*map(int, sys.argv[1:]), *(10_000, 100)[len(sys.argv) - 1 :]]
    main(listed, pushed)
