"""The page about a library: valid front matter, escaped cells, and what its owner wrote stays."""

import pytest
import yaml

from mole.experts import ExpertLibrary, LibraryError
from mole.experts.library_readme import BEGIN, END, library_readme, write_page


@pytest.fixture
def cards(make):
    return {name: make(seed, license="Apache-2.0").card for seed, name in enumerate("ab")}


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


def test_a_new_page_says_what_is_in_the_library_and_how_to_load_it(cards):
    text = library_readme(cards, "hf://user/lib")
    assert front(text) == {
        "library_name": "peft",
        "tags": ["mole", "lora"],
        "base_model": ["user/tiny-llama"],
        "license": "apache-2.0",
    }
    assert len(rows(text)) == 2
    assert rows(text)[0].startswith("| a | sums | lora, rank 2 | user/tiny-llama | accuracy 0.5 |")
    assert 'load_expert("hf://user/lib/a")' in text
    assert text.count(BEGIN) == text.count(END) == 1


def test_written_twice_it_is_the_same(cards):
    once = library_readme(cards, "hf://user/lib")
    assert library_readme(cards, "hf://user/lib", once) == once


def test_text_outside_the_marks_is_kept_and_inside_is_not(cards):
    once = library_readme(cards, "x").replace("# A library of experts", "# Mine\n\nBefore.") + "\nAfter.\n"
    again = library_readme({"c": cards["a"]}, "x", once.replace(BEGIN, f"{BEGIN}\nstale"))
    assert "# Mine\n\nBefore." in again
    assert again.endswith("\nAfter.\n")
    assert "stale" not in again
    assert [row.split(" | ")[0] for row in rows(again)] == ["| c"]


def test_a_page_without_marks_gets_them_at_its_end(cards):
    text = library_readme(cards, "x", "# Mine\n\nText.\n")
    assert text.split("---\n")[2].strip().startswith("# Mine\n\nText.\n\n" + BEGIN)


def test_the_owners_front_matter_is_kept_and_wins(cards):
    mine = "---\nlicense: mit\nlanguage: [en]\ntags:\n- mine\n---\n# Mine\n"
    text = library_readme(cards, "x", mine)
    assert front(text) == {
        "library_name": "peft",
        "base_model": ["user/tiny-llama"],
        "license": "mit",
        "language": ["en"],
        "tags": ["mine"],
    }
    assert library_readme(cards, "x", text) == text


@pytest.mark.parametrize(
    ("licenses", "said"),
    [(("mit", "mit"), "mit"), (("mit", None), None), ((None, None), None), (("X-1", "X-1"), "other")],
)
def test_a_licence_is_said_if_all_agree(make, licenses, said):
    cards = {f"e{seed}": make(seed, license=one).card for seed, one in enumerate(licenses)}
    assert front(library_readme(cards, "x")).get("license") == said


@pytest.mark.parametrize("evil", ["a|b", "<script>x</script>", "[x](http://x)", "`x`", f"{END}", "![x](y)"])
def test_cells_are_escaped(make, evil):
    text = library_readme({"a": make(0, tasks=[evil]).card}, "x")
    (row,) = rows(text)
    assert evil not in row
    assert row.replace("\\|", "").count("|") == 8
    assert text.count(END) == 1


def test_a_backbone_that_is_no_hub_id_is_not_linked(make):
    from mole.experts import BackboneRef
    from mole.experts.card import new_card

    card = make(0).card
    other = new_card(card.files, BackboneRef("my model: v1"), adapter=card.adapter)
    assert "base_model" not in front(library_readme({"a": other}, "x"))


def test_of_many_experts_the_first_are_shown(make):
    card = make(0).card
    many = {f"e{number:03d}": card for number in range(501)}
    text = library_readme(many, "x")
    assert len(rows(text)) == 200
    assert "The first 200 of 501 experts." in text
    assert len(rows(library_readme(dict(list(many.items())[:500]), "x"))) == 500


def test_a_library_without_a_place_for_a_page_says_so(make):
    library = ExpertLibrary.open("memory://pages")
    library.add_expert(make(0), "a")
    with pytest.raises(LibraryError, match="no place for a page"):
        write_page(library)
