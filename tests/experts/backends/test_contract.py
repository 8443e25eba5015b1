"""The laws of a backend, for every backend. A new one joins as one more kind of place."""

import threading
from dataclasses import replace

import pytest
from servers import PLACES

from mole.experts import (
    Conflict,
    Damaged,
    ExpertLibrary,
    LibraryError,
    NoLibrary,
    Refused,
    UnknownExpert,
    load_expert,
    read_card,
)
from mole.experts.artefact_card import new_artefact
from mole.experts.backends import Change
from mole.experts.backends.entries import ARTEFACTS, EXPERTS
from mole.experts.card import bytes_facts
from mole.experts.folder import write_card


@pytest.fixture(params=PLACES)
def reopen(request, open_place):
    """Opens the test's own empty library: the same place with each call, as another program would."""
    return lambda: open_place(request.param)


@pytest.fixture
def backend(reopen):
    return reopen()


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
    assert list(backend.cards()) == ["mrpc"]
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


@pytest.mark.parametrize("before", ["absent", "removed", "present"])
def test_of_eight_writers_of_one_name_one_wins_and_the_others_are_told(reopen, folders, before):
    backend, version = reopen(), None
    if before != "absent":
        version = backend.publish("mrpc", folders(8))
    if before == "removed":
        backend.remove("mrpc", version)
        version = None
    outcomes = at_once([lambda seed=seed: reopen().publish("mrpc", folders(seed), version) for seed in range(8)])
    losers = [outcome for outcome in outcomes if isinstance(outcome, Conflict)]
    assert len(losers) == 7, outcomes
    assert all(loser.revision == backend.card("mrpc")[0].revision for loser in losers)
    (winner,) = [seed for seed, outcome in enumerate(outcomes) if not isinstance(outcome, Conflict)]
    assert backend.card("mrpc") == (read_card(folders(winner)), outcomes[winner])


def test_eight_writers_of_names_of_their_own_lose_nothing_and_see_no_conflict(reopen, folders, tmp_path):
    backend, names = reopen(), [f"expert-{seed}" for seed in range(8)]
    versions = at_once([lambda seed=s: reopen().publish(names[seed], folders(seed)) for s in range(8)])
    assert list(backend.cards()) == names
    assert [backend.card(name)[1] for name in names] == versions
    assert fetched(backend, names[7], tmp_path) == content(folders(7))


def at_once(calls):
    """What each call gave or raised; all have started before the first goes on."""
    barrier, outcomes = threading.Barrier(len(calls)), [None] * len(calls)

    def work(number, call):
        barrier.wait()
        try:
            outcomes[number] = call()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_a_reader_beside_a_writer_gets_one_revision_whole_and_never_misses_the_name(reopen, folders, tmp_path):
    version = reopen().publish("mrpc", folders(0))
    contents = [content(folders(seed)) for seed in range(2)]
    done = threading.Event()

    def write():
        backend, at = reopen(), version
        try:
            for turn in range(1, 9):
                at = backend.publish("mrpc", folders(turn % 2), at)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    backend, reads = reopen(), 0
    while not done.is_set() or not reads:
        assert list(backend.cards()) == ["mrpc"]
        assert fetched(backend, "mrpc", tmp_path) in contents
        reads += 1
    writer.join()
    assert backend.card("mrpc")[0] == read_card(folders(0))


def test_the_token_of_a_listing_changes_with_the_card_and_only_with_it(backend, folders):
    version = backend.publish("a", folders(0))
    backend.publish("b", folders(1))
    before = backend.cards()
    assert backend.cards() == before
    backend.publish("a", folders(0, tags=["new"]), version)
    after = backend.cards()
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]


def test_many_cards_are_read_in_the_order_of_the_names_and_absent_ones_left_out(backend, folders):
    for seed, name in enumerate(("c", "a", "b")):
        backend.publish(name, folders(seed))
    found = list(backend.read_cards(["b", "gone", "c", "a"]))
    assert found == [("b", read_card(folders(2))), ("c", read_card(folders(0))), ("a", read_card(folders(1)))]


def test_a_batch_adds_updates_and_removes(backend, folders, tmp_path):
    first = backend.publish("a", folders(0))
    second = backend.publish("b", folders(1))
    changes = [Change("a", folders(2), first), Change("c", folders(1), None), Change("b", None, second)]
    backend.apply(changes, "three at once")
    assert list(backend.cards()) == ["a", "c"]
    assert fetched(backend, "a", tmp_path) == content(folders(2))
    assert fetched(backend, "c", tmp_path) == content(folders(1))
    before = backend.cards()
    backend.apply(changes, "and again, as its reply was lost")
    assert backend.cards() == before
    backend.apply([], "nothing")
    assert backend.cards() == before


@pytest.mark.parametrize("wrong", ["expect", "taken", "removed", "damaged"])
def test_a_batch_with_one_change_that_cannot_be_made_makes_none(backend, folders, wrong):
    first = backend.publish("a", folders(0))
    backend.publish("b", folders(1))
    bad = {
        "expect": Change("b", folders(3), first),
        "taken": Change("b", folders(3), None),
        "removed": Change("c", folders(3), first),
        "damaged": Change("c", folders(3), None),
    }[wrong]
    if wrong == "damaged":
        (folders(3) / "expert.json").write_text("{}")
    before = backend.cards()
    with pytest.raises(Damaged if wrong == "damaged" else Conflict):
        backend.apply([Change("a", folders(2), first), Change("new", folders(4), None), bad], "four")
    assert backend.cards() == before


def test_a_batch_names_an_expert_once_and_says_what_it_removes(backend, folders):
    with pytest.raises(LibraryError, match="stands twice"):
        backend.apply([Change("a", folders(0), None), Change("a", folders(1), None)], "twice")
    with pytest.raises(LibraryError, match="which version is expected"):
        backend.apply([Change("a", folders(0), None), Change("b", None, None)], "which b")
    assert not backend.exists()


def artefact(tmp_path, number=0):
    """The folder of an artefact, and its card."""
    data = b'{"number": %d}' % number
    card = new_artefact("arrow", 1, {"rank": number}, ["a" * 64], {"data.json": bytes_facts(data)})
    folder = tmp_path / f"artefact-{number}"
    folder.mkdir()
    (folder / "data.json").write_bytes(data)
    write_card(card, folder, ARTEFACTS)
    return folder, card


def test_artefacts_lie_beside_the_experts_under_the_same_laws(backend, reopen, folders, tmp_path):
    backend.publish("mrpc", folders())
    derived = backend.derived
    assert derived.cards() == {}
    (folder, card), (other, other_card) = artefact(tmp_path), artefact(tmp_path, 1)
    version = derived.publish(card.name, folder)
    derived.publish(other_card.name, other)
    assert sorted(reopen().derived.cards()) == sorted([card.name, other_card.name])
    assert derived.card(card.name) == (card, version)
    assert fetched(derived, card.name, tmp_path) == content(folder)
    with pytest.raises(Conflict):
        derived.publish(card.name, other)
    with pytest.raises(LibraryError, match="cannot be an artefact's name"):
        derived.publish("mrpc", folder)
    derived.remove(card.name, version)
    assert list(derived.cards()) == [other_card.name]
    assert list(backend.cards()) == ["mrpc"]
    assert derived.verify(other_card.name) == other_card


def test_the_artefacts_of_no_library_are_none(backend, tmp_path):
    for call in (backend.derived.cards, lambda: backend.derived.card(f"{'a' * 16}.arrow.{'b' * 16}")):
        with pytest.raises(NoLibrary):
            call()
    assert not backend.derived.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_is_whole_is_verified_and_what_does_not_belong_there_is_none(backend, folders):
    backend.publish("mrpc", folders())
    assert backend.verify("mrpc") == backend.verify("mrpc", quick=True) == read_card(folders())
    assert backend.strays() == []


def test_a_backend_says_how_long_removed_bytes_remain_and_that_it_can_be_written(backend, folders):
    assert backend.after_removal
    backend.check_writable()
    backend.publish("mrpc", folders())
    backend.check_writable()


def test_what_is_damaged_has_a_version_by_which_it_is_replaced_or_removed(backend, folders, monkeypatch):
    def parse(data, where):
        if where == f"{backend.url}/mrpc" and data == (folders(0) / "expert.json").read_bytes():
            raise Damaged(f"{where}: damaged")
        return EXPERTS.parse(data, where)

    backend.publish("mrpc", folders(0))
    monkeypatch.setattr(backend, "_entries", replace(EXPERTS, parse=parse))
    library = ExpertLibrary(backend)
    with pytest.raises(Damaged):
        backend.card("mrpc")
    with pytest.raises(Damaged, match="mole library remove"):
        library.rename_expert("mrpc", "other")
    library.update_expert("mrpc", load_expert(folders(1)))
    assert library.card("mrpc") == read_card(folders(1))
    backend.publish("mrpc", folders(0), backend.version("mrpc"))
    assert library.remove_expert("mrpc") is None
    assert backend.version("mrpc") is None
    assert library.names() == []


def test_old_revisions_are_found_under_the_name_that_an_expert_has_now(backend, folders, tmp_path):
    library = ExpertLibrary(backend)
    first = library.add_expert(load_expert(folders(0)), "old")
    second = library.update_expert("old", load_expert(folders(1)))
    library.rename_expert("old", "new")
    assert backend.bearers(first.revision) == ["old"]
    assert library.card("new", first.revision[:8]) == first
    library.get_expert("new", first.revision[:8]).save(tmp_path / "saved")
    assert content(tmp_path / "saved").keys() == content(folders(0)).keys()
    restored = library.restore_expert("new", first.revision[:8])
    assert restored.content == first.content
    assert [row["revision"] for row in restored.history] == [second.revision, first.revision]
    with pytest.raises(UnknownExpert):
        library.card("new", "0" * 64)
