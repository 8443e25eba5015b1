"""Copies between libraries: what differs is carried over, nobody's work is taken back, and twice is once."""

import pytest

from mole.experts import Conflict, ExpertLibrary, LibraryError, NoLibrary, UnknownExpert
from mole.experts.copying import WRITTEN, clone


@pytest.fixture
def here(tmp_path):
    return ExpertLibrary.open(str(tmp_path / "here"))


@pytest.fixture
def there(tmp_path):
    return ExpertLibrary.open(str(tmp_path / "there"))


@pytest.fixture
def filled(here, make):
    for seed, name in enumerate(("a", "b", "c")):
        here.add_expert(make(seed), name)
    return here


def actions(steps):
    return {step.name: step.action for step in steps}


def test_a_copy_is_the_same_revisions_and_again_is_nothing(filled, there, monkeypatch):
    assert actions(there.copy_from(filled)) == {"a": "add", "b": "add", "c": "add"}
    assert there.cards() == filled.cards()
    assert there["a"].adapter.tensors().keys() == filled["a"].adapter.tensors().keys()
    monkeypatch.setattr(there.backend, "apply", None)
    monkeypatch.setattr(filled.backend, "fetch", None)
    assert actions(there.copy_from(filled)) == {"a": "equal", "b": "equal", "c": "equal"}


def test_a_dry_run_says_the_same_and_writes_nothing(filled, there, tmp_path):
    assert actions(there.copy_from(filled, dry_run=True)) == {"a": "add", "b": "add", "c": "add"}
    assert not (tmp_path / "there").exists()


def test_names_and_conditions_choose(filled, there):
    assert actions(there.copy_from(filled, ["c", "a"])) == {"a": "add", "c": "add"}
    assert actions(there.copy_from(filled, where={"names": "b*"})) == {"b": "add"}
    with pytest.raises(UnknownExpert, match="did you mean"):
        there.copy_from(filled, ["aa"])


def test_what_comes_from_what_is_there_is_an_update_and_an_edit(filled, there, make):
    there.copy_from(filled)
    filled.update_expert("a", make(7))
    filled.update_expert("a", make(8))
    filled.edit_card("b", tags=["new"])
    assert actions(there.copy_from(filled)) == {"a": "update", "b": "edit", "c": "equal"}
    assert there.cards() == filled.cards()


@pytest.fixture
def clash(filled, there, make):
    """`a` has other content on both sides, `b` was edited there only, `c` was edited on both sides."""
    there.copy_from(filled)
    filled.update_expert("a", make(7))
    there.update_expert("a", make(8))
    there.edit_card("b", tags=["theirs"])
    filled.edit_card("c", tags=["mine"])
    there.edit_card("c", tags=["theirs"])
    return there.cards()


def test_a_conflict_names_all_and_writes_nothing(filled, there, clash):
    with pytest.raises(Conflict, match=r"a \(was changed on both sides.*b \(is newer there.*on_conflict=skip"):
        there.copy_from(filled)
    assert there.cards() == clash


def test_skip_leaves_conflicts_alone_and_copies_the_rest(filled, there, clash):
    assert actions(there.copy_from(filled, on_conflict="skip")) == {"a": "skip", "b": "skip", "c": "edit"}
    assert there.card("a") == clash["a"]
    assert there.card("b") == clash["b"]
    assert there.card("c") == filled.card("c")


def test_replace_puts_ours_there_and_theirs_stays_readable(filled, there, clash):
    steps = there.copy_from(filled, on_conflict="replace")
    assert actions(steps) == {"a": "replace", "b": "replace", "c": "edit"}
    assert there.cards() == filled.cards()
    assert there.card("a", clash["a"].revision) == clash["a"]


def test_an_unknown_way_is_told(filled, there):
    with pytest.raises(LibraryError, match="known are fail, skip, replace"):
        there.copy_from(filled, on_conflict="merge")  # type: ignore[arg-type]


def test_whoever_writes_between_plan_and_copy_wins(filled, there, make, monkeypatch):
    there.copy_from(filled)
    filled.update_expert("a", make(7))
    other = ExpertLibrary.open(there.url)
    real = there.backend.card

    def card(name, revision=None):
        if not other.history("a")[1:]:
            other.update_expert("a", make(9), message="theirs")
        return real(name, revision)

    monkeypatch.setattr(there.backend, "card", card)
    with pytest.raises(Conflict):
        there.copy_from(filled)
    assert other.card("a").message == "theirs"


def test_damage_on_the_way_copies_nothing_of_that_batch(filled, there):
    weights = filled.backend.root / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(LibraryError, match="bytes instead of"):
        there.copy_from(filled)
    assert not there.exists()


def test_an_interrupted_copy_is_finished_by_the_next(filled, there, monkeypatch):
    monkeypatch.setattr("mole.experts.copying._BATCH", 1)
    real, calls = there.backend.apply, []

    def apply(changes, message, **more):
        calls.append(message)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(changes, message, **more)

    monkeypatch.setattr(there.backend, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        there.copy_from(filled)
    assert there.names() == ["a"]
    assert actions(there.copy_from(filled)) == {"a": "equal", "b": "add", "c": "add"}


def test_batches_are_of_whole_experts_and_progress_is_told(filled, there, monkeypatch):
    monkeypatch.setattr("mole.experts.copying._OPERATIONS", 8)  # four files each
    sizes, told = [], []
    real = there.backend.apply
    monkeypatch.setattr(there.backend, "apply", lambda c, m, **more: (sizes.append(len(c)), real(c, m, **more)))
    there.copy_from(filled, progress=lambda done, total: told.append((done, total)))
    assert sizes == [2, 1]
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_no_weights_are_kept_in_memory_or_on_disk_beyond_a_batch(filled, there, monkeypatch, tmp_path):
    """The staging folder of one batch is gone before the next begins."""
    monkeypatch.setattr("mole.experts.copying._BATCH", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = []
    real = there.backend.apply

    def apply(changes, message, **more):
        left.append(len(list(tmp_path.glob("mole-batch-*/*"))))
        real(changes, message, **more)

    monkeypatch.setattr(there.backend, "apply", apply)
    there.copy_from(filled)
    assert left == [1, 1, 1]
    assert not list(tmp_path.glob("mole-*"))


class TestDiff:
    def test_what_differs_is_told_by_kind_and_field(self, filled, there, make):
        there.copy_from(filled)
        filled.add_expert(make(5), "mine")
        there.add_expert(make(6), "theirs")
        filled.edit_card("a", tags=["x"], description="y")
        there.update_expert("b", make(7, license="mit"))
        found = {row.name: (row.kind, row.fields) for row in filled.diff(there)}
        assert found == {
            "a": ("card", ("tags", "description")),
            "b": ("content", ("license",)),
            "mine": ("only here", ()),
            "theirs": ("only there", ()),
        }

    def test_equal_libraries_differ_in_nothing(self, filled, there):
        there.copy_from(filled)
        assert filled.diff(there) == []


class TestClone:
    def test_everything_is_copied_artefacts_too(self, filled, there):
        filled.artefact("a", "numbers", {"k": 2}, lambda: {"x": [1, 2]})
        steps = clone(filled, there)
        assert all(step.action in WRITTEN for step in steps)
        assert there.cards() == filled.cards()
        assert there.artefact("a", "numbers", {"k": 2}) == {"x": [1, 2]}

    def test_with_history_old_revisions_come_along(self, filled, there, make):
        first = filled.card("a")
        filled.update_expert("a", make(7))
        filled.update_expert("a", make(8))
        filled.edit_card("b", tags=["x"])
        clone(filled, there, history=True)
        assert there.cards() == filled.cards()
        assert there.history("a") == filled.history("a")
        assert there.get_expert("a", first.revision).adapter.parameters() == first.adapter["parameters"]

    def test_without_history_they_do_not(self, filled, there, make):
        first = filled.card("a")
        filled.update_expert("a", make(7))
        clone(filled, there)
        with pytest.raises(UnknownExpert):
            there.card("a", first.revision)

    def test_a_target_with_experts_is_a_conflict(self, filled, there, make):
        there.add_expert(make(9), "z")
        with pytest.raises(Conflict, match="has 1 experts; clone into a new"):
            clone(filled, there)

    def test_a_source_that_is_not_there_makes_nothing(self, here, there):
        with pytest.raises(NoLibrary):
            clone(here, there)
        assert not there.exists()
