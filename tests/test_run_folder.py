"""Run folders: files come whole or not at all, and only what mole made is taken away."""

import json
import os
import pickle
import stat
from pathlib import Path

import pytest

from mole.run_folder import RunFolder, RunStopped, write_atomically, write_folder_atomically


def test_a_new_folder_is_made_with_its_parents_and_taken_away_with_them(tmp_path):
    (tmp_path / "there").mkdir()
    run = RunFolder(tmp_path / "there" / "a" / "b")
    run.create()
    (run.path / "x").mkdir()
    (run.path / "x" / "y").write_text("")
    run.remove()
    assert list((tmp_path / "there").iterdir()) == []
    assert (tmp_path / "there").is_dir()


def test_a_parent_that_got_another_child_stays(tmp_path):
    run = RunFolder(tmp_path / "a" / "b")
    run.create()
    (tmp_path / "a" / "other").write_text("")
    run.remove()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["other"]


def test_an_empty_folder_is_taken_and_given_back(tmp_path):
    run = RunFolder(tmp_path / "mine")
    run.path.mkdir()
    run.create()
    run.update(status="preparing")
    run.remove()
    assert run.path.is_dir()
    assert list(run.path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is not empty.*--resume"):
        RunFolder(tmp_path).create()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "a").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)"):
            RunFolder(tmp_path / "a").create()
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_facts_are_merged(tmp_path):
    run = RunFolder(tmp_path)
    assert run.facts() == {}
    assert not run.started
    run.update(status="preparing", seed=3)
    assert not run.started
    run.update(status="running")
    assert run.started
    assert json.loads(run.record.read_text()) == {"status": "running", "seed": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_only_rank_0_writes_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    RunFolder(tmp_path).update(status="running")
    assert list(tmp_path.iterdir()) == []


def test_secrets_of_the_environment_do_not_reach_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", 'hf_"quoted"')
    run = RunFolder(tmp_path)
    run.update(error=f"denied for {os.environ['HF_TOKEN']}", nested={"list": [os.environ["HF_TOKEN"]]})
    assert run.facts() == {"error": "denied for <$HF_TOKEN>", "nested": {"list": ["<$HF_TOKEN>"]}}


def test_a_damaged_record_is_named(tmp_path):
    RunFolder(tmp_path).record.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).facts()


def test_an_unknown_status_is_the_programmers_error(tmp_path):
    with pytest.raises(AssertionError):
        RunFolder(tmp_path).update(status="done")


def test_complete_checkpoints_are_those_with_their_last_file_in_order_of_steps(tmp_path):
    run = RunFolder(tmp_path)
    for step in (10, 9, 100):
        run.checkpoint(step).mkdir(parents=True)
        if step != 9:
            (run.checkpoint(step) / "complete").write_text("")
    (run.checkpoints / "step-x").mkdir()
    assert [p.name for p in run.complete_checkpoints()] == ["step-10", "step-100"]


def test_clearing_takes_what_mole_left_and_nothing_else(tmp_path):
    run = RunFolder(tmp_path)
    run.update(status="failed")
    run.checkpoint(1).mkdir(parents=True)
    (run.path / ".expert.partial-0123").mkdir()
    (run.path / "mine.txt").write_text("")
    run.clear()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_written_files_replace_old_ones_whole(tmp_path):
    file = tmp_path / "deep" / "file"
    write_atomically(file, "old")
    write_atomically(file, "né")
    assert file.read_bytes() == "né".encode()
    write_atomically(file, b"\x00")
    assert [p.name for p in file.parent.iterdir()] == ["file"]
    assert file.read_bytes() == b"\x00"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch, broken):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")


def test_a_folder_appears_whole(tmp_path):
    seen = []

    def look(folder: Path) -> None:
        fill(folder)
        seen.append((tmp_path / "a" / "new").exists())

    write_folder_atomically(tmp_path / "a" / "new", look)
    assert seen == [False]
    assert (tmp_path / "a" / "new" / "sub" / "file").read_text() == "x"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(tmp_path / "new", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_replaced_on_request_only(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "old").write_text("")
    with pytest.raises(FileExistsError):
        write_folder_atomically(tmp_path / "new", fill)
    assert (tmp_path / "new" / "old").is_file()
    write_folder_atomically(tmp_path / "new", fill, replace=True)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sub"]
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_leftovers_of_a_killed_process_are_taken_away(tmp_path):
    (tmp_path / "checkpoints" / ".step-3.partial-ab").mkdir(parents=True)
    (tmp_path / ".run.json.partial-cd").write_text("")
    (tmp_path / "kept").write_text("")
    RunFolder(tmp_path).remove_leftovers()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["checkpoints", "kept"]


def test_a_stop_survives_the_way_between_processes(tmp_path):
    stop = pickle.loads(pickle.dumps(RunStopped(15, tmp_path)))
    assert (stop.signal_number, stop.checkpoint) == (15, tmp_path)
    assert not isinstance(stop, ValueError)
