"""Whether the weights of a folder fit into what is free, asked before they are read."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mole import host

logger = logging.getLogger(__name__)
HELD = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def weight_bytes(folder: Path, dtype: str, bits: int | None = None) -> int:
    """What the weights in `folder` take in `dtype` (auto: as they are), packed to `bits` where they are matrices.

    Counted from the headers of the files; none of the numbers is read. A damaged file counts as it lies on disk.
    """
    total = 0.0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 it is no dict
                    part = tensors.get_slice(name)
                    shape, kind = part.get_shape(), part.get_dtype()
                    held = HELD.get(kind, 1) if dtype == "auto" or kind not in HELD else getattr(torch, dtype).itemsize
                    total += torch.Size(shape).numel() * (bits / 8 if bits and len(shape) == 2 else held)
        except SafetensorError:
            total += file.stat().st_size
    return int(total)


def free_bytes(device: torch.device) -> int | None:
    """What is free on a device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host.free_memory() if device.type == "cpu" else None


def check_room(folder: Path, dtype: str, device: torch.device, bits: int | None = None) -> None:
    """Raises ValueError if the weights do not fit on the device; warns if they would leave less than a tenth free."""
    free = free_bytes(device)
    if free is None:
        return
    wanted = weight_bytes(folder, dtype, bits)
    facts = (
        f"the weights of {folder.name} take {wanted / 2**30:.2f} GiB in {dtype}, and {free / 2**30:.2f} GiB are free"
    )
    if wanted > free:
        less = [] if bits == 4 else ["backbone.bits=4"]
        less += ["backbone.dtype=bfloat16"] if dtype in ("auto", "float32") else []
        raise ValueError(f"{facts} on {device}: use {', '.join([*less, 'another device or a smaller backbone'])}")
    if wanted > 0.9 * free:
        logger.warning("%s on %s: little is left to train with", facts, device)
