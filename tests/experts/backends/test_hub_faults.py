"""The Hub is busy, moves on, loses answers while it is written: each expert is old or new then, and nothing is lost."""

import json
import logging
import threading
import time
from dataclasses import replace

import pytest
from hub_server import Fault
from hub_server.fixtures import BRIEF, PASSING

from mole.experts import Conflict, LibraryError, NoLibrary, ReadOnly, Unreachable, read_card
from mole.experts.backends.hub import HubBackend


@pytest.fixture
def folders(make, tmp_path):
    """Saves the expert of a seed and gives its folder."""

    def saved(seed=0, **facts):
        folder = tmp_path / f"expert-{seed}-{len(facts)}"
        if not folder.exists():
            make(seed, **facts).save(folder)
        return folder

    return saved


@pytest.fixture
def repo(hub, repo_id):
    return hub.create(repo_id)


def commit(repo, changes, title="by hand"):
    return repo.commit("main", repo.refs()["refs/heads/main"], changes, title)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def impatient(backend, **limits):
    return HubBackend(backend.url.removeprefix("hf://"), patience=replace(BRIEF, **limits))


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("action", ["publish", "update", "remove"])
def test_a_commit_that_meets_a_passing_fault_is_made_once(hub_backend, hub, repo, folders, action):
    for number, fault in enumerate(PASSING):
        name = f"e{number}"
        version = None if action == "publish" else hub_backend.publish(name, folders(0))
        before = len(repo.log())
        hub.faults[:] = [Fault("POST .*/commit/main", **fault)]
        if action == "remove":
            hub_backend.remove(name, version)
            assert name not in hub_backend.cards(), fault
        else:
            hub_backend.publish(name, folders(1), version)
            assert hub_backend.card(name)[0] == read_card(folders(1)), fault
            hub_backend.verify(name)
        assert len(repo.log()) == before + 1, fault
        assert hub.faults[0].times == 0, fault


@pytest.mark.parametrize("how", ["refuse", "lose_reply", "status", "cut_after"])
@pytest.mark.parametrize("action", ["publish", "update", "remove"])
def test_a_fault_at_any_request_leaves_the_old_state_or_the_new_one(hub_backend, hub, repo, folders, action, how):
    """Every request of the change in turn, and for good: what gives up then has done all or nothing."""
    version = None if action == "publish" else hub_backend.publish("mrpc", folders(0))
    old, new = (
        (None if action == "publish" else read_card(folders(0))),
        (None if action == "remove" else read_card(folders(1))),
    )
    start = repo.resolve("main")
    value = {"refuse": True, "lose_reply": True, "status": 403, "cut_after": 0}[how]
    states = []
    for step in range(20):
        repo.set_ref("refs/heads/main", start)
        hub.faults[:] = [Fault("/api/models|/resolve/|/lfs/|/models/", skip=step, times=10_000, **{how: value})]
        hub.requests.clear()
        backend = impatient(hub_backend, total=0.3)
        try:
            backend.remove("mrpc", version) if action == "remove" else backend.publish("mrpc", folders(1), version)
            done = True
        except LibraryError:
            done = False
        hub.faults.clear()
        listed = hub_backend.cards()
        states.append(hub_backend.card("mrpc")[0] if listed else None)
        if listed:
            hub_backend.verify("mrpc")
        if done:
            break
    assert done
    assert states[-1] == new
    switch = states.index(new)
    assert states == [old] * switch + [new] * (len(states) - switch)
    assert switch > 1


@pytest.mark.parametrize(
    ("status", "error"), [(400, Unreachable), (403, ReadOnly), (404, NoLibrary), (413, Unreachable)]
)
def test_a_refusal_for_good_is_not_asked_again(hub_backend, hub, repo, folders, status, error):
    hub.faults.append(Fault("POST .*/commit/main", status=status, times=100))
    with pytest.raises(error):
        hub_backend.publish("mrpc", folders(0))
    assert len(hub.seen("POST .*/commit/main")) == 1
    hub.faults.clear()
    assert hub_backend.cards() == {}


def test_a_hub_that_stays_busy_is_unreachable_after_the_patience_and_its_cause_is_told(hub_backend, hub, repo, folders):
    hub.faults.append(Fault("POST .*/commit/main", status=503, times=10_000))
    with pytest.raises(Unreachable, match="the Hub answers 503"):
        impatient(hub_backend, total=0.3).publish("mrpc", folders(0))
    hub.faults[:] = [Fault("/revision/main", refuse=True, times=10_000)]
    with pytest.raises(Unreachable, match="cannot be reached") as caught:
        impatient(hub_backend, total=0.3).cards()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert caught.value.__context__ is None


def test_the_pause_that_the_hub_asks_for_is_kept(hub_backend, hub, repo, folders, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    hub.faults.append(Fault("POST .*/commit/main", status=409, headers={"Retry-After": "7"}))
    hub_backend.publish("mrpc", folders(0))
    assert 7 in pauses


def test_another_writer_between_the_look_and_the_commit_is_seen(hub_backend, hub, repo, folders):
    """The head moves: others' experts are kept, and the same name is a conflict."""
    hub.faults.append(Fault("POST .*/commit/main", before=lambda: commit(repo, {"rte/expert.json": b"{}"})))
    hub_backend.publish("mrpc", folders(0))
    assert set(hub_backend.cards()) == {"mrpc", "rte"}
    theirs = {f"mnli/{name}": data for name, data in content(folders(1)).items()}
    hub.faults[:] = [Fault("POST .*/commit/main", before=lambda: commit(repo, theirs))]
    with pytest.raises(Conflict, match="mnli is there, at revision") as caught:
        hub_backend.publish("mnli", folders(2))
    assert caught.value.revision == read_card(folders(1)).revision


def test_a_lost_answer_is_known_also_when_others_went_on(hub_backend, hub, repo, folders):
    """The commit is made, its answer lost, and before the next look somebody replaces the expert."""
    version = hub_backend.publish("mrpc", folders(0))
    theirs = {f"mrpc/{name}": data for name, data in content(folders(2)).items()}
    hub.faults[:] = [
        Fault("POST .*/commit/main", lose_reply=True),
        Fault("GET .*/revision/main", skip=1, before=lambda: commit(repo, theirs)),
    ]
    hub_backend.publish("mrpc", folders(1), version)
    assert hub_backend.card("mrpc")[0] == read_card(folders(2))
    assert read_card(folders(1)).revision in repo.log()[1].message


def test_a_head_that_lags_behind_delays_and_loses_nothing(hub_backend, hub, repo, folders):
    old = repo.resolve("main")
    hub_backend.publish("mrpc", folders(0))
    lag = lambda body: json.dumps({**json.loads(body), "sha": old}).encode()  # noqa: E731
    hub.faults.append(Fault("GET .*/revision/main", rewrite=lag, times=3))
    hub_backend.publish("rte", folders(1))
    assert list(hub_backend.cards()) == ["mrpc", "rte"]


def test_a_damaged_upload_is_never_committed(hub_backend, hub, repo, folders):
    hub.faults.append(Fault("PUT /models", status=400, times=100))
    with pytest.raises(LibraryError):
        hub_backend.publish("mrpc", folders(0))
    assert len(repo.log()) == 1


def test_content_goes_up_once_however_often_the_commit_is_tried(hub_backend, hub, repo, folders):
    hub.faults.append(Fault("POST .*/commit/main", status=412, times=4))
    hub_backend.publish("mrpc", folders(0))
    assert len(hub.seen("POST .*/commit/main")) == 5
    assert len(hub.seen("PUT /models")) == 1


def test_threads_with_objects_of_their_own_lose_nothing(hub_backend, repo, folders):
    sources = [folders(seed) for seed in range(4)]
    failed = []

    def work(number):
        try:
            for step in range(2):
                impatient(hub_backend, total=60.0).publish(f"e{number}-{step}", sources[(number + step) % 4])
        except LibraryError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(hub_backend.cards()) == 8
    assert len(repo.log()) == 9


def test_a_hub_that_does_not_answer_is_told_once_while_it_is_asked_again(hub_backend, hub, repo, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mole"), "propagate", True)
    hub.faults[:] = [Fault("GET .*/api/models/.*", status=503, times=3)]
    with caplog.at_level(logging.INFO, "mole"):
        hub_backend.cards()
    told = [record for record in caplog.records if "it is asked again for up to" in record.message]
    assert len(told) == 1
