"""Xet for the test Hub: `hf_xet`'s own `local://` store stands in for the remote one.

The client chunks and deduplicates a file into the store, and then commits nothing but the file's
sha256. To serve that file, the server looks the digest up in the shards the client left (the
layout is that of xet-core's "MDB shard" files), and has `hf_xet` put the file together again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_HEADER = 48  # the shard's own header; every record after it has this size as well
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30
_END = b"\xff" * 32


class XetFile(NamedTuple):
    """A file the store knows: its Xet hash, its size, and its sha256 where the client gave one."""

    xet_hash: str
    size: int
    sha256: str | None


def _hex(raw: bytes) -> str:
    """Xet prints a 32-byte hash as four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def files_of(shard: bytes) -> Iterator[XetFile]:
    """Read the file records of one shard."""
    at = _HEADER
    while (raw := shard[at : at + 32]) and raw != _END:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += _HEADER
        size = sum(struct.unpack_from("<I", shard, at + n * _HEADER + 36)[0] for n in range(count))
        at += count * _HEADER * (2 if flags & _HAS_VERIFICATION else 1)
        sha256 = None
        if flags & _HAS_SHA256:
            sha256 = _hex(shard[at : at + 32])
            at += _HEADER
        yield XetFile(_hex(raw), size, sha256)


def find(store: Path, sha256: str) -> XetFile | None:
    """Find a file by its sha256."""
    for path in store.rglob("shards/*.mdb"):
        for file in files_of(path.read_bytes()):
            if file.sha256 == sha256:
                return file
    return None


def materialise(store: Path, file: XetFile, target: Path) -> None:
    """Write a file's content to `target`."""
    import hf_xet

    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{store}") as group:
        group.start_download_file(hf_xet.XetFileInfo(file.xet_hash, file.size), str(target))
