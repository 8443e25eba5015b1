import pytest

from mole.experts.licences import derived, facts

ALONE = ["mit", "apache-2.0", "cc-by-nc-4.0", "llama3", "other"]


@pytest.mark.parametrize("licence", ALONE)
def test_equal_licences_stay_as_they_are(licence):
    assert derived({"a": licence, "b": licence}).id == licence


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (("mit", "apache-2.0"), "apache-2.0"),
        (("apache-2.0", "mit", "cc0-1.0"), "apache-2.0"),
        (("MIT", "BSD-3-Clause"), "BSD-3-Clause"),
        (("mit", "gpl-3.0"), "gpl-3.0"),
        (("gpl-3.0", "agpl-3.0", "mit"), "agpl-3.0"),
        (("gpl-3.0-or-later", "gpl-3.0-only"), "gpl-3.0-only"),
        (("cc-by-sa-4.0", "apache-2.0"), "cc-by-sa-4.0"),
        (("cc-by-nc-4.0", "mit"), "cc-by-nc-4.0"),
        (("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), "cc-by-nc-sa-4.0"),
    ],
)
def test_the_most_demanding_licence_that_takes_in_the_others_holds(parts, wanted):
    for order in (parts, parts[::-1]):
        found = derived({f"e{n}": licence for n, licence in enumerate(order)})
        assert (found.id, found.conflicts) == (wanted, ())


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"a": "gpl-3.0", "b": "cc-by-nc-4.0"}, "not known to combine: gpl-3.0 (a), cc-by-nc-4.0 (b)"),
        ({"a": "cc-by-sa-4.0", "b": "cc-by-nc-4.0", "c": "mit"}, "not known to combine: cc-by-sa-4.0 (a), cc-by-nc"),
        ({"a": "llama3", "b": "mit"}, "not known to combine: llama3 (a), mit (b)"),
        ({"a": "mit", "b": None}, "b: no licence given"),
        ({"a": "cc-by-nd-4.0"}, "a: no derived works allowed by cc-by-nd-4.0"),
        ({**dict.fromkeys("abcde"), "f": "mit"}, "a, b, c and 2 more: no licence given"),
    ],
)
def test_licences_that_do_not_combine_give_none_and_are_named(parts, told):
    found = derived(parts)
    assert found.id is None
    assert told in found.conflicts[0]
    assert facts(parts)["extra"] == {"license_conflict": "; ".join(found.conflicts)}


def test_parts_without_any_licence_give_none_and_no_conflict():
    assert derived({"a": None, "b": None}) == derived({})
    assert facts({"a": None}) == {"license": None}


def test_what_is_told_fits_into_a_card():
    parts = {f"a-rather-long-name-of-an-expert-{n}": f"licence-{n}" for n in range(40)}
    assert len(facts(parts)["extra"]["license_conflict"]) == 200
