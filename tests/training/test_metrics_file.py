"""metrics.jsonl holds exactly the lines that count, also after a restart and over a full disk."""

import errno
import json

import pytest

from mole.training.metrics import MetricsFile


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_restart_cuts_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.start()
    first.write(step=1)
    kept = first.sync()
    first.write(step=2)
    again = MetricsFile(path)
    again.start(kept)
    assert read(path) == [{"step": 1}]
    again.write(step=2, loss=float("inf"))
    assert read(path) == [{"step": 1}, {"step": 2, "loss": None}]


def test_lines_that_found_no_room_wait_and_come_whole(tmp_path, monkeypatch, caplog):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start()
    metrics.write(step=1)

    def torn() -> None:
        with open(metrics.path, "ab") as file:
            file.write(metrics._waiting[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(metrics, "_append", torn)
        metrics.write(step=2)
        with pytest.raises(OSError, match="No space"):
            metrics.sync()
    assert "its lines wait in memory" in caplog.text
    metrics.write(step=3)
    assert read(metrics.path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_other_processes_write_nothing(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", active=False)
    metrics.start()
    metrics.write(step=1)
    assert metrics.sync() == 0
    assert not metrics.path.exists()
