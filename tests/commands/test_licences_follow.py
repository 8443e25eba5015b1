"""The licence of what is made of several experts: derived from theirs, conflicts named on the card and in the log."""

import shutil

import pytest
from walk import SHORT, SMALL, data, mole

from mole.experts import ExpertLibrary, load_expert
from mole.experts.folder import read_card


@pytest.fixture
def library(walk, tmp_path):
    shutil.copytree(walk / "library", tmp_path / "library")
    found = ExpertLibrary.open(str(tmp_path / "library"))

    def license_as(**licences):
        for name, licence in licences.items():
            found.edit_card(name, license=licence)
        return found.url

    return license_as


def made(kind, address, folder, *words):
    """The card of a merge, a mixture or a mean of all as a start."""
    if kind == "merge":
        mole("merge", f"library={address}", "method=linear", "name=both", f"run.folder={folder}", *words)
        return load_expert(folder).card
    if kind == "mixture":
        mole("build-moe", *SMALL, f"library={address}", "router=uniform", f"run.folder={folder}")
        return read_card(folder / "mixture")
    start = ["start=mean", f"start_library={address}", "adapter.rank=16"]
    mole("train-expert", *SMALL, *SHORT, *data("reverse"), *start, f"run.folder={folder}")
    return load_expert(folder).card


@pytest.mark.parametrize("kind", ["merge", "mixture", "mean"])
def test_the_more_demanding_licence_holds_for_the_whole(library, tmp_path, kind):
    card = made(kind, library(reverse="mit", shouting="gpl-3.0"), tmp_path / "run")
    assert (card.license, card.extra) == ("gpl-3.0", {})


@pytest.mark.parametrize("kind", ["merge", "mixture", "mean"])
def test_licences_that_exclude_each_other_are_named(library, tmp_path, kind):
    card = made(kind, library(reverse="cc-by-nc-4.0", shouting="gpl-3.0"), tmp_path / "run")
    assert card.license is None
    assert card.extra["license_conflict"] == "not known to combine: cc-by-nc-4.0 (reverse), gpl-3.0 (shouting)"


def test_a_licence_that_is_given_stands_without_the_conflict(library, tmp_path):
    address = library(reverse="cc-by-nc-4.0", shouting="gpl-3.0")
    card = made("merge", address, tmp_path / "run", "license=other")
    assert (card.license, card.extra) == ("other", {})


def test_a_mixture_that_grows_keeps_the_more_demanding_licence(library, tmp_path):
    address = library(reverse="gpl-3.0", shouting="mit")
    words = [*SMALL, f"library={address}", "router=uniform", "experts=[reverse]", f"run.folder={tmp_path / 'one'}"]
    mole("build-moe", *words)
    words = ["edit-moe", str(tmp_path / "one"), *SMALL, f"library={address}", "add=[shouting]"]
    mole(*words, f"run.folder={tmp_path / 'two'}")
    assert read_card(tmp_path / "two" / "mixture").license == "gpl-3.0"
