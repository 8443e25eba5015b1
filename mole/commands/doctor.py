"""`mole doctor`: is this machine fit for mole, why did this run stop and can it go on, what is wrong with experts?"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from mole import host
from mole.commands.expert_checks import Finding, examine_experts
from mole.registry import config_dataclass
from mole.run_folder import RunFolder

EXTRAS = {
    "plot": ("matplotlib",),
    "data": ("datasets",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "quantised": ("bitsandbytes",),
}
_LITTLE_DISK = 2**30  # bytes


@config_dataclass
class Doctor:
    """A run, or experts, to look at; nothing: the machine."""

    places: tuple[str, ...] = ()
    target: Literal["peft", "vllm", "lorax", "llamacpp", "mistralrs"] | None = None
    format: Literal["table", "json"] = "table"

    def __post_init__(self) -> None:
        if self.target is not None and not self.places:
            raise ValueError("target says what experts are for: name them, mole doctor <expert or library> target=…")


def run(config: Doctor) -> int:
    """Prints what was found and returns 1 if anything is wrong, 0 otherwise. Raises ValueError if there is no run."""
    findings = list(_findings(config))
    if config.format == "json":
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        width = max(len(finding.about) for finding in findings) + 2
        for finding in findings:
            print(f"{finding.state:<7}{finding.about:<{width}}{finding.text}")
    return int(any(finding.state == "wrong" for finding in findings))


def _findings(config: Doctor) -> Iterator[Finding]:
    if not config.places:
        return examine_machine()
    one = RunFolder(config.places[0]) if len(config.places) == 1 and config.target is None else None
    if one is not None and "://" not in config.places[0] and not _holds_experts(one.path):
        return examine_run(one)
    return examine_experts(config.places, config.target)


def _holds_experts(path: Path) -> bool:
    """Whether a path is an expert or a library, and no run."""
    if (path / "config.yaml").is_file():
        return False
    known = ("expert.json", "adapter_config.json", "mole_adapter.json", ".mole")
    return any((path / name).exists() for name in known) or (path.parent / ".mole").is_dir()


def examine_machine() -> Iterator[Finding]:
    """Versions, devices, memory, disk, optional packages, and files of other tools that do not act here."""
    for package, version in host.versions().items():
        yield Finding(package, "ok" if version else "wrong", version or "not installed: install mole-experts again")
    yield from _devices()
    yield _memory()
    yield from _places()
    for extra, modules in EXTRAS.items():
        absent = [module for module in modules if not host.is_installed(module)]
        text = f"absent: {', '.join(absent)}; pip install 'mole-experts[{extra}]'" if absent else "installed"
        yield Finding(f"extra {extra}", "note" if absent else "ok", text)
    yield from _strangers()


def examine_run(run: RunFolder) -> Iterator[Finding]:
    """How a run stands: its status, its checkpoints, its error, its expert, and what to do next."""
    if not run.config.is_file():
        raise ValueError(f"{run.path} is no run: it has no {run.config.name}")
    facts = run.facts()
    status = facts.get("status", "unknown")
    yield Finding("status", "ok" if status == "finished" else "wrong" if status == "failed" else "note", status)
    versions = facts.get("versions", {})
    changed = {k: v for k, v in host.versions().items() if versions.get(k) not in (None, v)}
    if changed:
        text = ", ".join(f"{k} {versions[k]}, now {v}" for k, v in changed.items())
        yield Finding("versions", "note", f"differ from those of the run: {text}")
    whole = run.complete_checkpoints()
    torn = [f.name for f in run.checkpoints.glob("step-*") if f not in whole] if run.checkpoints.is_dir() else []
    if torn:
        yield Finding("checkpoints", "note", f"incomplete, passed over: {', '.join(sorted(torn))}")
    if whole:
        yield Finding("checkpoints", "ok", ", ".join(folder.name for folder in whole))
    if run.error.is_file():
        last = [line for line in run.error.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        yield Finding("error", "wrong" if status == "failed" else "note", "".join(last) + f"   ({run.error})")
    for folder in (run.expert, run.expert.with_name("expert.rejected")):
        if folder.is_dir():
            yield from (replace(found, about=folder.name) for found in examine_experts([str(folder)]))
    yield Finding("next", "ok", _next(run, facts, bool(whole)))


def _next(run: RunFolder, facts: dict, can_resume: bool) -> str:
    command = facts.get("command", "<command>")
    if facts.get("status") == "finished":
        return f"nothing to do; again: mole {command} --from {run.path}"
    if can_resume:
        return f"continue: mole {command} --resume {run.path}"
    return f"no complete checkpoint: start it again with mole {command} --resume {run.path}"


def _devices() -> Iterator[Finding]:
    import torch

    threads = f"{host.available_processors()} processors, {torch.get_num_threads()} threads of torch"
    yield Finding("cpu", "ok", f"{threads}; fp32, bf16")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        types = "fp32, fp16, bf16" if torch.cuda.is_bf16_supported() else "fp32, fp16"
        text = f"{torch.cuda.get_device_name(index)}, {_size(free)} of {_size(total)} free; {types}"
        yield Finding(f"cuda:{index}", "ok", text)
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU; fp32, fp16")


def _memory() -> Finding:
    total, free = host.total_memory(), host.free_memory()
    parts = [f"{_size(total)}" if total else "unknown", f"{_size(free)} free" if free is not None else ""]
    return Finding("memory", "ok", ", ".join(part for part in parts if part))


def _places() -> Iterator[Finding]:
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            yield Finding(name, "wrong", f"{folder} cannot be written; choose another place with run.folder=…")
        else:
            yield Finding(name, "note" if free < _LITTLE_DISK else "ok", f"{_size(free)} free in {folder}")


def _strangers() -> Iterator[Finding]:
    """Settings of accelerate that users expect to act."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "accelerate"
    for file in (cache / "default_config.yaml", cache / "default_config.yml", cache / "default_config.json"):
        if file.is_file():
            yield Finding("accelerate", "note", f"{file} is not read: mole takes everything from its own YAML")
    set_here = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")))
    if set_here:
        yield Finding("environment", "note", f"set for accelerate: {', '.join(set_here)}")
    if sys.flags.optimize:
        yield Finding("python", "note", "-O is set: assertions are off")


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
