"""Changes of a library beyond adding: batches, edited cards, new names, old revisions, scores, garbage."""

from datetime import timedelta

import pytest

from mole.experts import Conflict, ExpertLibrary, LibraryError, ReadOnly, UnknownExpert
from mole.experts.collecting import duration
from mole.experts.expert_cache import Limits
from mole.untrusted import Refused


def files_below(library):
    root = library.backend.root
    return {str(path.relative_to(root)) for path in root.rglob("*")} - {".mole/lock"} if root.exists() else set()


@pytest.fixture
def filled(library, make):
    for seed, name in enumerate(("a", "b", "c")):
        library.add_expert(make(seed), name)
    return library


class TestBatch:
    def test_all_changes_are_made_when_it_ends_and_none_before(self, filled, make):
        with filled.batch("nightly") as batch:
            batch.add_expert(make(5), "d")
            batch.update_expert("a", make(6))
            batch.remove_expert("b")
            batch.edit_card("c", tags=["new"])
            assert filled.names() == ["a", "b", "c"]
            assert len(batch) == 4
        assert filled.names() == ["a", "c", "d"]
        assert filled.card("a").content == make(6).card.content
        assert filled.card("c").tags == ("new",)

    def test_one_that_raises_in_its_body_writes_nothing_and_leaves_nothing(self, filled, make):
        before = files_below(filled)

        class Mine(Exception):
            pass

        def body():
            with filled.batch() as batch:
                batch.add_expert(make(5), "d")
                batch.remove_expert("a")
                raise Mine

        with pytest.raises(Mine):
            body()
        assert files_below(filled) == before
        filled.add_expert(make(5), "d")

    def test_every_expectation_is_checked_before_the_first_change_is_made(self, filled, make):
        other = ExpertLibrary.open(filled.url)

        def body():
            with filled.batch() as batch:
                batch.add_expert(make(5), "new")
                batch.update_expert("b", make(6))
                other.update_expert("b", make(7), message="theirs")

        with pytest.raises(Conflict):
            body()
        assert filled.names() == ["a", "b", "c"]
        assert filled.card("b").message == "theirs"

    def test_a_name_is_changed_once(self, filled, make):
        def body():
            with filled.batch() as batch:
                batch.remove_expert("a")
                batch.add_expert(make(5), "a")

        with pytest.raises(LibraryError, match="'a' is changed twice"):
            body()
        assert filled.names() == ["a", "b", "c"]

    def test_broken_weights_stop_it(self, filled, make, tmp_path):
        from mole.experts import load_expert

        make(5).save(tmp_path / "bad")
        weights = tmp_path / "bad" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])

        def body():
            with filled.batch() as batch:
                batch.add_expert(make(6), "fine")
                batch.add_expert(load_expert(tmp_path / "bad"), "bad")

        with pytest.raises(LibraryError):
            body()
        assert filled.names() == ["a", "b", "c"]

    def test_a_library_that_was_opened_read_only_has_none(self, filled):
        with pytest.raises(ReadOnly), ExpertLibrary.open(filled.url, read_only=True).batch():
            raise AssertionError


class TestEdit:
    def test_the_content_stays_and_the_revision_does_not(self, library, expert):
        library.add_expert(expert, "a")
        card = library.edit_card("a", tags=["glue", "en"], description="Sums.", message="told more")
        assert card == library.card("a")
        assert (card.tags, card.description, card.message) == (("glue", "en"), "Sums.", "told more")
        assert card.content == expert.card.content
        assert card.parent == expert.revision
        assert [row["revision"] for row in library.history("a")] == [card.revision, expert.revision]

    def test_what_says_nothing_new_is_no_change(self, library, expert):
        library.add_expert(expert, "a")
        assert library.edit_card("a", tasks=["sums"]).revision == expert.revision
        assert len(library.history("a")) == 1

    @pytest.mark.parametrize("facts", [{"files": {}}, {"kind": "mixture"}, {"tgas": ["x"]}, {"revision": "0" * 64}])
    def test_only_some_fields_can_be_edited(self, library, expert, facts):
        library.add_expert(expert, "a")
        with pytest.raises(LibraryError, match="unknown field that can be edited"):
            library.edit_card("a", **facts)

    def test_another_edit_meanwhile_is_a_conflict(self, library, expert):
        library.add_expert(expert, "a")
        ExpertLibrary.open(library.url).edit_card("a", tags=["theirs"])
        with pytest.raises(Conflict, match="expected was"):
            library.edit_card("a", tags=["mine"])
        assert library.card("a").tags == ("theirs",)


class TestRename:
    def test_card_history_and_weights_go_along(self, library, expert, make):
        library.add_expert(expert, "a")
        library.update_expert("a", make(1))
        before = library.history("a")
        library.rename_expert("a", "b")
        assert library.names() == ["b"]
        assert library.history("b") == before
        assert library["b"].adapter.parameters() == expert.adapter.parameters()

    def test_a_taken_name_is_a_conflict_and_changes_nothing(self, filled):
        with pytest.raises(Conflict, match="'b' is taken|b is there"):
            filled.rename_expert("a", "b")
        assert filled.names() == ["a", "b", "c"]

    def test_a_bad_name_and_its_own_are_refused(self, filled):
        with pytest.raises(LibraryError, match="how about"):
            filled.rename_expert("a", "A b")
        with pytest.raises(LibraryError, match="its name already"):
            filled.rename_expert("a", "a")


class TestRestore:
    def test_an_old_revision_is_on_top_again_as_a_new_one(self, library, expert, make):
        library.add_expert(expert, "a")
        second = library.update_expert("a", make(1))
        card = library.restore_expert("a", expert.revision[:8])
        assert card.content == expert.card.content
        assert card.parent == second.revision
        assert card.message == f"restored {expert.revision[:8]}"
        assert [row["revision"] for row in library.history("a")] == [card.revision, second.revision, expert.revision]
        assert library["a"].adapter.tensors().keys() == expert.adapter.tensors().keys()

    def test_the_current_one_is_no_change(self, library, expert):
        library.add_expert(expert, "a")
        assert library.restore_expert("a", expert.revision).revision == expert.revision
        assert len(library.history("a")) == 1

    def test_a_removed_expert_comes_back_as_it_was(self, library, expert):
        library.add_expert(expert, "a")
        library.remove_expert("a")
        assert library.restore_expert("a", expert.revision) == expert.card
        assert library.card("a") == expert.card

    def test_an_unknown_revision_is_told(self, library, expert):
        library.add_expert(expert, "a")
        with pytest.raises(UnknownExpert, match="no revision"):
            library.restore_expert("a", "0" * 8)


class TestScores:
    def row(self, value, **more):
        return {"metric": "accuracy", "value": value, "task": "sums", "split": "test", **more}

    def test_a_score_takes_the_place_of_one_with_the_same_key(self, library, make):
        library.add_expert(make(0, scores=[]), "a")
        library.add_score("a", self.row(0.5))
        library.add_score("a", self.row(0.6))
        library.add_score("a", self.row(0.7, config="77aa"))
        assert [(row["value"], row["config"]) for row in library.scores("a")] == [(0.6, None), (0.7, "77aa")]

    def test_the_best_is_of_one_metric_task_split_and_config(self, library, make):
        for seed, (name, value) in enumerate((("a", 0.5), ("b", 0.9), ("c", 0.7))):
            library.add_expert(make(seed, scores=[]), name)
            library.add_score(name, self.row(value))
        library.add_expert(make(4, scores=[]), "none")
        found = library.best("sums", metric="accuracy")
        assert (found.name, found.score["value"], found.compared, found.without) == ("b", 0.9, 3, 1)
        library.add_score("a", self.row(0.99, split="train"))
        with pytest.raises(LibraryError, match="unlike ways: split=test .*split=train"):
            library.best("sums", metric="accuracy")
        assert library.best("sums", metric="accuracy", split="test").name == "b"
        assert library.best("sums", metric="accuracy", split="train").without == 3

    def test_lower_may_be_better(self, library, make):
        for seed, (name, value) in enumerate((("a", 0.5), ("b", 0.9))):
            library.add_expert(make(seed, scores=[]), name)
            library.add_score(name, {**self.row(value), "metric": "loss", "higher_is_better": False})
        assert library.best("sums", metric="loss").name == "a"

    def test_a_metric_that_nobody_has_lists_what_there_is(self, library, expert):
        library.add_expert(expert, "a")
        with pytest.raises(LibraryError, match=r"there are: accuracy of sums"):
            library.best("sums", metric="bleu")


class TestConditions:
    @pytest.fixture
    def scored(self, library, make):
        for seed, (name, value, year) in enumerate((("a", 0.5, 2024), ("b", 0.9, 2025))):
            rows = [{**TestScores().row(value), "higher_is_better": True, "config": None, "dataset": None}]
            library.add_expert(
                make(seed, scores=[{**rows[0], "examples": None}], created=f"{year}-05-01T00:00:00Z"), name
            )
        return library

    @pytest.mark.parametrize(
        ("where", "names"),
        [
            ({"min_score": "accuracy:0.8"}, ["b"]),
            ({"max_score": "accuracy:sums:0.5"}, ["a"]),
            ({"created_after": "2024-05-01"}, ["a", "b"]),
            ({"created_after": "2024-06-01"}, ["b"]),
        ],
    )
    def test_scores_and_dates(self, scored, where, names):
        assert list(scored.cards(where)) == names

    @pytest.mark.parametrize(
        ("where", "told"),
        [
            ({"min_score": "accuracy:products:0.1"}, "there are: accuracy:sums:0.5"),
            ({"min_score": "accuracy"}, "wanted is <metric>:<value>"),
            ({"min_score": "accuracy:high"}, "wanted is <metric>:<value>"),
            ({"created_after": "yesterday"}, "wanted is a day"),
            ({"created_after": "2026-01-01"}, "no expert has created_after"),
        ],
    )
    def test_what_cannot_be_is_told(self, scored, where, told):
        with pytest.raises(LibraryError, match=told):
            scored.cards(where)


class TestGarbage:
    def test_old_revisions_beyond_those_kept_go_and_only_if_they_are_old(self, library, make):
        library.add_expert(make(0), "a")
        for seed in range(1, 4):
            library.update_expert("a", make(seed))
        assert library.gc("1d", keep=0, dry_run=False) == []
        assert len(library.gc("0s", keep=1)) == 2
        assert len(library.gc("0s", keep=1, dry_run=False)) == 2
        assert library.gc("0s", keep=1, dry_run=False) == []
        kept = [row["revision"] for row in library.history("a")][1]
        assert library.card("a", kept).revision == kept

    @pytest.mark.parametrize(("text", "span"), [("30m", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600)])
    def test_time_spans(self, text, span):
        assert duration(text) == timedelta(seconds=span)

    @pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 days", "1y", "9999999d"])
    def test_what_is_no_time_span_is_told(self, text):
        with pytest.raises(LibraryError, match="write 30m, 12h, 7d or 2w"):
            duration(text)


def test_an_expert_over_the_limit_is_refused_before_it_is_fetched(library, expert, monkeypatch):
    library.add_expert(expert, "a")
    small = ExpertLibrary.open(library.url, limits=Limits(max_expert_bytes=expert.card.size - 1))
    monkeypatch.setattr(small.backend, "fetch", None)
    with pytest.raises(Refused, match="at most"):
        _ = small["a"].adapter
