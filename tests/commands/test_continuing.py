"""`train-expert expert=<library>/<name> library=<library>`: the next revision, unless somebody else published one."""

import json
import shutil

import pytest
from walk import SHORT, SMALL, data, mole

from mole.cli.main import main
from mole.experts import ExpertLibrary, load_expert

FAST = [*SMALL, *SHORT, *data("reverse")]


@pytest.fixture
def library(walk, tmp_path):
    """A copy of the walk's library, whose `reverse` is trained further."""
    shutil.copytree(walk / "library", tmp_path / "library")
    return ExpertLibrary.open(str(tmp_path / "library"))


def edit(library, **changes):
    """Another revision of `reverse`, by somebody else."""
    theirs = ExpertLibrary.open(library.url)
    expert = theirs.get_expert("reverse")
    theirs.update_expert("reverse", expert.with_card(expert.card.edited(**changes)))
    return library.card("reverse")


def further(library, folder, *words):
    return main(
        [
            "train-expert",
            *FAST,
            f"expert={library.url}/reverse",
            f"library={library.url}",
            f"run.folder={folder}",
            *words,
        ]
    )


def test_an_expert_gets_its_next_revision(library, tmp_path):
    first = library.card("reverse")
    assert further(library, tmp_path / "run") == 0
    card = library.card("reverse")
    assert card.parent == first.revision != card.revision
    assert card.content != first.content
    assert [row["revision"] for row in card.history] == [first.revision]
    assert card.message == "4 more steps"
    assert card.derived_from[-1] == {
        "relation": "continued",
        "source": None,
        "name": "reverse",
        "revision": first.revision,
        "content": first.content,
    }
    assert load_expert(tmp_path / "run").revision == card.revision
    assert library.card("reverse", first.revision).content == first.content
    assert library.names() == ["reverse", "shouting"]


def test_the_new_scores_stand_beside_those_of_the_revision_before(library, tmp_path):
    first = library.card("reverse")
    assert further(library, tmp_path / "run") == 0
    new, old = library.card("reverse").scores
    assert old == {**first.scores[0], "config": first.revision[:16]}
    assert new["config"] == first.scores[0]["config"]  # measured on the same samples
    assert (new["metric"], new["task"], new["split"]) == (old["metric"], old["task"], old["split"])


def test_a_card_keeps_what_its_first_revision_said(library, tmp_path):
    edit(library, tags=["en"], license="mit", description="Turns words.", extra={"mine": 1})
    assert further(library, tmp_path / "run", "message=more") == 0
    card = library.card("reverse")
    assert (card.tags, card.license, card.description, card.extra) == (("en",), "mit", "Turns words.", {"mine": 1})
    assert card.message == "more"


def test_another_name_makes_another_expert(library, tmp_path):
    assert further(library, tmp_path / "run", "name=other") == 0
    assert library.names() == ["other", "reverse", "shouting"]
    assert library.card("reverse").parent is None
    assert library.card("other").parent is None


def test_who_publishes_meanwhile_wins_and_the_loser_is_told_two_ways_on(library, tmp_path, monkeypatch, capsys):
    from mole.commands import train_expert

    def and_meanwhile(*args, **kwargs):
        edit(library, description="mine")
        return kept(*args, **kwargs)

    kept = train_expert._keep
    monkeypatch.setattr(train_expert, "_keep", and_meanwhile)
    assert further(library, tmp_path / "run") == 1
    err = capsys.readouterr().err
    theirs = library.card("reverse")
    assert theirs.description == "mine"
    assert f"expect={theirs.revision[:8]} replaces theirs" in err
    assert "name=<another> keeps both" in err
    assert load_expert(tmp_path / "run").card.parent == theirs.parent


def test_what_is_no_better_is_not_published(library, tmp_path):
    first = library.card("reverse")
    words = ["publish=if-better", "training.learning_rate=1e-9", "training.max_steps=1"]
    assert further(library, tmp_path / "same", *words, "metric=exact_match") == 0
    assert library.card("reverse") == first
    assert json.loads((tmp_path / "same" / "run.json").read_text())["published"] is False
    assert load_expert(tmp_path / "same").card.parent == first.revision
    assert further(library, tmp_path / "better", "publish=if-better", "training.learning_rate=1e-3") == 0
    assert library.card("reverse").parent == first.revision


def test_an_old_revision_is_refused_before_anything_is_trained(library, tmp_path, capsys):
    first = library.card("reverse")
    edit(library, description="second")
    words = [*FAST, f"expert={library.url}/reverse@{first.revision[:12]}", f"run.folder={tmp_path / 'run'}"]
    assert main(["train-expert", *words, f"library={library.url}"]) == 2
    assert "only the newest can be followed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    mole("train-expert", *words, f"library={library.url}", "name=from-the-first")
    assert library.card("from-the-first").derived_from[-1]["revision"] == first.revision


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["publish=if-better"], "it needs expert=<library>/<name>"),
        (["publish=if-better", "name=other", "EXPERT"], "compares with the expert that is trained further"),
        (["metric=exact_match", "EXPERT"], "set both or neither"),
        (["publish=never", "EXPERT"], "publish: must be"),
    ],
)
def test_settings_that_do_not_fit_are_told_first(library, tmp_path, capsys, words, told):
    words = [f"expert={library.url}/reverse" if word == "EXPERT" else word for word in words]
    code = main(["train-expert", *FAST, *words, f"library={library.url}", f"run.folder={tmp_path / 'run'}"])
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_run_that_is_resumed_replaces_only_what_it_started_from(library, tmp_path, monkeypatch, capsys, meanwhile):
    def cut_short(*args, **kwargs):
        raise RuntimeError("the machine was switched off")

    first = library.card("reverse")
    with monkeypatch.context() as patched:
        patched.setattr("mole.commands.train_expert._keep", cut_short)
        assert further(library, tmp_path / "run", "training.checkpoint_every=2") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["start"]["revision"] == first.revision
    theirs = edit(library, description="theirs") if meanwhile else None
    assert main(["train-expert", "--resume", str(tmp_path / "run")]) == int(meanwhile)
    if theirs is None:
        assert library.card("reverse").parent == first.revision
        assert library.card("reverse").content != first.content
    else:
        assert "was changed by somebody else" in capsys.readouterr().err
        assert library.card("reverse") == theirs


def test_the_best_expert_is_chosen_by_the_scores_of_its_newest_revision(library, tmp_path):
    assert further(library, tmp_path / "run") == 0
    card = library.card("reverse")
    assert len(card.scores) == 2
    best = library.best("reverse", metric="loss")
    assert (best.name, best.score) == ("reverse", card.scores[0])
