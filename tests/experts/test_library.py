import pytest

from mole.experts import (
    Conflict,
    ExpertLibrary,
    LibraryError,
    LocalExpertLibrary,
    NoLibrary,
    Problem,
    ReadOnly,
    UnknownExpert,
    load_expert,
)


def test_an_added_expert_comes_back_the_same(library, expert):
    library.add_expert(expert, "sums")
    again = library.get_expert("sums")
    assert again.card == expert.card
    assert again.adapter.tensors().keys() == expert.adapter.tensors().keys()
    assert library.names() == list(library) == ["sums"]
    assert "sums" in library
    assert "sum" not in library
    assert len(library) == 1
    assert library["sums"].card == expert.card


def test_opening_and_checking_make_nothing(library, tmp_path):
    library.check_free("sums")
    assert not library.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NoLibrary, match="no library there"):
        library.names()
    with pytest.raises(NoLibrary):
        LocalExpertLibrary(tmp_path / "lib", create=False)


def test_a_taken_name_is_a_conflict_that_says_what_to_do(library, expert, make):
    library.add_expert(expert, "sums")
    told = r"'sums' is taken .*choose another name .*update_expert.* mole library remove"
    for attempt in (lambda: library.add_expert(make(1), "sums"), lambda: library.check_free("sums")):
        with pytest.raises(Conflict, match=told) as caught:
            attempt()
        assert caught.value.revision == expert.revision
    library.add_expert(expert, "sums")


def test_a_bad_name_is_refused_with_a_proposal_before_anything_is_written(library, expert):
    for attempt in (lambda: library.add_expert(expert, "My Sums!"), lambda: library.check_free("My Sums!")):
        with pytest.raises(LibraryError, match="how about 'my-sums'"):
            attempt()
    assert not library.exists()


def test_an_update_keeps_the_old_revision_in_the_history(library, expert, make):
    library.add_expert(expert, "sums", message="first")
    first = library.card("sums")
    second = library.update_expert("sums", make(1), message="500 more steps")
    assert [(row["revision"], row["message"]) for row in library.history("sums")] == [
        (second.revision, "500 more steps"),
        (first.revision, "first"),
    ]
    assert second.parent == first.revision
    old = library.get_expert("sums", first.revision[:8])
    assert old.card == first
    assert old.adapter.parameters() == expert.adapter.parameters()


def test_who_has_not_seen_a_change_does_not_overwrite_it(library, expert, make):
    library.add_expert(expert, "sums")
    other = ExpertLibrary.open(library.url)
    other.update_expert("sums", make(1), message="theirs")
    for attempt in (
        lambda: library.update_expert("sums", make(2)),
        lambda: library.remove_expert("sums"),
        lambda: library.update_expert("sums", make(2), expect=expert.revision),
    ):
        with pytest.raises(Conflict, match="expected was"):
            attempt()
    theirs = library.card("sums")
    assert theirs.message == "theirs"
    library.update_expert("sums", make(2))
    assert library.card("sums").parent == theirs.revision


def test_removing_returns_the_card_and_frees_the_name(library, expert, make):
    library.add_expert(expert, "sums")
    assert library.remove_expert("sums") == expert.card
    assert library.names() == []
    with pytest.raises(UnknownExpert):
        library.remove_expert("sums")
    library.add_expert(make(1), "sums")


def test_a_library_that_was_opened_read_only_refuses_every_write(library, expert):
    library.add_expert(expert, "sums")
    reader = ExpertLibrary.open(library.url, read_only=True)
    for attempt in (
        lambda: reader.add_expert(expert, "other"),
        lambda: reader.update_expert("sums", expert),
        lambda: reader.remove_expert("sums"),
    ):
        with pytest.raises(ReadOnly):
            attempt()


def test_an_address_of_an_expert_loads_it(library, expert, make):
    library.add_expert(expert, "sums")
    library.update_expert("sums", make(1))
    assert load_expert(f"{library.url}/sums@{expert.revision[:8]}").card == expert.card
    assert load_expert(f"{library.url}/sums").card == library.card("sums")
    with pytest.raises(UnknownExpert, match="did you mean sums"):
        load_expert(f"{library.url}/sum")


class TestWhere:
    @pytest.fixture
    def filled(self, library, make):
        library.add_expert(make(0, tasks=["arc"], tags=["en"], license="mit"), "arc")
        library.add_expert(make(1, tasks=["arc_easy", "arc"], tags=["de"]), "arc-easy")
        library.add_expert(make(2, tasks=["emb"]), "my-emb")
        return library

    @pytest.mark.parametrize(
        ("where", "names"),
        [
            ({"tasks": "arc"}, ["arc", "arc-easy"]),
            ({"tasks": "arc_easy"}, ["arc-easy"]),
            ({"tags": ["de", "en"]}, ["arc", "arc-easy"]),
            ({"tasks": "arc", "license": "mit"}, ["arc"]),
            ({"names": "arc*"}, ["arc", "arc-easy"]),
            ({"names": ["my-emb", "arc"]}, ["arc", "my-emb"]),
            ({"names": "???"}, ["arc"]),
            ({"backbone": "user/tiny-llama", "method": "lora", "kind": "adapter"}, ["arc", "arc-easy", "my-emb"]),
        ],
    )
    def test_conditions_are_exact(self, filled, where, names):
        assert list(filled.cards(where)) == names

    @pytest.mark.parametrize("where", [{"names": "emb"}, {"tasks": "ar"}, {"names": "[am]*"}])
    def test_a_condition_that_nothing_fulfils_lists_what_there_is(self, filled, where):
        with pytest.raises(LibraryError, match=r"no expert has .* \(there are: .*arc"):
            filled.cards(where)

    def test_an_unknown_condition_is_told(self, filled):
        with pytest.raises(LibraryError, match="unknown filter 'task'; did you mean tasks"):
            filled.cards({"task": "arc"})


class TestVerify:
    @pytest.fixture
    def filled(self, library, make):
        for seed, name in enumerate(("a", "b", "c")):
            library.add_expert(make(seed), name)
        return library

    def wrong(self, library, **how):
        return {p.name: p.text for p in library.verify(**how) if isinstance(p, Problem)}

    def test_a_sound_library_is_all_names(self, filled):
        assert list(filled.verify()) == ["a", "b", "c"]

    def test_a_flipped_bit_is_found(self, filled):
        path = filled.backend.root / "b" / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert list(self.wrong(filled)) == ["b"]
        assert "other content of the same size" in self.wrong(filled)["b"]
        assert self.wrong(filled, quick=True) == {}
        assert self.wrong(filled, names=["a", "c"]) == {}

    @pytest.mark.parametrize(
        ("file", "damage", "told"),
        [
            ("adapter_model.safetensors", None, "missing"),
            ("adapter_model.safetensors", b"short", "bytes instead of"),
            ("expert.json", b"{}", "format"),
            ("extra.txt", b"x", "not listed in the card"),
        ],
    )
    def test_damage_is_found_by_a_quick_look_too(self, filled, file, damage, told):
        path = filled.backend.root / "b" / file
        path.unlink() if damage is None else path.write_bytes(damage)
        for quick in (True, False):
            found = self.wrong(filled, quick=quick)
            assert list(found) == ["b"]
            assert told in found["b"]

    def test_strays_are_found(self, filled):
        (filled.backend.root / "notes.txt").write_text("x")
        assert list(self.wrong(filled)) == ["'notes.txt'"]

    def test_an_unknown_name_is_told(self, filled):
        with pytest.raises(UnknownExpert, match="unknown expert 'd'"):
            list(filled.verify(["d"]))
