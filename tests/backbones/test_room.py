"""Weights that do not fit are refused before they are read; what they take is counted from the files' headers."""

import pytest
import torch
from safetensors.torch import save_file

from mole import host
from mole.backbones import PretrainedConfig, load, room


@pytest.fixture
def folder(tmp_path):
    tensors = {"a": torch.zeros(100, 50), "b": torch.zeros(30, dtype=torch.bfloat16), "n": torch.zeros(8).int()}
    save_file({"a": tensors["a"]}, tmp_path / "model-1.safetensors")
    save_file({"b": tensors["b"], "n": tensors["n"]}, tmp_path / "model-2.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "bits", "wanted"),
    [
        ("auto", None, 20000 + 60 + 8),
        ("float32", None, 20000 + 120 + 8),
        ("bfloat16", None, 10000 + 60 + 8),
        ("bfloat16", 4, 2500 + 60 + 8),
    ],
)
def test_weights_are_counted_in_the_dtype_that_holds_them(folder, dtype, bits, wanted):
    assert room.weight_bytes(folder, dtype, bits) == wanted


def test_a_damaged_file_counts_as_it_lies_there(folder):
    (folder / "model-1.safetensors").write_bytes(b"x" * 77)
    assert room.weight_bytes(folder, "auto") == 77 + 60 + 8


def test_what_does_not_fit_is_refused_with_what_takes_less(folder, monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 15000)
    with pytest.raises(ValueError, match=r"free on cpu: use backbone.bits=4, backbone.dtype=bfloat16, another device"):
        room.check_room(folder, "float32", torch.device("cpu"))
    room.check_room(folder, "bfloat16", torch.device("cpu"))


def test_what_nearly_fills_the_device_is_told(folder, monkeypatch, caplog):
    monkeypatch.setattr(host, "free_memory", lambda: 21000)
    room.check_room(folder, "auto", torch.device("cpu"))
    assert "little is left to train with" in caplog.text
    caplog.clear()
    monkeypatch.setattr(host, "free_memory", lambda: 40000)
    room.check_room(folder, "auto", torch.device("cpu"))
    monkeypatch.setattr(host, "free_memory", lambda: None)
    room.check_room(folder, "auto", torch.device("cpu"))
    assert not caplog.text


def test_a_backbone_asks_before_it_reads(folder, monkeypatch):
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(host, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="the weights of .* take"):
        load(PretrainedConfig(path=str(folder), device="cpu"))


def test_free_memory_is_the_least_of_machine_and_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(host, "_MEMORY_FILE", tmp_path / "meminfo")
    monkeypatch.setattr(host, "_CONTAINER", tmp_path)
    assert host.free_memory() == 5 * 1024
    for name, text in {"memory.max": "max\n", "memory.current": "10\n", "memory.stat": "inactive_file 3\n"}.items():
        (tmp_path / name).write_text(text)
    assert host.free_memory() == 5 * 1024
    (tmp_path / "memory.max").write_text("1000\n")
    assert host.free_memory() == 1000 - 10 + 3
    (tmp_path / "meminfo").unlink()
    (tmp_path / "memory.max").unlink()
    assert host.free_memory() is None
