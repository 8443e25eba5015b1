"""The log of learned weights: which steps it keeps, what a kill or a resume leaves of it, what it refuses."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mole.routing import weights_log
from mole.routing.weights_log import WeightsLog, read_weights

BRANCHES = ("rte", "mrpc", "base")
SITES = ("layer.0.attention.output", "layer.0.output", "layer.1.output")
SETS = {"set_00": (0, 1), "set_01": (2,)}


def weights(step):
    first = 0.25 + step / 100
    return {
        "set_00": {"rte": first, "mrpc": 0.5 - first / 2, "base": 0.5 - first / 2},
        "set_01": {"rte": 1.0, "mrpc": 0.0, "base": 0.0},
    }


def a_log(path, **more):
    return WeightsLog(path / "weights.jsonl", **{"branches": BRANCHES, "sites": SITES, "sets": SETS, **more})


def seen(log, steps, last=None):
    for step in steps:
        log.see(step, step / 8, weights(step), last=step == last)
    return log


def steps(path):
    return [row.step for row in read_weights(path / "weights.jsonl").rows]


def text(path):
    return (path / "weights.jsonl").read_bytes()


# ---- what is written
def test_the_file_has_the_names_and_then_the_weights_of_each_logged_step(tmp_path):
    seen(a_log(tmp_path, mode="softmax", every=2), range(4))
    header, *rows = map(json.loads, text(tmp_path).decode().splitlines())
    assert header == {
        "format": 1,
        "mode": "softmax",
        "branches": ["rte", "mrpc", "base"],
        "sites": list(SITES),
        "set_of_site": {SITES[0]: "set_00", SITES[1]: "set_00", SITES[2]: "set_01"},
    }
    assert rows == [{"step": s, "epoch": s / 8, "weights": weights(s)} for s in (0, 2)]


@pytest.mark.parametrize(("every", "kept"), [(None, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])])
def test_step_0_each_multiple_and_the_last_are_kept(every, kept, tmp_path):
    seen(a_log(tmp_path, every=every), range(6), last=5)
    assert steps(tmp_path) == kept


def test_a_run_that_ended_early_keeps_its_last_step_once_it_is_said_to_have_ended(tmp_path):
    log = seen(a_log(tmp_path, every=4), range(7))
    assert steps(tmp_path) == [0, 4]
    log.finish()
    log.finish()
    found = read_weights(tmp_path / "weights.jsonl")
    assert steps(tmp_path) == [0, 4, 6]
    assert found.rows[-1].weights == weights(6)


def test_a_step_is_not_written_twice_and_none_goes_back(tmp_path):
    log = seen(a_log(tmp_path), [0, 1, 1, 2, 2])
    assert steps(tmp_path) == [0, 1, 2]
    with pytest.raises(ValueError, match="step 1 after step 2"):
        log.see(1, 0.0, weights(1))


def test_every_line_is_there_at_once_for_others_to_read(tmp_path):
    log = a_log(tmp_path)
    for step in range(3):
        log.see(step, 0.0, weights(step))
        assert text(tmp_path).endswith(b"\n")
        assert steps(tmp_path) == list(range(step + 1))


def test_what_is_read_is_what_was_logged(tmp_path):
    exact = float(np.float32(1) / np.float32(3))
    log = a_log(tmp_path)
    log.see(0, 0.0, {one: dict.fromkeys(BRANCHES, exact) for one in SETS})
    log.see(1, 0.5, {one: {**dict.fromkeys(BRANCHES, 0.5), "base": math.nan} for one in SETS})
    found = read_weights(tmp_path / "weights.jsonl")
    assert (found.branches, found.sites, found.sets, found.mode) == (BRANCHES, SITES, ("set_00", "set_01"), None)
    assert found.values.shape == (2, 2, 3)
    assert np.float32(found.values[0, 0, 0]) == np.float32(exact)
    assert math.isnan(found.values[1, 1, 2])
    assert [row.epoch for row in found.rows] == [0.0, 0.5]
    assert b"NaN" not in text(tmp_path)


def test_names_with_line_separators_are_names(tmp_path):
    names = ("a\u2028b", "日本", 'q"')
    log = WeightsLog(tmp_path / "weights.jsonl", branches=names, sites=["s"], sets={"set_00": [0]})
    log.see(0, 0.0, {"set_00": dict.fromkeys(names, 1.0)})
    assert read_weights(tmp_path / "weights.jsonl").branches == names


# ---- kill and resume
def test_a_resumed_log_is_the_log_of_a_run_that_never_stopped(tmp_path):
    seen(a_log(tmp_path / "whole", every=2), range(11), last=10)
    seen(a_log(tmp_path / "again", every=2), range(8))
    seen(a_log(tmp_path / "again", every=2, resume=True), range(5, 11), last=10)
    assert text(tmp_path / "again") == text(tmp_path / "whole")


def test_the_restored_step_is_not_written_again(tmp_path):
    seen(a_log(tmp_path), range(5))
    seen(a_log(tmp_path, resume=True), [3, 4])
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_start_takes_away_what_is_done_again(tmp_path):
    seen(a_log(tmp_path), range(5))
    a_log(tmp_path, resume=True).start(2)
    assert steps(tmp_path) == [0, 1, 2]
    a_log(tmp_path).start()
    assert steps(tmp_path) == []


def test_a_resume_where_nothing_was_logged_begins_the_log(tmp_path):
    seen(a_log(tmp_path, resume=True), [0, 1])
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_torn_last_line_is_left_out_and_repaired_on_resume(cut, tmp_path):
    seen(a_log(tmp_path / "whole"), range(5))
    seen(a_log(tmp_path), range(4))
    (tmp_path / "weights.jsonl").write_bytes(text(tmp_path)[:-cut])
    assert steps(tmp_path) == ([0, 1, 2, 3] if cut == 1 else [0, 1, 2])  # the end of a line alone is no loss
    seen(a_log(tmp_path, resume=True), [3, 4])
    assert text(tmp_path) == text(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"branches": ("rte", "sst2", "base")}, "other branches"),
        ({"sites": (*SITES[:2], "layer.9.output")}, "other sites, set_of_site"),
        ({"sets": {"set_00": (0,), "set_01": (1, 2)}}, "other set_of_site"),
        ({"mode": "sigmoid"}, "other mode"),
    ],
)
def test_a_run_does_not_go_on_with_a_log_of_other_names(change, told, tmp_path):
    seen(a_log(tmp_path), range(3))
    before = text(tmp_path)
    with pytest.raises(ValueError, match=rf"weights\.jsonl: a log with {told} than"):
        a_log(tmp_path, resume=True, **change).start(2)
    assert text(tmp_path) == before


def test_a_killed_process_leaves_whole_lines(tmp_path):
    script = textwrap.dedent(f"""
        import itertools
        from mole.routing.weights_log import WeightsLog
        log = WeightsLog({str(tmp_path / "weights.jsonl")!r}, branches=["a"], sites=["s"], sets={{"set_00": [0]}})
        for step in itertools.count():
            log.see(step, step / 10, {{"set_00": {{"a": 0.5}}}})
            if step == 50:
                print("there", flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = steps(tmp_path)
    assert found == list(range(len(found)))
    assert len(found) > 50


def test_a_disk_that_is_full_for_a_while_delays_lines_and_tears_none(tmp_path, monkeypatch, caplog):
    log = seen(a_log(tmp_path), [0])

    def full(path, *mode, **more):
        with open(path, *mode, **more) as file:
            os.write(file.fileno(), b'{"step": 1, "ep')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_log, "open", full, raising=False)
    seen(log, [1])
    assert "No space left" in caplog.text
    assert steps(tmp_path) == [0]
    monkeypatch.undo()
    seen(log, [2])
    assert steps(tmp_path) == [0, 1, 2]


# ---- what is refused
def test_there_has_to_be_a_log(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "weights.jsonl")
    (tmp_path / "weights.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"weights\.jsonl:1: .* first line"):
        read_weights(tmp_path / "weights.jsonl")


@pytest.mark.parametrize(
    ("line", "new", "told"),
    [
        (0, '{"format": 2}', r"weights\.jsonl:1: .* format is 2"),
        (0, "[]", r"weights\.jsonl:1: not a line of a log"),
        (2, '{"step": 1, "ep', r"weights\.jsonl:3: not a line of JSON"),
        (2, '{"step": 1, "epoch": 0.1}', r"weights\.jsonl:3: .*'weights' is missing"),
        (2, '{"step": 0, "epoch": 0.1, "weights": {}}', r"weights\.jsonl:3: .* sets \[\]"),
        (3, None, r"weights\.jsonl:4: .* step 1 after step 1"),
    ],
)
def test_a_damaged_line_is_named(line, new, told, tmp_path):
    seen(a_log(tmp_path), range(4))
    lines = text(tmp_path).decode().splitlines()
    lines[line] = lines[line - 1] if new is None else new
    (tmp_path / "weights.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=told):
        read_weights(tmp_path / "weights.jsonl")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"branches": ()}, "branches of a log"),
        ({"branches": ("a", "a")}, "branches of a log"),
        ({"sites": ("s", "s", "t")}, "sites of a log"),
        ({"sets": {"set_00": (0, 1)}}, "each of the sites 0 … 2"),
        ({"sets": {"set_00": (0, 1), "set_01": (1, 2)}}, "each of the sites 0 … 2"),
        ({"every": 0}, "every=0"),
    ],
)
def test_names_that_do_not_fit_together_are_refused(given, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        a_log(tmp_path, **given)


def test_weights_of_other_sets_or_branches_are_refused(tmp_path):
    log = a_log(tmp_path)
    with pytest.raises(ValueError, match=r"sets \['set_00'\], but the log has \['set_00', 'set_01'\]"):
        log.see(0, 0.0, {"set_00": weights(0)["set_00"]})
    with pytest.raises(ValueError, match=r"set_01: weights of \['rte'\]"):
        log.see(0, 0.0, {**weights(0), "set_01": {"rte": 1.0}})
    assert steps(tmp_path) == []
