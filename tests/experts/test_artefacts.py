"""What was computed from experts and is kept beside them: found by what made it, by nothing else."""

import pytest
import torch

from mole.experts import ExpertLibrary, LibraryError, UnknownExpert
from mole.untrusted import Damaged


class Counted:
    """Something to compute, and how often it was."""

    def __init__(self, value):
        self.value, self.times = value, 0

    def __call__(self):
        self.times += 1
        return self.value


@pytest.fixture
def filled(library, make):
    for seed, name in enumerate(("a", "b", "c")):
        library.add_expert(make(seed), name)
    return library


@pytest.mark.parametrize(
    "value",
    [
        {"prototype": torch.arange(6.0).reshape(2, 3), "ids": torch.tensor([1, 2])},
        {"x": [1, 2.5, None], "y": {"z": "text"}},
        [1, 2, 3],
        {},
        None,
    ],
    ids=["tensors", "object", "list", "empty", "null"],
)
def test_it_is_computed_once_and_comes_back_the_same(filled, value):
    compute = Counted(value)
    first = filled.artefact("a", "arrow", {"k": 2}, compute)
    again = ExpertLibrary.open(filled.url).artefact("a", "arrow", {"k": 2}, compute)
    assert compute.times == 1
    for found in (first, again):
        if isinstance(value, dict) and any(isinstance(item, torch.Tensor) for item in value.values()):
            assert all(torch.equal(found[key], item) and found[key].dtype == item.dtype for key, item in value.items())
        else:
            assert found == value
    assert filled.names() == ["a", "b", "c"]
    assert filled.card("a").history == ()


@pytest.mark.parametrize(
    "other",
    [
        {"names": "b"},
        {"names": ["a", "b"]},
        {"kind": "arrows"},
        {"config": {"k": 3}},
        {"code": 2},
        {"backbone": "0" * 64},
        {"data": "0" * 64},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_went_in_makes_another_one(filled, other):
    usual = {"names": "a", "kind": "arrow", "config": {"k": 2}}
    filled.artefact(**usual, compute=lambda: [1])
    assert filled.artefact(**{**usual, **other}, compute=lambda: [2]) == [2]
    assert filled.artefact(**usual) == [1]


def test_a_kind_is_looked_up_exactly(filled):
    filled.artefact("a", "my-emb", {}, lambda: [1])
    with pytest.raises(UnknownExpert, match="has no emb computed from that"):
        filled.artefact("a", "emb", {})
    assert filled.artefacts(kind="emb") == []
    assert [row.card.kind for row in filled.artefacts(kind="my-emb")] == ["my-emb"]


def test_it_stays_with_the_content_through_rename_and_edit_and_not_through_an_update(filled, make):
    filled.artefact("a", "arrow", {}, lambda: [1])
    filled.rename_expert("a", "z")
    filled.edit_card("z", tags=["new"])
    assert filled.artefact("z", "arrow", {}) == [1]
    filled.update_expert("z", make(9))
    with pytest.raises(UnknownExpert):
        filled.artefact("z", "arrow", {})


def test_that_of_several_experts_does_not_depend_on_their_order(filled):
    filled.artefact(["b", "a"], "similarity", {}, lambda: [[1, 0], [0, 1]])
    assert filled.artefact(["a", "b"], "similarity", {}) == [[1, 0], [0, 1]]
    (row,) = filled.artefacts("b")
    assert row.experts == ("a", "b")
    assert row.name.startswith("library.similarity.")


def test_whoever_loses_the_race_takes_the_winners(filled):
    other = ExpertLibrary.open(filled.url)

    def late():
        other.artefact("a", "arrow", {}, lambda: ["winner"])
        return ["loser"]

    assert filled.artefact("a", "arrow", {}, late) == ["winner"]
    assert filled.artefact("a", "arrow", {}) == ["winner"]


def test_a_library_that_is_read_only_leaves_it_in_the_cache(filled, tmp_path):
    reader = ExpertLibrary.open(filled.url, read_only=True, cache_dir=tmp_path / "cache")
    compute = Counted([1])
    assert [reader.artefact("a", "arrow", {}, compute) for _ in range(2)] == [[1], [1]]
    assert compute.times == 1
    assert filled.artefacts() == []
    without = ExpertLibrary.open(filled.url, read_only=True)
    assert without.artefact("a", "arrow", {}, compute) == [1]
    assert compute.times == 2


@pytest.mark.parametrize("value", [object(), float("nan"), {"a": {1, 2}}, {"x": torch.tensor([1 + 2j])}])
def test_what_has_no_place_in_a_file_is_refused_and_not_stored(filled, value):
    with pytest.raises(LibraryError):
        filled.artefact("a", "arrow", {}, lambda: value)
    assert filled.artefacts() == []


def test_damage_is_found(filled):
    filled.artefact("a", "arrow", {}, lambda: {"x": torch.ones(3)})
    (data,) = (filled.backend.root / ".mole" / "derived").rglob("data.safetensors")
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    with pytest.raises(Damaged, match="other content of the same size"):
        filled.artefact("a", "arrow", {})


def test_removing_an_expert_takes_along_what_only_it_has(filled, expert):
    filled.add_expert(expert, "twin-of-a")
    for name in ("a", "b"):
        filled.artefact(name, "arrow", {}, lambda: [1])
    filled.remove_expert("a")
    filled.remove_expert("b")
    assert [row.experts for row in filled.artefacts()] == [("twin-of-a",)]
    filled.remove_expert("twin-of-a")
    assert filled.artefacts() == []


def test_garbage_is_what_was_computed_from_contents_that_are_gone(filled, make):
    for names in ("a", "b", ["a", "b"]):
        filled.artefact(names, "arrow", {}, lambda: [1])
    filled.update_expert("a", make(9))
    assert filled.gc("0s", keep=1) == []
    gone = filled.gc("0s", keep=0)
    assert sorted(row.what.split(".")[1] for row in gone if row.what.startswith("artefact")) == ["arrow", "arrow"]
    filled.gc("0s", keep=0, dry_run=False)
    assert [row.experts for row in filled.artefacts()] == [("b",)]


def test_artefacts_are_removed_by_name_and_kind(filled):
    for kind in ("arrow", "emb"):
        filled.artefact("a", kind, {}, lambda: [1])
    filled.remove_artefacts(filled.artefacts("a", "emb"))
    assert [row.card.kind for row in filled.artefacts()] == ["arrow"]
    filled.remove_artefacts([])


def test_an_unknown_expert_is_told(filled):
    with pytest.raises(UnknownExpert):
        filled.artefact("d", "arrow", {}, lambda: [1])
    with pytest.raises(UnknownExpert):
        filled.artefacts("d")
