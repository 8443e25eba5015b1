"""Bad files give one named error that names the culprit, whatever is in them."""

import json
import os
import random
import struct
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save

from mole.untrusted import Damaged, Refused, read_file, safetensors_header, safetensors_tensors, shown


def packed(header, body=b"", *, length=None):
    """A safetensors file of a header (an object, or bytes) and a body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def row(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD = {
    "empty file": b"",
    "short": b"\x01\x00",
    "header beyond the file": packed(b"{}", length=100),
    "header of 2^63": packed(b"{}", length=2**63),
    "header of 0": packed(b"", length=0),
    "header over the cap": packed(b" " * (8 << 20) + b"{}"),
    "not json": packed(b"hello world"),
    "list": packed(b"[1]"),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "zip": b"PK\x03\x04" + bytes(100),
    "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "trailing bytes": packed({"a": row()}, bytes(9)),
    "truncated": packed({"a": row()}, bytes(7)),
    "overlap": packed({"a": row(), "b": row(offsets=(4, 12))}, bytes(12)),
    "alias": packed({"a": row(), "b": row()}, bytes(8)),
    "hole": packed({"a": row(), "b": row(offsets=(12, 20))}, bytes(20)),
    "hole in front": packed({"a": row(offsets=(4, 12))}, bytes(12)),
    "reversed": packed({"a": row(offsets=(8, 0))}, bytes(8)),
    "negative shape": packed({"a": row(shape=(-2,))}, bytes(8)),
    "negative offset": packed({"a": row(offsets=(-8, 0))}, bytes(8)),
    "overflowing shape": packed({"a": row(shape=(2**62, 4))}, bytes(8)),
    "zero dimension": packed({"a": row(shape=(0, 2**60), offsets=(0, 0))}),
    "scalar": packed({"a": row(shape=(), offsets=(0, 4))}, bytes(4)),
    "six dimensions": packed({"a": row(shape=(1, 1, 1, 1, 1, 2))}, bytes(8)),
    "shape against bytes": packed({"a": row(shape=(3,))}, bytes(8)),
    "fractions": packed({"a": row(shape=(2.0,))}, bytes(8)),
    "true as size": packed({"a": row(shape=(True, 2))}, bytes(8)),
    "unknown dtype": packed({"a": row(dtype="F33")}, bytes(8)),
    "int8": packed({"a": row(shape=(8,), dtype="I8")}, bytes(8)),
    "bool": packed({"a": row(shape=(8,), dtype="BOOL")}, bytes(8)),
    "complex": packed({"a": row(shape=(1,), dtype="C64")}, bytes(8)),
    "fp8": packed({"a": row(shape=(8,), dtype="F8_E4M3")}, bytes(8)),
    "dtype no text": packed({"a": row(dtype=["F32"])}, bytes(8)),
    "duplicate names": packed(b'{"a":%b,"a":%b}' % ((json.dumps(row()).encode(),) * 2), bytes(8)),
    "row no object": packed({"a": 3}),
    "row with more": packed({"a": {**row(), "x": 1}}, bytes(8)),
    "metadata no text": packed({"__metadata__": {"a": 1}, "a": row()}, bytes(8)),
    "metadata no object": packed({"__metadata__": "x", "a": row()}, bytes(8)),
    "many tensors": packed({f"t{n}": row(offsets=(8 * n, 8 * n + 8)) for n in range(20_001)}, bytes(8 * 20_001)),
    "climbing name": packed({"../../etc/passwd": row()}, bytes(8)),
    "line break in a name": packed({"a\nb": row()}, bytes(8)),
    "escape in a name": packed({"a\x1b[31m": row()}, bytes(8)),
    "deep": packed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "nan": packed({"a": row()}, struct.pack("<2f", 1.0, float("nan"))),
    "infinity": packed({"a": row()}, struct.pack("<2f", 1.0, float("-inf"))),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_safetensors_file_is_a_named_error(name):
    with pytest.raises((Damaged, Refused), match=r"^lib/x/w\.safetensors: ") as caught:
        safetensors_tensors(BAD[name], "lib/x/w.safetensors")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_a_good_file_is_read_bit_for_bit_in_the_order_of_names():
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(4).bfloat16(), "c": torch.randn(1, 1, 2, 1).half()}
    read = safetensors_tensors(save(tensors, metadata={"format": "pt"}), "x")
    assert list(read) == ["a", "b", "c"]
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_every_flipped_or_cut_byte_of_a_header_gives_a_named_error_or_a_valid_file():
    data = save({"a": torch.ones(2, 3), "b": torch.ones(4)})
    chance = random.Random(0)
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        broken = broken[: chance.choice([len(broken), chance.randrange(len(broken))])]
        try:
            safetensors_header(bytes(broken), "x")
        except (Damaged, Refused):
            continue
        with suppress(Damaged):  # the header holds; a value may not be finite any more
            safetensors_tensors(bytes(broken), "x")


def test_a_file_that_is_no_regular_file_is_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        with pytest.raises(Refused, match=name):
            read_file(tmp_path / name, 10)


def test_links_are_refused_where_only_own_files_are_taken(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "soft").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "soft", 10) == b"x"
    with pytest.raises(Refused, match="symbolic link"):
        read_file(tmp_path / "soft", 10, follow=False)
    os.link(tmp_path / "file", tmp_path / "hard")
    with pytest.raises(Refused, match="2 hard links"):
        read_file(tmp_path / "hard", 10, follow=False)


def test_a_sparse_file_of_64_gib_is_refused_unread(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(64 << 30)
    with pytest.raises(Refused, match="68,719,476,736 bytes"):
        read_file(tmp_path / "huge", 4 << 30)


def test_text_of_unknown_origin_is_shown_escaped_and_cut():
    assert shown("a\x1b[31m\u202e") == "'a\\x1b[31m\\u202e'"
    assert len(shown("x" * 1000)) == 80
