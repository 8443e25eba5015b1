"""The laws of a backend, for every backend. A new one joins as one more parameter of `backend`."""

import threading

import pytest

from mole.experts import Conflict, Damaged, LibraryError, LocalBackend, NoLibrary, Refused, UnknownExpert, read_card


@pytest.fixture(params=["local"])
def backend(request, tmp_path):
    return {"local": lambda: LocalBackend(tmp_path / "lib")}[request.param]()


@pytest.fixture
def folders(make, tmp_path):
    """Saves the expert of a seed and gives its folder."""

    def saved(seed=0, **facts):
        folder = tmp_path / f"expert-{seed}-{len(facts)}"
        if not folder.exists():
            make(seed, **facts).save(folder)
        return folder

    return saved


def fetched(backend, name, tmp_path, revision=None):
    dest = tmp_path / f"fetched-{len(list(tmp_path.iterdir()))}"
    dest.mkdir()
    backend.fetch(name, dest, revision)
    return {path.name: path.read_bytes() for path in dest.iterdir()}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_published_is_listed_and_fetched_byte_for_byte(backend, folders, tmp_path):
    version = backend.publish("mrpc", folders())
    assert backend.cards() == {"mrpc": version}
    assert backend.card("mrpc") == (read_card(folders()), version)
    assert fetched(backend, "mrpc", tmp_path) == content(folders())


def test_a_listing_is_sorted_by_name(backend, folders):
    for name in ("b", "c", "a"):
        backend.publish(name, folders())
    assert list(backend.cards()) == ["a", "b", "c"]


def test_a_taken_name_is_a_conflict_that_tells_the_revision_and_changes_nothing(backend, folders):
    backend.publish("mrpc", folders(0))
    with pytest.raises(Conflict) as caught:
        backend.publish("mrpc", folders(1))
    assert caught.value.revision == backend.card("mrpc")[0].revision == read_card(folders(0)).revision


def test_an_update_that_expects_another_version_is_a_conflict_and_changes_nothing(backend, folders):
    first = backend.publish("mrpc", folders(0))
    backend.publish("mrpc", folders(1), first)
    with pytest.raises(Conflict):
        backend.publish("mrpc", folders(2), first)
    with pytest.raises(Conflict):
        backend.remove("mrpc", first)
    with pytest.raises(Conflict, match="removed by somebody else"):
        backend.publish("other", folders(2), first)
    assert backend.card("mrpc")[0] == read_card(folders(1))
    assert list(backend.cards()) == ["mrpc"]


def test_asking_again_is_success(backend, folders):
    first = backend.publish("mrpc", folders(0))
    assert backend.publish("mrpc", folders(0)) == first
    second = backend.publish("mrpc", folders(1), first)
    assert backend.publish("mrpc", folders(1), first) == second
    backend.remove("mrpc", second)
    backend.remove("mrpc", second)
    assert backend.cards() == {}


def test_a_removed_name_is_free_again(backend, folders):
    backend.remove("mrpc", backend.publish("mrpc", folders(0)))
    with pytest.raises(UnknownExpert):
        backend.card("mrpc")
    backend.publish("mrpc", folders(1))
    assert backend.card("mrpc")[0] == read_card(folders(1))


def test_a_changed_card_alone_is_another_version(backend, folders):
    first = backend.publish("mrpc", folders(0))
    second = backend.publish("mrpc", folders(0, tags=["new"]), first)
    assert first != second
    assert backend.card("mrpc")[0].tags == ("new",)


def test_old_revisions_stay_readable_also_after_removal(backend, folders, tmp_path):
    first = backend.publish("mrpc", folders(0))
    second = backend.publish("mrpc", folders(1), first)
    old, new = (read_card(folders(seed)).revision for seed in (0, 1))
    assert fetched(backend, "mrpc", tmp_path, old[:8]) == content(folders(0))
    assert fetched(backend, "mrpc", tmp_path, new) == content(folders(1))
    backend.remove("mrpc", second)
    assert fetched(backend, "mrpc", tmp_path, new[:12]) == content(folders(1))


@pytest.mark.parametrize("revision", ["0123", "main", "*" * 8, "A" * 8, "../" * 4])
def test_a_revision_is_hexadecimal(backend, folders, revision):
    backend.publish("mrpc", folders())
    with pytest.raises(LibraryError, match="8 to 64"):
        backend.card("mrpc", revision)


def test_an_unknown_revision_is_told(backend, folders):
    backend.publish("mrpc", folders())
    with pytest.raises(UnknownExpert, match="no revision starts with 00000000"):
        backend.card("mrpc", "00000000")


def test_an_unknown_name_is_told_with_a_near_one(backend, folders):
    backend.publish("mrpc", folders())
    with pytest.raises(UnknownExpert, match="unknown expert 'mrcp'; did you mean mrpc"):
        backend.card("mrcp")


@pytest.mark.parametrize("name", ["../x", "Upper", ".mole", "", "con"])
def test_a_bad_name_is_refused_in_every_method(backend, folders, tmp_path, name):
    backend.publish("mrpc", folders())
    (tmp_path / "dest").mkdir()
    for call in (
        lambda: backend.publish(name, folders()),
        lambda: backend.card(name),
        lambda: backend.fetch(name, tmp_path / "dest"),
        lambda: backend.remove(name, "x"),
        lambda: backend.verify(name),
    ):
        with pytest.raises(LibraryError, match="cannot be an expert's name"):
            call()
    assert list(backend.cards()) == ["mrpc"]


def test_reading_where_no_library_is_says_so_and_makes_nothing(backend, tmp_path):
    for call in (backend.cards, lambda: backend.card("x"), lambda: backend.remove("x", "y"), backend.strays):
        with pytest.raises(NoLibrary, match="no library there"):
            call()
    assert not backend.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "shortened", "missing", "not listed", "linked", "card"])
def test_a_folder_that_is_not_what_its_card_says_is_not_published(backend, folders, tmp_path, damage):
    folder, weights = folders(), folders() / "adapter_model.safetensors"
    backend.publish("other", folders(1))
    data = weights.read_bytes()
    if damage == "changed":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "shortened":
        weights.write_bytes(data[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "not listed":
        (folder / "notes.txt").write_text("hello")
    elif damage == "linked":
        weights.rename(tmp_path / "away")
        weights.symlink_to(tmp_path / "away")
    else:
        (folder / "expert.json").write_text("{}")
    with pytest.raises((Damaged, Refused)):
        backend.publish("mrpc", folder)
    assert list(backend.cards()) == ["other"]
    backend.publish("mrpc", folders(2))


def test_a_writer_that_fails_in_the_middle_leaves_nothing(backend, folders, monkeypatch):
    import errno
    import os

    first = backend.publish("mrpc", folders(0))
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        backend.publish("mrpc", folders(1), first)
    monkeypatch.setattr(os, "fsync", real)
    assert backend.card("mrpc") == (read_card(folders(0)), first)
    backend.publish("mrpc", folders(1), first)


def test_threads_that_share_an_object_publish_one_name_with_one_winner(backend, folders):
    sources = [folders(seed) for seed in range(8)]
    barrier, outcomes = threading.Barrier(8), []

    def work(folder):
        barrier.wait()
        try:
            backend.publish("mrpc", folder)
            outcomes.append(read_card(folder).revision)
        except Conflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=work, args=(folder,)) for folder in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("conflict") == 7
    assert backend.card("mrpc")[0].revision in outcomes
