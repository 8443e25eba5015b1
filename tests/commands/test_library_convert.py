"""`mole library convert`: what a mixture becomes in a library gives what the mixture gives."""

import json
import shutil

import pytest
import torch
from walk import SHORT, SMALL, data, mole

from mole import backbones
from mole.backbones import TinyConfig
from mole.cli.main import main
from mole.experts import ExpertLibrary
from mole.mixtures import load_mixture, open_model

IDS = torch.arange(3, 17).reshape(2, 7)


@pytest.fixture
def place(walk, tmp_path, monkeypatch):
    """A folder with a copy of the walk's library, and the walk's mixture beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(walk / "library", tmp_path / "library")
    return walk


def convert(mixture, *words):
    return main(["library", "convert", str(mixture), "library", *words])


def logits(model):
    with torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
    model.unload()
    return found


def backbone():
    return backbones.load(TinyConfig(device="cpu"))


def build(folder, router, *words):
    mole("build-moe", *SMALL, "library=library", f"router={router}", f"run.folder={folder}", *words)


def test_without_as_it_tells_what_applies(place, capsys):
    capsys.readouterr()
    assert convert(place / "mixture") == 0
    out = capsys.readouterr().out
    assert "as=…" in out
    assert "no member: its experts are as they came from the library" in out
    assert "no merged: router=xlora weighs each input anew" in out
    assert ExpertLibrary.open("library").names() == ["reverse", "shouting"]
    assert convert(place / "mixture", "format=json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["applies"] for row in rows} == {
        "member": False,
        "merged": False,
        "distilled": True,
        "mixture": True,
    }


@pytest.mark.parametrize("embed", [False, True])
def test_a_mixture_in_a_library_gives_what_it_gave(place, embed):
    wanted = logits(load_mixture(place / "mixture" / "mixture", backbone()))
    assert convert(place / "mixture", "as=mixture", "name=both", f"embed={str(embed).lower()}") == 0
    card = ExpertLibrary.open("library").card("both")
    assert card.kind == "mixture"
    assert ("expert-000.safetensors" in card.files) == embed
    assert torch.equal(logits(open_model("library/both", backbone())), wanted)


def test_an_expert_that_was_renamed_is_found_and_one_that_changed_at_its_revision(place):
    wanted = logits(load_mixture(place / "mixture" / "mixture", backbone()))
    assert convert(place / "mixture", "as=mixture", "name=both") == 0
    library = ExpertLibrary.open("library")
    library.rename_expert("reverse", "backwards")
    assert torch.equal(logits(open_model("library/both", backbone())), wanted)
    library.rename_expert("backwards", "reverse")
    library.update_expert("reverse", library.get_expert("shouting"))
    assert torch.equal(logits(open_model("library/both", backbone())), wanted)


def test_an_expert_that_is_gone_is_told_with_both_revisions(place, tmp_path):
    assert convert(place / "mixture", "as=mixture", "name=both") == 0
    library = ExpertLibrary.open("library")
    before = library.card("reverse")
    after = library.update_expert("reverse", library.get_expert("shouting"))
    shutil.rmtree(tmp_path / "library" / ".mole" / "history" / "reverse")
    with pytest.raises(ValueError, match="embed=true") as caught:
        open_model("library/both", backbone())
    assert before.revision[:8] in str(caught.value)
    assert after.revision[:8] in str(caught.value)


def test_references_have_to_be_there_when_it_is_published(place, capsys):
    ExpertLibrary.open("library").remove_expert("reverse")
    shutil.rmtree("library/.mole/history")
    assert convert(place / "mixture", "as=mixture", "name=both") == 2
    assert "was made with 'reverse'" in capsys.readouterr().err
    assert ExpertLibrary.open("library").names() == ["shouting"]


def test_a_constant_mixture_becomes_one_expert_exactly(place, tmp_path, capsys):
    build(tmp_path / "run", "uniform")
    wanted = logits(load_mixture(tmp_path / "run" / "mixture", backbone()))
    assert convert("run", "as=merged", "name=soup", "backbone=tiny", "backbone.device=cpu") == 0
    assert "nothing was lost" in capsys.readouterr().out
    found = logits(open_model("library/soup", backbone()))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    card = ExpertLibrary.open("library").card("soup")
    assert {row["relation"] for row in card.derived_from} == {"converted"}
    assert {row["name"] for row in card.derived_from} == {"reverse", "shouting"}


def test_cutting_the_rank_tells_what_is_lost(place, tmp_path, capsys):
    build(tmp_path / "run", "uniform")
    assert convert("run", "as=merged", "name=thin", "rank=2", "backbone=tiny", "backbone.device=cpu") == 0
    assert "% of model.layers" in capsys.readouterr().out
    assert ExpertLibrary.open("library").card("thin").adapter["rank"] == 2


def test_a_router_that_reads_the_input_has_no_exact_expert(place, capsys):
    assert convert(place / "mixture", "as=merged", "name=x", "backbone=tiny", "backbone.device=cpu") == 2
    assert "router=xlora" in capsys.readouterr().err
    assert ExpertLibrary.open("library").names() == ["reverse", "shouting"]


def test_the_mean_routing_makes_one_expert_whose_loss_is_told(place, capsys):
    few = ["examples=4", *data("reverse")]
    words = ["as=distilled", "name=mean", "approximate=true", "backbone=tiny", "backbone.device=cpu", *few]
    assert convert(place / "mixture", *words) == 0
    assert "loss on 4 samples of reverse: mixture" in capsys.readouterr().out
    card = ExpertLibrary.open("library").card("mean")
    assert {row["metric"] for row in card.scores} == {"loss", "mixture_loss"}
    assert card.training["method"] == "distilled"


def test_the_mean_of_a_constant_routing_is_that_mixture(place, tmp_path):
    build(tmp_path / "run", "uniform")
    wanted = logits(load_mixture(tmp_path / "run" / "mixture", backbone()))
    words = ["as=distilled", "name=mean", "approximate=true", "backbone=tiny", "backbone.device=cpu"]
    assert convert("run", *words, "examples=4", *data("reverse")) == 0
    torch.testing.assert_close(logits(open_model("library/mean", backbone())), wanted, atol=1e-5, rtol=1e-5)
    row = {row["metric"]: row["value"] for row in ExpertLibrary.open("library").card("mean").scores}
    assert row["loss"] == pytest.approx(row["mixture_loss"], rel=1e-4)


def test_experts_trained_inside_a_mixture_become_next_revisions(place, tmp_path):
    words = [*SMALL, *SHORT, *data("reverse"), "library=library", "router=uniform", "train=experts"]
    mole("build-moe", *words, f"run.folder={tmp_path / 'run'}")
    library = ExpertLibrary.open("library")
    before = library.cards()
    assert convert("run", "as=member") == 0
    after = library.cards()
    assert list(after) == ["reverse", "shouting"]
    for name, card in after.items():
        assert card.parent == before[name].revision
        assert card.content != before[name].content
        assert card.derived_from[0]["relation"] == "converted"
        assert library.get_expert(name).adapter.modules


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["as=mixture"], "which name shall it have"),
        (["as=merged", "name=x"], "backbone: not chosen"),
        (["as=distilled", "name=x", "backbone=tiny"], "say approximate=true"),
        (["as=member", "name=x"], "leave out name"),
        (["as=mixture", "name=reverse"], "'reverse' is taken"),
        (["as=member"], "no expert was trained inside"),
        (["as=soup"], "as: must be"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(place, capsys, words, told):
    assert convert(place / "mixture", *words) == 2
    assert told in capsys.readouterr().err
    assert ExpertLibrary.open("library").names() == ["reverse", "shouting"]


def test_dry_run_publishes_nothing(place, capsys):
    capsys.readouterr()
    assert convert(place / "mixture", "as=mixture", "name=both", "dry_run=true") == 0
    assert capsys.readouterr().out == "would publish both as mixture in library\n"
    assert json.dumps(ExpertLibrary.open("library").names()) == '["reverse", "shouting"]'
