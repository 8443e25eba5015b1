"""Where experts and checkpoints lie: folders and the Hub; and the PEFT folder of an expert, read once and hashed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from mole.adapters import Adapter, peft_format
from mole.experts.card import bytes_facts, digest_of
from mole.untrusted import (
    MAX_WEIGHTS_BYTES,
    Damaged,
    Refused,
    read_file,
    safetensors_header,
    safetensors_tensors,
    shown,
)

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What PEFT's filter ("lora_" and the adapter's name in a key) lets into the folder of an expert of the original X-LoRA:
# tensors of the router, and those of other experts, if experts are numbered. PEFT's own X-LoRA puts its whole
# `lora_model` there.
_FOREIGN = re.compile(
    r"(?:.*\.)?internal_xlora_classifier\..*|base_model\.lora_model\..*|.*\.lora_(?:embedding_)?(?:A|B|magnitude_vector)\.\d+(?:\.(?:weight|bias))?"
)
_HOW = (
    "mole reads safetensors only, as a pickle can run any program that its author put inside. If you trust the file, "
    "convert it yourself, in a container without network: python scripts/pickle_to_safetensors.py"
)


@dataclass(frozen=True)
class ReadExpert:
    """An expert as it was read: `source` is where, `sha256` the digest over its two files; both None if made here.

    `adapter` is None where the model holds the very tensors; `changed` once it may have been trained.
    """

    adapter: Adapter | None
    source: str | None = None
    sha256: str | None = None
    changed: bool = False


def refuse_pickle(path: Path) -> Refused:
    """The error for weights that are there only as a pickle."""
    return Refused(f"{path} is a pickle. {_HOW} {path.name} <folder>")


def pickles_in(folder: Path, stems: Iterable[str]) -> list[Path]:
    """Pickled files of these names that are in `folder`."""
    return [folder / f"{stem}{end}" for stem in stems for end in _PICKLES if (folder / f"{stem}{end}").is_file()]


def read_expert(folder: Path, source: str) -> ReadExpert:
    """The LoRA expert in a PEFT folder.

    Raises ValueError if there is none, Damaged or Refused for what is not one; a pickle is refused.
    """
    found = find_expert(folder, source)
    if found is not None:
        return found
    if not (folder / peft_format.CONFIG).is_file():
        raise ValueError(f"no expert in {folder}: it has no {peft_format.CONFIG}")
    if not (folder / peft_format.WEIGHTS).is_file():
        raise ValueError(f"no expert in {folder}: it has no {peft_format.WEIGHTS}")
    raise Damaged(
        f"{folder / peft_format.WEIGHTS}: expected LoRA tensors of an expert, found none (PEFT's X-LoRA writes router "
        "tensors into such folders); name the expert's own folder with adapters={name: path}"
    )


def find_expert(folder: Path, source: str) -> ReadExpert | None:
    """As `read_expert`, but None for a folder without files of an expert, or with tensors that are no LoRA at all."""
    weights = folder / peft_format.WEIGHTS
    if not weights.is_file():
        for pickle in pickles_in(folder, ["adapter_model"]):
            raise refuse_pickle(pickle)
    if not (folder / peft_format.CONFIG).is_file() or not weights.is_file():
        return None
    data = read_file(weights, MAX_WEIGHTS_BYTES)
    names = list(safetensors_header(data, str(weights))[0])
    own = [name for name in names if not _FOREIGN.fullmatch(name)]
    if not any(".lora_" in name for name in own):
        return None
    config = read_file(folder / peft_format.CONFIG, peft_format.MAX_CONFIG_BYTES)
    mine = data if len(own) == len(names) else _only(data, own, str(weights))
    return ReadExpert(peft_format.parse(config, mine, str(folder)).adapter, source, digest(config, data))


def _only(data: bytes, names: Iterable[str], what: str) -> bytes:
    """The safetensors file with these of its tensors."""
    tensors = safetensors_tensors(data, what)
    return save({name: tensors[name] for name in names}, metadata={"format": "pt"})


def digest(config: bytes, weights: bytes) -> str:
    """The digest of an expert: over the sha256 of its two files."""
    files = {peft_format.CONFIG: config, peft_format.WEIGHTS: weights}
    return digest_of({name: bytes_facts(data)["sha256"] for name, data in files.items()})


def as_place(value: Any) -> tuple[str, str | None]:
    """(folder or Hub id, sub-folder) of what a config's `adapters` says."""
    if isinstance(value, tuple | list):
        return str(value[0]), str(value[1])
    return os.fspath(value), None


def expert_folder(place: Any, *, local_files_only: bool, where: str) -> Path:
    """The folder of an expert at `place`, fetched from the Hub if it is no folder here. Raises ValueError."""
    text, subfolder = as_place(place)
    local = Path(text).expanduser()
    if subfolder is not None and (local / subfolder).is_dir():
        return local / subfolder
    if subfolder is None and local.is_dir():
        return local
    repo, inside = _hub(text, subfolder, where)
    prefix = f"{inside}/" if inside else ""
    names = [f"{prefix}{name}" for name in (peft_format.CONFIG, peft_format.WEIGHTS)]
    return _fetch(repo, names, local_files_only, where) / inside


def checkpoint_folder(place: str | os.PathLike[str], *, local_files_only: bool) -> Path:
    """The folder of an X-LoRA checkpoint, fetched from the Hub (JSON and safetensors only) if it is no folder here."""
    local = Path(place).expanduser()
    if local.is_dir():
        return local
    repo, inside = _hub(os.fspath(place), None, "X-LoRA checkpoint")
    prefix = f"{inside}/" if inside else ""
    return _fetch(repo, [f"{prefix}**.json", f"{prefix}**.safetensors"], local_files_only, "X-LoRA checkpoint") / inside


def _hub(text: str, subfolder: str | None, where: str) -> tuple[str, str]:
    """(Hub id, sub-folder) in `org/repo/sub/folder`; ValueError for what is neither that nor a folder here."""
    parts = [part for part in text.split("/") if part]
    good = len(parts) >= 2 and not text.startswith(("/", ".", "~")) and "\\" not in text
    inside = [*parts[2:], *(part for part in (subfolder or "").split("/") if part)]
    if not good or any(part in (".", "..") for part in [*parts, *inside]):
        raise ValueError(f"{where}: {shown(text)} is no folder here, and no Hub id such as org/repo/sub/folder")
    return "/".join(parts[:2]), "/".join(inside)


def _fetch(repo: str, patterns: list[str], local_files_only: bool, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local_files_only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{where}: {repo} is no folder here and cannot be had from the Hub: {first}") from None
