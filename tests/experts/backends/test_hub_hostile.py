"""What the Hub gives is cut, damaged, endless, hostile: nothing of it is believed, and nothing of it is left behind."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
from hub_server import Fault
from hub_server.fixtures import BRIEF, HURRIED, PASSING

from mole.experts import Damaged, LibraryError, NoLibrary, Refused, Unreachable, read_card
from mole.experts.backends import Change
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


@pytest.mark.parametrize("place", ["/revision/main", "/tree/", "/paths-info/", "/resolve/.*json", "GET /models/"])
def test_reading_gets_over_passing_faults(hub_backend, hub, repo, folders, tmp_path, place):
    hub_backend.publish("mrpc", folders(0))
    for number, fault in enumerate([*PASSING, {"cut_after": 20}]):
        hub.faults[:] = [Fault(place, **fault)]
        backend = HubBackend(hub_backend.url.removeprefix("hf://"), patience=HURRIED)
        assert list(backend.cards()) == ["mrpc"], fault
        dest = tmp_path / f"dest-{number}"
        dest.mkdir()
        backend.fetch("mrpc", dest)
        assert content(dest) == content(folders(0)), fault
        assert hub.faults[0].times == 0, fault


def test_a_cut_download_goes_on_where_it_was(hub_backend, hub, repo, folders, tmp_path):
    hub_backend.publish("mrpc", folders(0))
    hub.faults.append(Fault("GET /models/", cut_after=700))
    (tmp_path / "dest").mkdir()
    hub_backend.fetch("mrpc", tmp_path / "dest")
    assert [seen.range for seen in hub.seen("GET /models/")] == [None, "bytes=700-"]


@pytest.mark.parametrize("place", ["GET /models/", "/resolve/.*adapter_config"])
@pytest.mark.parametrize("rewrite", [flipped, lambda data: data[:-5], lambda data: data + b"x", lambda data: b""])
def test_a_damaged_download_is_asked_for_once_more_and_then_refused(
    hub_backend, hub, repo, folders, tmp_path, place, rewrite
):
    hub_backend.publish("mrpc", folders(0))
    (tmp_path / "dest").mkdir()
    hub.faults[:] = [Fault(place, rewrite=rewrite)]
    hub_backend.fetch("mrpc", tmp_path / "dest")
    assert content(tmp_path / "dest") == content(folders(0))
    (tmp_path / "other").mkdir()
    hub.faults[:] = [Fault(place, rewrite=rewrite, times=2)]
    with pytest.raises(Damaged):
        hub_backend.fetch("mrpc", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
    hub.faults[:] = [Fault(place, rewrite=rewrite, times=2)]
    with pytest.raises(Damaged):
        hub_backend.verify("mrpc")
    hub_backend.verify("mrpc", quick=True)


@pytest.mark.parametrize("place", ["GET /models/", "/resolve/.*adapter_config", "/resolve/.*expert.json", "/tree/"])
def test_a_body_without_end_is_cut_off(hub_backend, hub, repo, folders, tmp_path, place):
    hub_backend.publish("mrpc", folders(0))
    hub.faults.append(Fault(place, endless=True, times=100))
    (tmp_path / "dest").mkdir()
    with pytest.raises(Damaged, match="sends more than"):
        hub_backend.fetch("mrpc", tmp_path / "dest")
    assert list((tmp_path / "dest").iterdir()) == []


@pytest.mark.parametrize("place", ["GET /models/", "/resolve/.*expert.json", "/tree/"])
def test_a_packed_answer_is_not_unpacked(hub_backend, hub, repo, folders, tmp_path, place):
    import gzip

    hub_backend.publish("mrpc", folders(0))
    bomb = gzip.compress(b"\0" * 10_000_000)
    hub.faults.append(Fault(place, status=200, headers={"Content-Encoding": "gzip"}, body=bomb, times=100))
    (tmp_path / "dest").mkdir()
    with pytest.raises(Damaged, match="packed"):
        hub_backend.fetch("mrpc", tmp_path / "dest")


def test_a_hub_that_does_not_answer_is_given_up(hub_backend, hub, repo):
    """It is given up before it has answered; then it may, so that no request of this test is left over."""
    asleep, awake = [], threading.Event()

    def sleep():
        asleep.append(threading.current_thread())
        awake.wait(120)

    hub.faults.append(Fault("/revision/main", before=sleep, times=100))
    try:
        with pytest.raises(Unreachable):
            impatient(hub_backend, total=0.5, answer=0.1).cards()
        assert asleep
        assert hub.seen("/revision/main") == []
    finally:
        awake.set()
        for thread in asleep:
            thread.join(120)


def row(path="mrpc", **changes):
    return {"type": "directory", "oid": "a" * 40, "size": 0, "path": path, **changes}


HOSTILE = [
    [row("../mrpc")],
    [row("/etc")],
    [row("C:mrpc")],
    [row("a\\b")],
    [row("mrpc\n")],
    [row("mrpc\x1b[2J")],
    [row("mrpc\0")],
    [row("")],
    [row("x" * 5000)],
    [row("."), row()],
    [row(), row()],
    [row(oid="no id")],
    [row(oid=None)],
    [row(size=-1)],
    [row(size=1.5)],
    [row(size=2**64)],
    [row(type="link")],
    [row(lfs={"oid": "../x"})],
    [row(path=7)],
    ["mrpc"],
    {"error": "none"},
    None,
]


@pytest.mark.parametrize("rows", HOSTILE, ids=lambda rows: str(rows)[:60])
def test_a_hostile_listing_is_refused(hub_backend, hub, repo, folders, rows):
    hub_backend.publish("mrpc", folders(0))
    hub.faults.append(Fault("/tree/", status=200, body=json.dumps(rows).encode()))
    with pytest.raises(Damaged) as caught:
        hub_backend.cards()
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[" * 200_000, b"\xff\xfe[", b'{"sha": 1}', b'{"sha": "main"}', b"7"]
)
@pytest.mark.parametrize("place", ["/revision/main", "/tree/"])
def test_an_answer_that_is_no_answer_is_refused(hub_backend, hub, repo, place, body):
    hub.faults.append(Fault(place, status=200, body=body))
    with pytest.raises(Damaged):
        hub_backend.cards()


def test_pages_without_end_are_given_up(hub_backend, hub, repo):
    link = {"Link": f'<{hub.endpoint}/api/models/x/y/tree/main?cursor=1>; rel="next"'}
    hub.faults.append(Fault("/tree/", status=200, headers=link, body=b"[]", times=100))
    with pytest.raises(Damaged, match="without end"):
        hub_backend.cards()


def test_a_next_page_on_another_host_is_not_asked_for(hub_backend, hub, repo, folders):
    hub_backend.publish("mrpc", folders(0))
    for elsewhere in (hub.storage, "http://127.0.0.1:1", "file:///etc", "//example.com"):
        link = {"Link": f'<{elsewhere}/x>; rel="next"'}
        hub.faults[:] = [Fault("/tree/", status=200, headers=link, body=json.dumps([row()]).encode())]
        with pytest.raises(Damaged, match="lies elsewhere"):
            hub_backend.cards()
        hub_backend._listed = ("", {})
    assert not [seen for seen in hub.requests if seen.origin == "storage" and seen.method != "PUT"]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host_never_gets_the_token(hub_backend, hub, repo, folders, tmp_path, status):
    hub_backend.publish("mrpc", folders(0))
    elsewhere = {"Location": f"{hub.storage}/stolen"}
    hub.faults[:] = [Fault("/revision/main", status=status, headers=elsewhere)]
    with pytest.raises(Unreachable, match="points to another place"):
        hub_backend.cards()
    hub.faults[:] = [Fault("/resolve/.*adapter_config", status=status, headers=elsewhere, times=100)]
    (tmp_path / "dest").mkdir()
    with pytest.raises(LibraryError):
        hub_backend.fetch("mrpc", tmp_path / "dest")
    stolen = hub.seen("/stolen")
    assert stolen
    assert {seen.authorization for seen in stolen} == {None}


def test_a_repository_that_was_renamed_is_followed(hub_backend, hub, repo, repo_id, folders):
    hub_backend.publish("mrpc", folders(0))
    there = {"Location": f"/api/models/{repo_id}/revision/main?expand=sha"}
    hub.faults.append(Fault("/models/alice/old/revision/main", status=307, headers=there))
    assert HubBackend("alice/old", patience=BRIEF).head() == repo.resolve("main")


@pytest.mark.parametrize("places", [["http://[bad/"], [""], ["file:///etc/passwd"], ["/x"]])
def test_a_redirect_to_nowhere_is_an_error(hub_backend, hub, repo, places):
    hub.faults[:] = [Fault("GET", status=302, headers={"Location": place}, times=10) for place in places]
    with pytest.raises(Unreachable):
        hub_backend.cards()


def test_sizes_are_taken_from_the_listing_and_refused_before_a_download(hub_backend, hub, repo, folders, tmp_path):
    hub_backend.publish("mrpc", folders(0))
    for changed in (lambda size: size - 1, lambda size: size + 1, lambda size: 2**40):

        def lie(body, changed=changed):
            rows = json.loads(body)
            return json.dumps([{**r, "size": changed(r["size"])} for r in rows]).encode()

        hub.faults[:] = [Fault("/tree/", rewrite=lie)]
        hub.requests.clear()
        dest = tmp_path / f"dest-{changed(5)}"
        dest.mkdir()
        with pytest.raises(Damaged, match="the card says"):
            hub_backend.fetch("mrpc", dest)
        assert not hub.seen("GET /models/|/resolve/.*adapter")


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"mrpc/adapter_model.bin": b"pickle"}, Refused, "safetensors only"),
        ({"mrpc/notes.txt": b"x"}, Refused, "not listed in the card"),
        ({"mrpc/adapter_config.json": None}, Damaged, "missing"),
        ({"mrpc/adapter_config.json": b"{}"}, Damaged, "the card says"),
        ({"mrpc/expert.json": b"{}"}, Damaged, "format: must be 1"),
        ({"mrpc/expert.json": b" " * 300_000}, Damaged, "sends more than"),
    ],
)
def test_a_folder_that_is_not_what_its_card_says_is_not_fetched(
    hub_backend, hub, repo, folders, tmp_path, change, error, told
):
    hub_backend.publish("mrpc", folders(0))
    commit(repo, change)
    (tmp_path / "dest").mkdir()
    for read in (lambda: hub_backend.fetch("mrpc", tmp_path / "dest"), lambda: hub_backend.verify("mrpc", quick=True)):
        with pytest.raises(error, match=told):
            read()
    assert list((tmp_path / "dest").iterdir()) == []
    hub_backend.apply([Change("rte", folders(1), None)], "others go on")


def test_a_damaged_card_hides_no_other(hub_backend, repo, folders):
    hub_backend.apply([Change(name, folders(0), None) for name in ("a", "b", "c")], "three")
    commit(repo, {"b/expert.json": b"[]"})
    found = dict(hub_backend.read_cards(["a", "b", "c"]))
    assert isinstance(found["b"], Damaged)
    assert found["a"] == found["c"] == read_card(folders(0))


def test_a_repository_that_goes_in_the_middle_is_told(hub_backend, hub, repo, folders, tmp_path):
    hub_backend.publish("mrpc", folders(0))
    (tmp_path / "dest").mkdir()
    hub.faults.append(Fault("/tree/", before=lambda: shutil.rmtree(repo.path)))
    with pytest.raises(NoLibrary, match="not there, or not yours to see"):
        hub_backend.fetch("mrpc", tmp_path / "dest")
    assert list((tmp_path / "dest").iterdir()) == []


def test_a_gated_repository_says_so(hub_backend, hub, repo):
    hub.faults.append(Fault("/revision/main", status=403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(NoLibrary, match="gated: ask for access"):
        hub_backend.cards()


def test_a_full_disk_is_told_and_leaves_nothing(hub_backend, hub, repo, folders, tmp_path, monkeypatch):
    import errno
    from pathlib import Path

    hub_backend.publish("mrpc", folders(0))
    dest = tmp_path / "dest"
    dest.mkdir()
    real = Path.open

    def full(path, mode="r", *args, **kwargs):
        if "w" in mode and dest in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        hub_backend.fetch("mrpc", dest)
    assert list(dest.iterdir()) == []
