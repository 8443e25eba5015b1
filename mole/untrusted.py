"""Read files that others made: strict JSON, checked safetensors, and the errors that tell what is wrong with them.

Nothing here needs torch until tensors are asked for. What was checked is what is used: a file is read once into memory,
and those bytes are hashed, checked and parsed.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_WEIGHTS_BYTES = 4 << 30
MAX_TENSORS = 20_000
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
# Formats that can run a program, or that hide what they hold.
PICKLES = {
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".p", ".joblib", ".npy", ".py", ".so", ".dll"),
    *(".zip", ".tar", ".gz", ".h5", ".gguf"),
}

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}", re.ASCII)


class LibraryError(ValueError):
    """Something about an expert or a library that its user can understand and act on."""


class Damaged(LibraryError):
    """A file is not what it should be: cut, changed, or malformed."""


class Refused(LibraryError):
    """A file might be well formed, but is unsafe or not supported, and is not used."""


def shown(text: object, limit: int = 80) -> str:
    """Text of unknown origin for a message: escaped, and cut at `limit` characters."""
    line = ascii(text)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def read_file(path: str | Path, max_bytes: int, *, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most `max_bytes`.

    `follow=False` also refuses symbolic links and files with several hard links. Raises FileNotFoundError, Refused
    (not a regular file, or too large) or Damaged (it shrank while it was read).
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not follow and os.path.islink(path):
        raise Refused(f"{path} is a symbolic link; only regular files are taken")
    try:
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise Refused(f"{path} is not a regular file")
    with open(descriptor, "rb") as file:
        if not follow and facts.st_nlink != 1:
            raise Refused(f"{path} has {facts.st_nlink} hard links; only files of their own are taken")
        if facts.st_size > max_bytes:
            raise Refused(f"{path} has {facts.st_size:,} bytes; at most {max_bytes:,} are taken")
        data = file.read(facts.st_size + 1)
    if len(data) != facts.st_size:
        raise Damaged(f"{path} changed while it was read")
    return data


def strict_json(data: bytes, what: str, *, max_bytes: int = MAX_JSON_BYTES, max_depth: int = 8) -> Any:
    """The value of JSON text: UTF-8 without a byte order mark, no duplicate key, integers below 2^63, finite numbers.

    Raises Damaged, naming `what`.
    """
    if len(data) > max_bytes:
        raise Damaged(f"{what}: {len(data):,} bytes of JSON; at most {max_bytes:,} are taken")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
        _check_depth(value, max_depth)
    except RecursionError:
        raise Damaged(f"{what}: JSON nested too deeply") from None
    except ValueError as error:
        raise Damaged(f"{what}: not valid JSON: {shown(str(error), 160)[1:-1]}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {shown(next(n for n in names if names.count(n) > 1))} appears twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(text, 30)} is too large")
    return number


def _check_depth(value: Any, left: int) -> None:
    kind = type(value)
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError("an integer beyond 64 bits")
    if kind is dict or kind is list:
        if left == 0:
            raise ValueError("nested too deeply")
        for child in value.values() if kind is dict else value:
            if type(child) is not str:
                _check_depth(child, left - 1)


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a safetensors header; its bytes are `data[begin:end]` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_header(
    data: bytes, what: str, *, dtypes: Mapping[str, int] = FLOATS, also: str = ""
) -> tuple[dict[str, TensorRow], dict[str, str]]:
    """The rows and the metadata of a safetensors file, checked beyond what its own parser checks.

    No duplicate name, at most 20,000 tensors, only `dtypes` (name → bytes), at most four dimensions and none of them
    zero, offsets that cover the file without hole or overlap. `also` are characters that names may have beside letters,
    digits, '_', '.', '-'. Raises Damaged or Refused, naming `what`.
    """
    if len(data) < 8:
        raise Damaged(f"{what}: not a safetensors file ({len(data)} bytes)")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or length > len(data) - 8 or length < 2:
        raise Damaged(f"{what}: not a safetensors file, or a damaged one (header of {length:,} bytes)")
    header = strict_json(data[8 : 8 + length], f"{what}: header", max_bytes=MAX_HEADER_BYTES, max_depth=3)
    if not isinstance(header, dict):
        raise Damaged(f"{what}: the header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged(f"{what}: the metadata are not strings")
    if len(header) > MAX_TENSORS:
        raise Refused(f"{what}: {len(header):,} tensors; at most {MAX_TENSORS:,} are taken")
    rows = {name: _row(name, row, what, dtypes, also) for name, row in header.items()}
    place = 0
    for name, row in sorted(rows.items(), key=lambda item: (item[1].begin, item[1].end)):
        if row.begin != place:
            raise Damaged(f"{what}: tensor {shown(name)} leaves a hole or overlaps another")
        place = row.end
    if place != len(data) - 8 - length:
        raise Damaged(f"{what}: {len(data) - 8 - length:,} bytes of tensors, where its header tells of {place:,}")
    return rows, metadata


def _row(name: str, row: Any, what: str, dtypes: Mapping[str, int], also: str) -> TensorRow:
    where = f"{what}: tensor {shown(name)}"
    if not _TENSOR_NAME.fullmatch(name.translate(dict.fromkeys(map(ord, also), "_"))):
        raise Refused(f"{where}: the name has other characters than letters, digits, '_', '.', '-'")
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"{where}: its row in the header is malformed")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise Refused(f"{where} has dtype {shown(dtype)}; known: {', '.join(dtypes)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise Damaged(f"{where}: its shape or its place is malformed")
    if not 1 <= len(shape) <= 5 or 0 in shape:
        raise Refused(f"{where} has shape {shown(shape)}; wanted are one to five dimensions, none of them zero")
    if math.prod(shape) * dtypes[dtype] != offsets[1] - offsets[0]:
        raise Damaged(f"{where}: its shape does not fit its bytes")
    return TensorRow(dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def safetensors_tensors(
    data: bytes, what: str, *, dtypes: Mapping[str, int] = FLOATS, also: str = ""
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name and in the order of names; header and values are checked.

    Raises Damaged or Refused as `safetensors_header` does, and Damaged for a value that is not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    safetensors_header(data, what, dtypes=dtypes, also=also)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise Damaged(f"{what}: {shown(str(error), 160)}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise Damaged(f"{what}: tensor {shown(name)} has values that are not finite (NaN or infinity)")
    return dict(sorted(tensors.items()))


def refuse_pickles(names: Collection[str], where: str) -> None:
    """Raise Refused if a file's name is that of a format that can run a program or hides what it holds."""
    for name in sorted(names):
        if Path(name).suffix.lower() in PICKLES:
            raise Refused(
                f"{where}: {shown(name)} is of a kind that can run a program or hides what it holds; "
                "an expert's weights are read from safetensors only"
            )
