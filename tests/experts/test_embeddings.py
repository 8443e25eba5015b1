import pytest
import torch

from mole.experts import LibraryError
from mole.experts.embeddings import comparable, embedding, layout, stored_gram
from mole.experts.similarity import cosines, gram


@pytest.fixture
def filled(library, make):
    for seed, name in enumerate("dbca"):
        library.add_expert(make(seed), name)
    return library


def test_the_inner_products_are_computed_once_and_found_in_any_order(filled, monkeypatch):
    names = ["a", "b", "c", "d"]
    wanted = gram({name: filled.get_expert(name).adapter for name in names})
    torch.testing.assert_close(stored_gram(filled, names), wanted)
    monkeypatch.setattr("mole.experts.embeddings.gram", lambda experts: pytest.fail("computed again"))
    order = [2, 0, 3, 1]
    again = stored_gram(filled, [names[place] for place in order])
    torch.testing.assert_close(again, wanted[order][:, order])


def test_a_changed_expert_is_computed_anew(filled, make):
    before = stored_gram(filled, ["a", "b"])
    filled.update_expert("a", make(9))
    after = stored_gram(filled, ["a", "b"])
    assert after[0, 0] != before[0, 0]
    assert after[1, 1] == before[1, 1]


def test_a_new_name_and_a_new_tag_change_nothing(filled, monkeypatch):
    before = stored_gram(filled, ["a", "b"])
    filled.rename_expert("a", "z")
    filled.edit_card("b", tags=["new"])
    monkeypatch.setattr("mole.experts.embeddings.gram", lambda experts: pytest.fail("computed again"))
    torch.testing.assert_close(stored_gram(filled, ["z", "b"]), before)


def test_two_names_of_the_same_weights_lie_at_one_place(filled, make):
    filled.add_expert(make(0), "twin")
    names = ["a", "d", "twin"]
    rows = embedding(filled, names)
    torch.testing.assert_close(rows[1], rows[2])
    places = layout(stored_gram(filled, names))
    torch.testing.assert_close(places[1], places[2])
    assert (places[0] - places[1]).norm() > 0.1


def test_places_in_the_plane_keep_the_distances_where_the_plane_can(filled):
    G = stored_gram(filled, ["a", "b", "c"])  # three points always lie in a plane
    places, likeness = layout(G), cosines(G)
    for one in range(3):
        for other in range(3):
            wanted = (2 - 2 * likeness[one, other]).clamp_min(0).sqrt()
            assert float((places[one] - places[other]).norm()) == pytest.approx(float(wanted), abs=1e-6)


def test_an_expert_that_is_none_is_told(filled):
    assert comparable(filled, None) == ["a", "b", "c", "d"]
    assert comparable(filled, ["c", "a"]) == ["a", "c"]
    with pytest.raises(LibraryError, match="unknown expert 'e'"):
        comparable(filled, ["e", "a"])
    with pytest.raises(LibraryError, match="2 experts at least"):
        comparable(filled, ["a"])
