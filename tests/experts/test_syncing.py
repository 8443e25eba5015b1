"""Two libraries brought to the same state: what was changed on one side is copied, on both sides left alone."""

import pytest

from mole.experts import ExpertLibrary, LibraryError, NoLibrary
from mole.experts.syncing import sync


@pytest.fixture
def here(tmp_path):
    return ExpertLibrary.open(str(tmp_path / "here"))


@pytest.fixture
def there(tmp_path):
    return ExpertLibrary.open(str(tmp_path / "there"))


@pytest.fixture
def synced(here, there, make):
    for seed, name in enumerate(("a", "b", "c")):
        here.add_expert(make(seed), name)
    there.add_expert(make(3), "d")
    sync(here, there)
    return here


def told(steps):
    return {step.name: (step.what, step.action) if step.action else step.what for step in steps}


def test_new_experts_go_both_ways_and_twice_is_nothing(here, there, make, monkeypatch):
    here.add_expert(make(0), "a")
    there.add_expert(make(1), "b")
    assert told(sync(here, there)) == {"a": ("copy", "add"), "b": ("copy", "add")}
    assert here.cards() == there.cards()
    monkeypatch.setattr(here.backend, "apply", None)
    monkeypatch.setattr(there.backend, "apply", None)
    assert told(sync(here, there)) == told(sync(there, here)) == {"a": "equal", "b": "equal"}


def test_what_was_changed_on_one_side_is_copied_to_the_other(synced, there, make):
    synced.update_expert("a", make(7))
    there.edit_card("b", tags=["x"])
    there.update_expert("d", make(8))
    assert told(sync(synced, there)) == {
        "a": ("copy", "update"),
        "b": ("copy", "edit"),
        "c": "equal",
        "d": ("copy", "update"),
    }
    assert synced.cards() == there.cards()


def test_what_was_changed_on_both_sides_is_left_alone_and_told_each_time(synced, there, make):
    mine, theirs = synced.update_expert("a", make(7)), there.update_expert("a", make(8))
    synced.edit_card("b", tags=["x"])
    for _ in range(2):
        steps = {step.name: step for step in sync(synced, there)}
        assert steps["a"].what == "conflict"
        assert mine.revision[:8] in steps["a"].why
        assert theirs.revision[:8] in steps["a"].why
    assert (synced.card("a"), there.card("a")) == (mine, theirs)
    assert there.card("b").tags == ("x",)


def test_what_is_gone_stays_on_the_other_side_until_it_may_go(synced, there):
    synced.remove_expert("a")
    for _ in range(2):
        assert told(sync(synced, there))["a"] == "gone"
    assert "a" in there
    assert told(sync(synced, there, delete=True))["a"] == "remove"
    assert "a" not in there
    assert told(sync(synced, there)) == {"b": "equal", "c": "equal", "d": "equal"}


def test_what_is_gone_here_and_was_changed_there_is_a_conflict(synced, there):
    synced.remove_expert("a")
    there.edit_card("a", tags=["kept"])
    assert told(sync(synced, there, delete=True))["a"] == "conflict"
    assert "a" in there


def test_a_replaced_expert_without_common_history_goes_to_the_side_that_was_not_changed(synced, there, make):
    synced.remove_expert("a")
    synced.add_expert(make(9), "a")
    assert told(sync(synced, there))["a"] == ("copy", "update")
    assert there.card("a") == synced.card("a")


def test_a_dry_run_says_the_same_and_writes_nothing(synced, there, make, tmp_path):
    synced.update_expert("a", make(7))
    there.remove_expert("b")

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    steps = sync(synced, there, delete=True, dry_run=True)
    assert files() == before
    assert told(steps) == told(sync(synced, there, delete=True))
    assert synced.cards() == there.cards()


def test_a_state_that_was_lost_loses_no_expert(synced, there, make):
    for file in (synced.backend.root / ".mole" / "sync").iterdir():
        file.unlink()
    synced.update_expert("a", make(7))
    there.remove_expert("b")
    assert told(sync(synced, there, delete=True)) == {
        "a": ("copy", "update"),
        "b": ("copy", "add"),
        "c": "equal",
        "d": "equal",
    }


def test_a_state_that_is_none_is_told(synced, there):
    (file,) = (synced.backend.root / ".mole" / "sync").iterdir()
    for text in ("[]", '{"format": 1, "revisions": {"../x": "y"}}', "{"):
        file.write_text(text)
        with pytest.raises(LibraryError, match=r"\.json"):
            sync(synced, there)


def test_two_that_are_not_there_one_that_is_both_and_no_folder_are_told(here, there, tmp_path):
    with pytest.raises(NoLibrary):
        sync(here, there)
    with pytest.raises(LibraryError, match="are one library"):
        sync(here, ExpertLibrary.open(f"file://{here.backend.root}"))
    with pytest.raises(LibraryError, match="has to be a folder"):
        sync(ExpertLibrary.open("memory://one"), ExpertLibrary.open("memory://two"))
