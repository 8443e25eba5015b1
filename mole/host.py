"""Facts of the machine and the code that a run happened on, for run.json and `mole doctor`; no names, no secrets."""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import mole

_MEMORY_FILE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "numpy",
)


def versions() -> dict[str, str | None]:
    """Versions of mole, python and the main packages; None for one that is not installed. Imports none of them."""
    found: dict[str, str | None] = {"mole": mole.__version__, "python": platform.python_version()}
    return found | {name: version(name) for name in PACKAGES}


def version(package: str) -> str | None:
    """The installed version of a distribution, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of mole's source tree, with `+changes` behind it if files differ; None if it is no checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def facts() -> dict[str, Any]:
    """System, processors, memory in bytes, and GPUs if torch is loaded already."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "processors": available_processors(),
        "memory": total_memory(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def available_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> int | None:
    """Bytes of main memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take, None where the system does not say.

    The least of what the machine has and what a container allows.
    """
    found = []
    if _MEMORY_FILE.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY_FILE.read_text().splitlines() if ":" in line)
        found += [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    try:
        most, now = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        found.append(max(0, most - now + int(lines.get("inactive_file", 0))))  # cached files make room when asked
    except (OSError, ValueError):
        pass  # no container, or one without a bound
    return min(found, default=None)


def peak_memory() -> dict[str, int]:
    """Most bytes in use so far: of this process and of its finished children, and on each GPU that torch has used."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"gpu_{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())}
    return found


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _git(root: Path, *words: str) -> str:
    call = ["git", "-C", str(root), *words]
    return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
