"""`mole library rank`, `cluster` and `map`: what is printed and left, and what is computed only once."""

import json
import shutil

import pytest
import torch
from walk import SMALL, data

from mole.adapters import Adapter, LoraWeights
from mole.cli.main import main
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe


@pytest.fixture
def library(tmp_path):
    """Four experts, two and two alike."""
    found = ExpertLibrary.open(str(tmp_path / "lib"))
    for place, name in enumerate(("add", "subtract", "spell", "upper")):
        kind, own = (torch.Generator().manual_seed(seed) for seed in (place // 2, 10 + place))
        A, B = torch.randn(2, 6, generator=kind), torch.randn(4, 2, generator=kind)
        adapter = Adapter(
            "lora",
            {"model.up_proj": LoraWeights(A=A, B=B + 0.1 * torch.randn(4, 2, generator=own), alpha=2.0)},
            targets=("up_proj",),
        )
        rows = [{"name": "arithmetic" if place < 2 else "letters", "split": "train", "examples": 9, "sha256": None}]
        found.add_expert(Expert(describe(adapter, BackboneRef("mole/tiny"), tasks=[name], data=rows), adapter), name)
    return found


@pytest.fixture
def mole(capsys):
    def run(*words):
        code = main(["library", *words])
        return (code, *capsys.readouterr())

    return run


def test_clusters_come_with_the_commands_that_train_one_expert_each(mole, library):
    assert mole("cluster", library.url, "format=names")[0] == 0
    code, out, _ = mole("cluster", library.url, "clusters=2")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["cluster", "size", "experts"]
    assert [line[:2] for line in lines[1:3]] == [["cluster-0", "2"], ["cluster-1", "2"]]
    assert {tuple(line[2:]) for line in lines[1:3]} == {("add,", "subtract"), ("spell,", "upper")}
    train = [line for line in out.splitlines() if line.startswith("mole train-expert")]
    assert all("adapter=lora adapter.rank=2 adapter.alpha=2" in line for line in train)
    assert sum("'dataset=[arithmetic]'" in line for line in train) == 1
    assert "# your own data: letters" in out
    assert out.splitlines()[-1].startswith("mole build-moe library=")
    assert "'experts=[cluster-0,cluster-1]' router=arrow" in out


def test_the_commands_of_a_recipe_are_commands(mole, library, tmp_path):
    import shlex

    found = json.loads(mole("cluster", library.url, "clusters=1", "experts=[add,subtract]", "format=json")[1])
    (row,) = found["clusters"]
    words = shlex.split(row["train"])[1:]
    assert main([*words, "--cfg", "job"]) == 0


def test_chance_makes_the_control(mole, library):
    code, out, _ = mole("cluster", library.url, "clusters=2", "by=chance", "format=names")
    assert code == 0
    assert sorted(name for line in out.splitlines() for name in line.split()) == library.names()
    assert [len(line.split()) for line in out.splitlines()] == [2, 2]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_map_is_a_picture_and_a_table(mole, library, tmp_path, kind):
    dest = tmp_path / f"map.{kind}"
    code, out, _ = mole("map", library.url, str(dest))
    assert code == 0
    assert out.splitlines()[-1] == str(dest)
    assert dest.read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    rows = {row["expert"]: row for row in json.loads(mole("map", library.url, "clusters=2", "format=json")[1])}
    assert list(rows) == library.names()
    assert rows["add"]["cluster"] == rows["subtract"]["cluster"] != rows["spell"]["cluster"]

    def gap(one, other):
        return abs(complex(rows[one]["x"] - rows[other]["x"], rows[one]["y"] - rows[other]["y"]))

    assert gap("add", "subtract") < gap("add", "spell")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("map", "LIB", "map.exe"), "is a .png, .svg or .pdf file"),
        (("map", "LIB", "experts=[add]"), "2 experts at least"),
        (("cluster", "LIB", "clusters=9"), "wanted from 1 to 4"),
        (("cluster", "LIB", "prefix=Not One"), "prefix:"),
        (("rank", "LIB"), "dataset: not chosen"),
        (("rank", "LIB", "dataset=reverse", "experts=[ad]"), "did you mean add"),
    ],
)
def test_bad_input_is_told(mole, library, words, told):
    code, out, err = mole(*(library.url if word == "LIB" else word for word in words))
    assert (code, out) == (2, "")
    assert told in err


class TestRank:
    @pytest.fixture
    def own(self, walk, tmp_path):
        shutil.copytree(walk / "library", tmp_path / "library")
        return str(tmp_path / "library")

    def test_the_expert_of_such_data_is_the_best(self, mole, own):
        for task, other in (("reverse", "shouting"), ("shouting", "reverse")):
            words = ["rank", own, *SMALL, *data(task), "examples=8", "format=json"]
            found = json.loads(mole(*words)[1])
            assert [row["expert"] for row in found["experts"]] == [task, other]
            best = found["experts"][0]
            assert best["gain"] == pytest.approx(found["backbone_loss"] - best["loss"])
            assert best["gain"] > 0

    def test_a_loss_is_computed_once(self, mole, own, monkeypatch):
        words = ["rank", own, *SMALL, *data("reverse"), "examples=8", "format=json"]
        first = json.loads(mole(*words)[1])
        monkeypatch.setattr("mole.commands.library.rank.nearest_experts", lambda *a, **k: pytest.fail("computed again"))
        assert json.loads(mole(*words)[1]) == first
        kinds = {stored.card.kind for stored in ExpertLibrary.open(own).artefacts()}
        assert kinds == {"sample-loss"}

    def test_without_store_the_library_stays_as_it_was(self, mole, own):
        code, out, _ = mole("rank", own, *SMALL, *data("reverse"), "examples=4", "store=false", "limit=1")
        assert code == 0
        assert out.splitlines()[1].split()[0] == "reverse"
        assert ExpertLibrary.open(own).artefacts() == []
