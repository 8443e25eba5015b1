"""What is special to a blob store: its keys, tombstones, conditions, deaths and faults at every request, collecting."""

import json
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from breaking_proxy import BreakingProxy
from servers import make_bucket, make_expert_folders, store_of

from mole.experts import Conflict, Damaged, LibraryError, NoLibrary, ReadOnly, Refused, UnknownExpert, read_card
from mole.experts.backends import Change, blob_garbage, blob_store
from mole.experts.backends.blob import BlobBackend
from mole.experts.backends.blob_store import TOMBSTONE, BlobStore
from mole.experts.errors import Unreachable

pytest.importorskip("obstore")

STORES = ("memory", "s3", "azure")


@pytest.fixture(params=STORES)
def backend(request, open_place):
    return open_place(request.param)


@pytest.fixture
def memory(open_place):
    return open_place("memory")


@pytest.fixture
def folders(make, tmp_path):
    return make_expert_folders(make, tmp_path, 5)


def keys(backend):
    """Every key below the library's prefix."""
    return sorted(row.key for row in backend._store.rows("") if not row.key.startswith("probe-"))


def revision(folder):
    return read_card(folder).revision


def fetched(backend, name, tmp_path, old=None):
    dest = tmp_path / f"fetched-{len(list(tmp_path.iterdir()))}"
    dest.mkdir()
    return backend.fetch(name, dest, old).revision


def files_of(folder, name):
    return sorted(f"files/{name}/{row['sha256']}/{file}" for file, row in read_card(folder).files.items())


def test_a_library_consists_of_these_keys_and_no_others(backend, folders):
    first = backend.publish("mrpc", folders[0])
    assert keys(backend) == ["cards/mrpc.json", *files_of(folders[0], "mrpc")]
    backend.publish("mrpc", folders[1], first)
    both = sorted({*files_of(folders[0], "mrpc"), *files_of(folders[1], "mrpc")})
    assert keys(backend) == ["cards/mrpc.json", *both, f"past/mrpc/{revision(folders[0])}.json"]


def test_a_removed_expert_leaves_a_tombstone_that_counts_as_absent_everywhere(backend, folders, tmp_path):
    version = backend.publish("mrpc", folders[0])
    backend.remove("mrpc", version)
    assert backend._store.read("cards/mrpc.json", 100)[0] == TOMBSTONE
    assert backend.cards() == {}
    assert backend.exists()
    assert list(backend.read_cards(["mrpc"])) == []
    for call in (lambda: backend.card("mrpc"), lambda: fetched(backend, "mrpc", tmp_path)):
        with pytest.raises(UnknownExpert):
            call()
    with pytest.raises(Conflict, match="removed by somebody else"):
        backend.publish("mrpc", folders[1], version)
    backend.publish("mrpc", folders[1])
    assert list(backend.cards()) == ["mrpc"]


def test_a_removal_deletes_nothing_so_that_a_card_published_right_after_it_stays(memory, folders, monkeypatch):
    version = memory.publish("mrpc", folders[0])
    real = BlobStore.replace

    def replace(store, key, data, at):
        written = real(store, key, data, at)
        if data == TOMBSTONE:
            memory.publish("mrpc", folders[1])
        return written

    monkeypatch.setattr(BlobStore, "replace", replace)
    memory.remove("mrpc", version)
    assert memory.card("mrpc")[0] == read_card(folders[1])


@pytest.mark.parametrize("before", ["absent", "removed", "present"])
def test_of_two_writers_that_have_seen_the_same_state_one_wins(backend, folders, monkeypatch, before):
    version = None if before == "absent" else backend.publish("mrpc", folders[2])
    if before == "removed":
        backend.remove("mrpc", version)
        version = None
    real, together, looks = BlobStore.read, threading.Barrier(2), threading.local()

    def read(store, key, most):
        found = real(store, key, most)
        looks.number = getattr(looks, "number", 0) + (key == "cards/mrpc.json")
        if key == "cards/mrpc.json" and looks.number <= 2:  # before anything is sent, and right before the card is
            together.wait(timeout=120)
        return found

    def work(folder):
        try:
            return backend.publish("mrpc", folder, version)
        except Conflict as error:
            return error

    backend._store.check_conditions()
    monkeypatch.setattr(BlobStore, "read", read)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(work, folders[:2]))
    monkeypatch.undo()
    (loser,) = [outcome for outcome in outcomes if isinstance(outcome, Conflict)]
    winner = folders[1 - outcomes.index(loser)]
    assert backend.card("mrpc") == (read_card(winner), outcomes[1 - outcomes.index(loser)])
    assert loser.revision == revision(winner)


def test_a_revision_that_lost_was_never_an_old_one(backend, folders):
    backend.publish("mrpc", folders[0])
    with pytest.raises(Conflict):
        backend.publish("mrpc", folders[1])
    with pytest.raises(UnknownExpert, match="no revision starts with"):
        backend.card("mrpc", revision(folders[1]))


class Died(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("late", [False, True], ids=["before the call", "after the call"])
@pytest.mark.parametrize("operation", ["add", "update", "remove", "rename"])
def test_a_death_at_any_write_leaves_each_name_old_or_new(memory, folders, tmp_path, monkeypatch, operation, late):
    old, new = revision(folders[0]), revision(folders[1])
    states = []
    for last in range(1, 30):
        name, other = f"mrpc-{last}", f"other-{last}"
        version = None if operation == "add" else memory.publish(name, folders[0])
        changes = {
            "add": [Change(name, folders[1], None)],
            "update": [Change(name, folders[1], version)],
            "remove": [Change(name, None, version)],
            "rename": [Change(other, folders[0], None), Change(name, None, version)],
        }[operation]
        died = dies_at(last, late, lambda changes=changes: memory.apply(changes, ""), monkeypatch)
        found = dict(memory.read_cards([name, other]))
        for there in found:
            assert fetched(memory, there, tmp_path) == found[there].revision
        states.append(tuple((one, found[one].revision) for one in (name, other) if one in found))
        memory.apply(changes, "again")
        expected = {"remove": {}, "rename": {other: old}}.get(operation, {name: new})
        assert {one: card.revision for one, card in memory.read_cards([name, other])} == expected
        if not died:
            break
    else:
        raise AssertionError("no end")
    shapes = [tuple(value for _, value in state) for state in states]
    order = {
        "add": [(), (new,)],
        "update": [(old,), (new,)],
        "remove": [(old,), ()],
        "rename": [(old,), (old, old), (old,)],
    }[operation]
    changes_of_state = [shape for place, shape in enumerate(shapes) if place == 0 or shape != shapes[place - 1]]
    assert changes_of_state == order
    assert len(states) > {"add": 3, "update": 4, "remove": 2, "rename": 5}[operation]


def dies_at(last, late, work, monkeypatch):
    """Whether the work was ended at its write number `last`, before or right after it."""
    count = 0
    with monkeypatch.context() as patch:
        for method in (BlobStore.put, BlobStore.replace, BlobStore.delete):

            def call(store, *args, real=method):
                nonlocal count
                count += 1
                if count == last and not late:
                    raise Died
                result = real(store, *args)
                if count == last:
                    raise Died
                return result

            patch.setattr(BlobStore, method.__name__, call)
        try:
            work()
        except Died:
            return True
    return False


@pytest.mark.parametrize("behind_proxy", ["s3"], indirect=True)  # Azure signs the conditions
def test_a_store_that_ignores_conditions_is_not_written(behind_proxy, folders):
    proxy, opened, _ = behind_proxy
    proxy.deaf = True
    backend = opened()
    with pytest.raises(Refused, match="ignores conditions .* lose each other's work"):
        backend.publish("mrpc", folders[0])
    proxy.deaf = False
    assert keys(backend) == []
    backend.publish("mrpc", folders[0])
    proxy.deaf = True
    with pytest.raises(Refused, match="ignores conditions"):
        opened().remove("mrpc", backend.card("mrpc")[1])
    proxy.deaf = False
    assert list(backend.cards()) == ["mrpc"]


@pytest.mark.parametrize("ignored", ["create", "stale"])
def test_each_condition_is_tried(memory, folders, monkeypatch, ignored):
    real = BlobStore.replace

    def replace(store, key, data, version):
        there = store.head(key)
        if ignored == "create" and version is None and there is not None:
            return real(store, key, data, there.version)
        if ignored == "stale" and version is not None and there is not None:
            return real(store, key, data, there.version)
        return real(store, key, data, version)

    monkeypatch.setattr(BlobStore, "replace", replace)
    with pytest.raises(Refused, match={"create": "created again", "stale": "stale ETag"}[ignored]):
        memory.publish("mrpc", folders[0])


def test_a_store_is_asked_for_its_conditions_once(behind_proxy, folders):
    proxy, opened, _ = behind_proxy
    backend = opened()
    backend.publish("a", folders[0])
    proxy.watch()
    backend.publish("b", folders[1])
    backend.derived.check_writable()
    assert not [line for line in proxy.seen if "probe" in line]
    assert len(proxy.seen) == 1 + 2 + 2 + 2 + 1  # look, files, look and write the card, files there? list


def test_a_listing_is_one_request_and_publishing_what_is_there_sends_no_file(behind_proxy, folders):
    proxy, opened, _ = behind_proxy
    backend = opened()
    for number in range(3):
        backend.publish(f"e{number}", folders[number])
    proxy.watch()
    assert len(backend.cards()) == 3
    assert len(proxy.seen) == 1
    proxy.watch()
    backend.publish("e0", folders[0])
    assert not [line for line in proxy.seen if line.startswith(("PUT", "POST"))]


@pytest.mark.slow
def test_eight_processes_lose_nothing_and_of_those_with_one_name_one_wins(s3_server, make, tmp_path):
    folders = make_expert_folders(make, tmp_path, 8)
    make_bucket("s3", s3_server, "eight-processes")
    command = [sys.executable, Path(__file__).with_name("library_scripts.py"), "blob", s3_server, "eight-processes"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(n), folder], **pipes) for n, folder in enumerate(folders)]
    assert all(writer.stdout.readline() == "ready\n" for writer in writers)
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    outcomes = [json.loads(writer.communicate(timeout=120)[0]) for writer in writers]
    backend = BlobBackend(store_of("s3", s3_server, "eight-processes"), "s3://eight-processes/lib", "lib")
    assert list(backend.cards()) == [*(f"expert-{number}" for number in range(8)), "mrpc"]
    assert [own for own, _ in outcomes] == [revision(folder) for folder in folders]
    winner = backend.card("mrpc")[0].revision
    assert sorted(shared for _, shared in outcomes) == sorted([winner, *[f"conflict with {winner}"] * 7])
    assert fetched(backend, "mrpc", tmp_path) == winner


@pytest.mark.parametrize("kind", ["s3", "azure"])
def test_a_bucket_that_is_not_there_is_told(request, folders, kind):
    server = request.getfixturevalue(f"{kind}_server")
    backend = BlobBackend(store_of(kind, server, "not-there"), f"{kind}://not-there", "")
    assert not backend.exists()
    for call in (backend.cards, backend.check_writable, lambda: backend.publish("mrpc", folders[0])):
        with pytest.raises(NoLibrary, match="does not exist"):
            call()


def test_no_right_to_write_is_told_and_no_secret_with_it(behind_proxy, folders):
    proxy, opened, _ = behind_proxy
    backend = opened()
    backend.publish("mrpc", folders[0])
    proxy.always = "deny"
    for call, error in ((backend.cards, Unreachable), (lambda: backend._store.put("x", b"", 0), ReadOnly)):
        with pytest.raises(error, match="with these credentials") as caught:
            call()
        assert "canary" not in str(caught.value)


def test_a_signed_address_is_in_no_error(azure_server, folders):
    from obstore.store import AzureStore

    with BreakingProxy(azure_server) as proxy:
        proxy.always = "busy"
        store = AzureStore(
            "lib",
            account_name="molelab",
            sas_key="sv=2024-11-04&sp=rw&sig=canary%2Fcanary",
            endpoint=proxy.address,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        backend = BlobBackend(store, "az://molelab/lib")
        for call in (backend.cards, lambda: backend.card("x"), lambda: backend.publish("x", folders[0])):
            with pytest.raises(Unreachable, match="503") as caught:
                call()
            error = caught.value
            told = f"{error}{error!r}{pickle.dumps(error)!r}{error.__cause__!r}{getattr(error, '__notes__', None)}"
            assert "canary" not in told


def test_what_is_told_of_a_clients_error_is_its_first_line_without_queries_and_the_stores_own_words():
    body = "<Error><Code>SlowDown</Code><Message>canary</Message></Error>"
    line = f"Error performing PUT https://x/y?sv=1&sig=canary in 3ms - status code: 503 Service Unavailable: {body}"
    status, text = blob_store._told(RuntimeError(f"{line}\n\nDebug source: canary"))
    assert status == 503
    assert text.endswith("status code: 503 Service Unavailable (SlowDown)")
    assert "canary" not in text


def test_a_store_without_etags_is_refused_and_a_weak_one_is_not_taken_for_a_strong_one():
    store = BlobStore(None, "s3://bucket")
    assert store._version("0x8D") == store._version('"0x8D"') == '"0x8D"'
    assert store._version('W/"0x8D"') != '"0x8D"'
    for nothing in (None, ""):
        with pytest.raises(Refused, match="no ETags"):
            store._version(nothing)


@pytest.mark.parametrize("damage", ["changed", "longer", "shorter", "missing"])
def test_a_fetch_of_damage_raises_and_leaves_nothing(backend, folders, tmp_path, damage):
    backend.publish("mrpc", folders[0])
    key = next(key for key in files_of(folders[0], "mrpc") if key.endswith("safetensors"))
    data = backend._store.read(key, 1 << 20)[0]
    if damage == "missing":
        backend._store.delete(key)
    else:
        put = {"changed": data[:-1] + bytes([data[-1] ^ 1]), "longer": data + b"x", "shorter": data[:-1]}[damage]
        backend._store.put(key, put, len(put))
    (tmp_path / "dest").mkdir()
    with pytest.raises(Damaged, match=r"mrpc: adapter_model\.safetensors"):
        backend.fetch("mrpc", tmp_path / "dest")
    assert list((tmp_path / "dest").iterdir()) == []
    with pytest.raises(Damaged):
        backend.verify("mrpc")
    if damage != "changed":
        with pytest.raises(Damaged):
            backend.verify("mrpc", quick=True)


def test_publishing_again_puts_what_is_missing(memory, folders, tmp_path):
    memory.publish("mrpc", folders[0])
    memory._store.delete(files_of(folders[0], "mrpc")[0])
    memory.publish("mrpc", folders[0])
    assert fetched(memory, "mrpc", tmp_path) == revision(folders[0])


@pytest.mark.parametrize("card", [b"{}", b"x" * (257 << 10), b""], ids=["empty object", "too large", "empty"])
def test_a_damaged_card_is_one_error_and_hides_no_other(backend, folders, card):
    backend.publish("mrpc", folders[0])
    backend._store.put("cards/bad.json", card, len(card))
    assert list(backend.cards()) == ["bad", "mrpc"]
    found = dict(backend.read_cards(["bad", "mrpc"]))
    assert isinstance(found["bad"], LibraryError)
    assert found["mrpc"] == read_card(folders[0])
    with pytest.raises(LibraryError):
        backend.card("bad")
    if len(card) == 2:
        backend.publish("bad", folders[1], backend.cards()["bad"])
        assert backend.card("bad")[0] == read_card(folders[1])


def test_foreign_keys_are_no_experts_and_are_told(backend, folders):
    backend.publish("mrpc", folders[0])
    for key in ("cards/Upper.json", "cards/a/b.json", "cards/x.txt", "notes.txt", "other/y"):
        backend._store.put(key, b"foreign, and longer", 19)
    assert list(backend.cards()) == ["mrpc"]
    assert backend.strays() == ["cards/Upper.json", "cards/a/b.json", "cards/x.txt", "notes.txt", "other"]


def test_large_files_are_streamed_and_checked_before_their_last_piece(backend, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(blob_store, "_WHOLE", 100)
    backend.publish("mrpc", folders[0])
    assert fetched(backend, "mrpc", tmp_path) == revision(folders[0])
    weights = folders[1] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match="other content"):
        backend.publish("other", folders[1])
    assert not [key for key in keys(backend) if "other" in key and not key.endswith("config.json")]


@pytest.fixture
def old_enough(monkeypatch):
    """A file is old as soon as it is there."""
    monkeypatch.setattr(blob_garbage, "LEAST_AGE", timedelta(0))


def test_collecting_takes_old_revisions_and_their_files_and_no_others(backend, make, folders, tmp_path, old_enough):
    version, card = None, None
    for folder, seed in zip(folders[:4], (10, 11, 12, 13), strict=True):  # a store's times may be whole seconds
        shutil.rmtree(folder)
        expert = make(seed) if card is None else make(seed).with_card(make(seed).card.next_after(card, "next"))
        expert.save(folder)
        card = expert.card
        version = backend.publish("mrpc", folder, version)
    backend.remove("gone", backend.publish("gone", folders[4]))
    before = keys(backend)
    told = backend.collect(timedelta(0), 1, dry_run=True)
    assert keys(backend) == before
    found = backend.collect(timedelta(0), 1, dry_run=False)
    assert {row.what for row in found} == {row.what for row in told} == set(before) - set(keys(backend))
    assert all(row.size and row.why for row in found)
    for kept in folders[2:4]:
        assert fetched(backend, "mrpc", tmp_path, revision(kept)) == revision(kept)
    for taken in folders[:2]:
        with pytest.raises(UnknownExpert):
            backend.card("mrpc", revision(taken))
    assert fetched(backend, "gone", tmp_path, revision(folders[4])) == revision(folders[4])
    assert backend._store.read("cards/gone.json", 100)[0] == TOMBSTONE
    assert backend.collect(timedelta(0), 1, dry_run=False) == []
    assert len([key for key in keys(backend) if key.startswith("files/mrpc")]) == len(
        {*files_of(folders[2], "mrpc"), *files_of(folders[3], "mrpc")}
    )


def test_collecting_lets_young_files_be_whatever_it_is_told(memory, folders):
    memory._store.put("files/mrpc/0/adapter_model.safetensors", b"x", 1)
    assert memory.publish("other", folders[0])
    assert memory.collect(timedelta(0), 0, dry_run=False) == []


def test_collecting_goes_by_the_clock_of_the_store(memory, folders, monkeypatch):
    class Wrong(blob_garbage.datetime):
        @classmethod
        def now(cls, zone=None):
            return blob_garbage.datetime.max.replace(tzinfo=zone)

    memory.publish("mrpc", folders[0])
    memory._store.put("files/mrpc/0/adapter_model.safetensors", b"x", 1)
    monkeypatch.setattr(blob_garbage, "datetime", Wrong)
    assert memory.collect(timedelta(days=1), 0, dry_run=False) == []


def test_the_files_of_a_card_that_cannot_be_read_stay(memory, folders, old_enough):
    memory.publish("mrpc", folders[0])
    memory._store.put("cards/mrpc.json", b"{}", 2)
    assert memory.collect(timedelta(0), 0, dry_run=False) == []


@pytest.fixture
def unnamed_files(memory, folders):
    """The files of an expert lie there, as long as it takes to be old, and no card names them. Gives the card."""
    memory.publish("other", folders[1])
    card = read_card(folders[0])
    for key in files_of(folders[0], "mrpc"):
        data = (folders[0] / key.rpartition("/")[2]).read_bytes()
        memory._store.put(key, data, len(data))
    return card


def test_what_is_published_while_it_is_being_collected_stays(
    memory, folders, tmp_path, monkeypatch, old_enough, unnamed_files
):
    real, published = BlobStore.rows, []

    def rows(store, folder):
        found = list(real(store, folder))
        if folder == "past":  # the files have been listed, and the cards read
            published.append(memory.publish("mrpc", folders[0]))
        return iter(found)

    monkeypatch.setattr(BlobStore, "rows", rows)
    assert memory.collect(timedelta(0), 0, dry_run=False) == []
    assert published
    assert fetched(memory, "mrpc", tmp_path) == unnamed_files.revision


def test_what_is_collected_while_it_is_being_published_is_put_again(
    memory, folders, tmp_path, monkeypatch, old_enough, unnamed_files
):
    real, taken = BlobStore.replace, []

    def replace(store, key, data, version):
        if key == "cards/mrpc.json":  # the files have been written, the card has not
            taken.extend(memory.collect(timedelta(0), 0, dry_run=False))
        return real(store, key, data, version)

    monkeypatch.setattr(BlobStore, "replace", replace)
    memory.publish("mrpc", folders[0])
    assert {row.what for row in taken} == set(files_of(folders[0], "mrpc"))
    assert fetched(memory, "mrpc", tmp_path) == unnamed_files.revision
