"""What is special to a folder: the swap, its repair, processes that die in it, and what else may lie there."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from mole.experts import Conflict, Damaged, LocalBackend, NoLibrary, ReadOnly, Refused, UnknownExpert, read_card
from mole.experts.backends import Change

SCRIPT = Path(__file__).with_name("library_scripts.py")


def script(*args):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def backend(tmp_path):
    return LocalBackend(tmp_path / "lib")


@pytest.fixture
def folders(make, tmp_path):
    found = []
    for seed in range(8):
        found.append(tmp_path / f"expert-{seed}")
        make(seed).save(found[-1])
    return found


@pytest.mark.parametrize(
    ("operation", "before", "after"),
    [("add", "absent", "new"), ("replace", "old", "new"), ("remove", "old", "absent")],
)
def test_a_death_before_any_call_leaves_the_old_state_or_the_new_one(folders, tmp_path, operation, before, after):
    points = script("crash", *folders[:3], tmp_path / "crashed", operation)
    assert len(points) > (5 if operation == "remove" else 15)
    assert [point["code"] for point in points] == [77] * (len(points) - 1) + [0]
    states = [point["state"] for point in points]
    switch = states.index(after)
    assert states == [before] * switch + [after] * (len(states) - switch)
    assert switch > 0
    assert all(point["listed"] and point["next"] and point["old"] == [] for point in points)


def test_a_death_in_a_renaming_batch_leaves_each_name_old_or_new_and_the_expert_under_one_of_them(folders, tmp_path):
    points = script("rename", folders[0], tmp_path / "crashed")
    assert len(points) > 15
    states = [tuple(point["names"]) for point in points]
    assert all(point["whole"] and point["again"] == ["paraphrase"] for point in points)
    order = [("mrpc",), ("mrpc", "paraphrase"), ("paraphrase",)]  # both for a while, never neither
    assert sorted(set(states), key=states.index) == order
    assert states == sorted(states, key=order.index)


def test_of_eight_processes_that_publish_one_name_one_wins(folders, tmp_path):
    outcomes = script("writers", tmp_path / "lib", "mrpc", *folders)
    (winner,) = [outcome for outcome in outcomes if outcome != "conflict"]
    assert LocalBackend(tmp_path / "lib").card("mrpc")[0].revision == winner


def test_eight_processes_with_names_of_their_own_all_succeed(folders, tmp_path):
    outcomes = script("writers", tmp_path / "lib", "-", *folders)
    assert "conflict" not in outcomes
    backend = LocalBackend(tmp_path / "lib")
    assert {backend.card(name)[0].revision for name in backend.cards()} == set(outcomes)
    assert len(outcomes) == 8


@pytest.fixture
def in_the_swap(backend, folders, monkeypatch):
    """Replaces an expert; in the middle of the swap, when its name does not exist, a function is called in a thread.

    Returns what the function returned.
    """

    def replace(function):
        first = backend.publish("mrpc", folders[0])
        real, result, threads = os.rename, [], []

        def rename(source, target):
            real(source, target)
            if Path(target).name == "old-mrpc":
                assert not Path(source).exists()
                threads.append(threading.Thread(target=lambda: result.append(function())))
                threads[0].start()
                threads[0].join(0.3)  # long enough for a reader that does not wait for the lock to come back

        monkeypatch.setattr(os, "rename", rename)
        backend.publish("mrpc", folders[1], first)
        threads[0].join()
        return result[0]

    return replace


def test_a_listing_in_the_middle_of_a_swap_has_the_name(backend, in_the_swap):
    other = LocalBackend(backend.root)
    assert in_the_swap(lambda: list(other.cards())) == ["mrpc"]


def test_a_reader_in_the_middle_of_a_swap_finds_the_expert(backend, folders, tmp_path, in_the_swap):
    other = LocalBackend(backend.root)
    (tmp_path / "dest").mkdir()
    card = in_the_swap(lambda: other.fetch("mrpc", tmp_path / "dest"))
    assert card == read_card(folders[1]) == read_card(tmp_path / "dest")


def test_a_copy_that_met_a_swap_is_made_again(backend, folders, tmp_path, monkeypatch):
    first = backend.publish("mrpc", folders[0])
    (tmp_path / "dest").mkdir()
    from mole.experts import folder as module

    real, copies = module.copy_files, []

    def copy(source, target, card, entries):
        if source == backend.root / "mrpc" and not copies:
            copies.append(card)
            LocalBackend(backend.root).publish("mrpc", folders[1], first)  # between the card and the files
        return real(source, target, card, entries)

    monkeypatch.setattr(module, "copy_files", copy)
    assert backend.fetch("mrpc", tmp_path / "dest") == read_card(folders[1])


def test_a_reader_is_not_starved_by_a_writer_that_comes_between_any_two_files(backend, folders, tmp_path, monkeypatch):
    backend.publish("mrpc", folders[0])
    (tmp_path / "dest").mkdir()
    from mole.experts import folder as module

    real, writer, writes = module._copy, LocalBackend(backend.root), []

    def copy(source, target, wanted):
        real(source, target, wanted)
        if source.parent != backend.root / "mrpc" or not is_free(backend.root / ".mole" / "lock"):
            return
        writes.append(folders[(len(writes) + 1) % 2])
        writer.publish("mrpc", writes[-1], writer.card("mrpc")[1])

    monkeypatch.setattr(module, "_copy", copy)
    card = backend.fetch("mrpc", tmp_path / "dest")
    assert len(writes) > 1
    assert card == read_card(tmp_path / "dest") == read_card(writes[-1])


def is_free(lock):
    """Whether nobody holds a library's lock."""
    try:
        FileLock(str(lock)).acquire(timeout=0).lock.release()
    except Timeout:
        return False
    return True


def test_a_fetch_of_damage_raises_and_leaves_nothing(backend, folders, tmp_path):
    backend.publish("mrpc", folders[0])
    path = backend.root / "mrpc" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / "dest").mkdir()
    with pytest.raises(Damaged, match=r"adapter_model\.safetensors is not what the card says"):
        backend.fetch("mrpc", tmp_path / "dest")
    assert list((tmp_path / "dest").iterdir()) == []


def test_publishing_leaves_these_files_and_no_others(backend, folders):
    version = backend.publish("mrpc", folders[0])
    backend.publish("mrpc", folders[1], version)
    old = read_card(folders[0]).revision
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "expert.json")
    found = {str(path.relative_to(backend.root)) for path in backend.root.rglob("*") if path.is_file()}
    expected = {f"mrpc/{name}" for name in names} | {f".mole/history/mrpc/{old}/{name}" for name in names}
    assert found == expected | {".mole/lock"}


def test_a_library_copied_without_its_own_folder_can_be_read(backend, folders):
    backend.publish("mrpc", folders[0])
    shutil.rmtree(backend.root / ".mole")
    assert list(backend.cards()) == ["mrpc"]
    assert backend.card("mrpc")[0] == read_card(folders[0])
    assert not (backend.root / ".mole").exists()


def test_a_library_that_cannot_be_locked_is_read_without_the_lock(backend, folders, tmp_path, monkeypatch):
    backend.publish("mrpc", folders[0])
    os.rename(backend.root / "mrpc", backend.root / ".mole" / "old-mrpc")  # a swap cut short, never to be repaired

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(backend._folder._lock, "acquire", refuse)
    (tmp_path / "dest").mkdir()
    assert backend.fetch("mrpc", tmp_path / "dest") == read_card(folders[0])
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ReadOnly, match="cannot be written"):
        backend.publish("other", folders[1])


def test_a_folder_with_other_things_does_not_become_a_library(tmp_path, folders):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(NoLibrary, match="not empty and no library"):
        LocalBackend(tmp_path / "home").publish("mrpc", folders[0])
    with pytest.raises(NoLibrary, match="is a file"):
        LocalBackend(tmp_path / "home" / "letter.txt").publish("mrpc", folders[0])
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_an_experts_folder_taken_for_a_library_is_told(folders):
    with pytest.raises(NoLibrary, match="is an expert's folder; its library may be"):
        LocalBackend(folders[0]).cards()


def test_a_foreign_folder_under_the_name_is_not_overwritten(backend, folders):
    backend.publish("other", folders[0])
    (backend.root / "mrpc").mkdir()
    with pytest.raises(Refused, match="move it away"):
        backend.publish("mrpc", folders[1])
    assert list(backend.cards()) == ["other"]


def test_strays_are_listed(backend, folders):
    backend.publish("mrpc", folders[0])
    (backend.root / "notes.txt").write_text("x")
    (backend.root / "README.md").write_text("the page about the library")
    (backend.root / "empty").mkdir()
    (backend.root / "Upper").mkdir()
    (backend.root / "linked").symlink_to(folders[1])
    assert backend.strays() == ["Upper", "empty", "linked", "notes.txt"]
    assert list(backend.cards()) == ["mrpc"]


def test_a_writer_repairs_a_swap_that_was_cut_short_before_it_compares(backend, folders):
    first = backend.publish("mrpc", folders[0])
    os.rename(backend.root / "mrpc", backend.root / ".mole" / "old-mrpc")
    backend.publish("mrpc", folders[1], first)
    assert backend.card("mrpc")[0] == read_card(folders[1])
    assert (backend.root / ".mole" / "history" / "mrpc" / read_card(folders[0]).revision).is_dir()


def test_a_writer_that_loses_or_fails_leaves_no_staging_folder(backend, folders, monkeypatch):
    backend.publish("mrpc", folders[0])
    with pytest.raises(Conflict):
        backend.publish("mrpc", folders[1])
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.fstat(-1))
    with pytest.raises(OSError, match="descriptor"):
        backend.publish("other", folders[1])
    assert {path.name for path in (backend.root / ".mole").iterdir()} == {"lock"}


def test_a_writer_without_room_leaves_the_old_state(backend, folders, monkeypatch):
    first = backend.publish("mrpc", folders[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="No space left"):
            backend.publish("mrpc", folders[1], first)
    assert backend.card("mrpc") == (read_card(folders[0]), first)
    backend.publish("mrpc", folders[1], first)


def no_room(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_batch_is_swapped_in_under_one_lock(backend, folders, monkeypatch):
    first = backend.publish("a", folders[0])
    real, seen = os.rename, []

    def rename(source, target):
        real(source, target)
        if not seen:  # another one looks right after the first step of the batch: it has to wait for the last
            seen.append(threading.Thread(target=lambda: seen.append(list(LocalBackend(backend.root).cards()))))
            seen[0].start()
            seen[0].join(0.3)

    monkeypatch.setattr(os, "rename", rename)
    backend.apply([Change("b", folders[0], None), Change("a", None, first)], "rename a to b")
    seen[0].join()
    assert seen[1] == ["b"]


def test_an_error_in_the_middle_of_a_batch_says_what_was_written(backend, folders, monkeypatch):
    real = os.rename

    def rename(source, target):
        if Path(target).name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left") as caught:
        backend.apply([Change(name, folders[0], None) for name in "abc"], "three")
    assert caught.value.__notes__ == ["written before this: a; not written: b, c"]
    assert list(backend.cards()) == ["a"]


def test_a_listing_reads_no_card_and_stats_each_once(backend, folders, monkeypatch):
    for number in range(3):
        backend.publish(f"e{number}", folders[0])
    (backend.root / "e1" / "expert.json").write_text("damaged")
    real, asked = os.stat, []
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(str(path)) or real(path, **options))
    assert list(backend.cards()) == ["e0", "e1", "e2"]
    assert len([path for path in asked if path.endswith("expert.json")]) == 3
    found = dict(backend.read_cards(backend.cards()))
    assert isinstance(found["e1"], Damaged)


def test_a_linked_folder_is_no_expert_of_the_library(backend, folders):
    backend.publish("mrpc", folders[0])
    (backend.root / "linked").symlink_to(folders[1])
    assert list(backend.cards()) == ["mrpc"]
    with pytest.raises(UnknownExpert):
        backend.card("linked")


def tick(probe):
    """Waits until the clock of the file system has moved on, which on a fast disk takes longer than to publish."""
    probe.touch()
    before = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == before:
        os.utime(probe)


@pytest.fixture
def revisions(backend, folders, tmp_path):
    """A name at the last of five revisions, and one that was removed; gives the old revisions, newest first."""
    version = None
    for folder in folders[:5]:
        version = backend.publish("mrpc", folder, version)
        tick(tmp_path / "probe")
    backend.remove("gone", backend.publish("gone", folders[5]))
    return [read_card(folder).revision for folder in folders[3::-1]]


def days(number, monkeypatch):
    """The clock goes forward."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + number * 86_400)


def test_collecting_takes_what_is_old_and_beyond_what_is_kept(backend, folders, revisions, monkeypatch):
    days(8, monkeypatch)
    found = backend.collect(timedelta(days=7), 2, dry_run=True)
    assert {row.what for row in found} == {f".mole/history/mrpc/{revision}" for revision in revisions[2:]}
    assert all(row.size > 1000 and "an old revision" in row.why for row in found)
    assert len(list((backend.root / ".mole" / "history" / "mrpc").iterdir())) == 4
    assert backend.collect(timedelta(days=7), 2, dry_run=False) == found
    for revision in revisions[:2]:
        assert backend.card("mrpc", revision)[0].revision == revision
    with pytest.raises(UnknownExpert):
        backend.card("mrpc", revisions[2])
    assert backend.card("mrpc")[0] == read_card(folders[4])
    assert backend.card("gone", read_card(folders[5]).revision)
    assert backend.collect(timedelta(days=7), 2, dry_run=False) == []


def test_collecting_lets_be_what_is_young(backend, revisions):
    assert backend.collect(timedelta(days=7), 0, dry_run=False) == []
    assert len(backend.collect(timedelta(0), 0, dry_run=False)) == 5
    assert {path.name for path in (backend.root / ".mole").iterdir()} == {"lock", "history"}
    assert list((backend.root / ".mole" / "history").iterdir()) == []


def test_collecting_takes_the_staging_folder_of_a_dead_writer_and_not_that_of_a_living_one(
    backend, folders, monkeypatch
):
    backend.publish("mrpc", folders[0])
    stage = backend.root / ".mole" / "new-0"
    shutil.copytree(folders[1], stage)
    assert backend.collect(timedelta(0), 0, dry_run=False) == []
    days(0.1, monkeypatch)
    os.utime(stage / "expert.json", (time.time(), time.time()))  # written just now
    assert backend.collect(timedelta(0), 0, dry_run=False) == []
    days(0.1, monkeypatch)
    (row,) = backend.collect(timedelta(0), 0, dry_run=False)
    assert (row.what, stage.exists()) == (".mole/new-0", False)


def test_a_collector_that_dies_leaves_no_half_revision(backend, revisions, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path: os.fstat(-1))
    with pytest.raises(OSError, match="descriptor"):
        backend.collect(timedelta(0), 1, dry_run=False)
    monkeypatch.undo()
    kept = [path.name for path in (backend.root / ".mole" / "history" / "mrpc").iterdir()]
    assert kept == revisions[:1]
    assert backend.card("mrpc", kept[0])[0].revision == kept[0]
    days(1, monkeypatch)
    assert len(backend.collect(timedelta(0), 1, dry_run=False)) == 3  # what it had moved away
