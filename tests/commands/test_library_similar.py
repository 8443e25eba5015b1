"""`mole library similar`: what is printed of experts that are alike, and what is refused."""

import json

import pytest
import torch

from mole.adapters import Adapter, LoraWeights
from mole.cli.main import main
from mole.experts import BackboneRef, Expert, ExpertLibrary, describe


@pytest.fixture
def similar(tmp_path, capsys):
    """Four experts, two and two alike; runs the command and gives code, output and errors."""
    library = ExpertLibrary.open(str(tmp_path / "lib"))
    for place, name in enumerate(("add", "subtract", "spell", "upper")):
        kind, own = (torch.Generator().manual_seed(seed) for seed in (place // 2, 10 + place))
        A, B = torch.randn(2, 6, generator=kind), torch.randn(4, 2, generator=kind)
        B = B + 0.1 * torch.randn(4, 2, generator=own)
        adapter = Adapter("lora", {"model.up_proj": LoraWeights(A=A, B=B, alpha=2.0)}, targets=("up_proj",))
        library.add_expert(Expert(describe(adapter, BackboneRef("tiny")), adapter), name)
    capsys.readouterr()

    def run(*words):
        code = main(["library", "similar", str(tmp_path / "lib"), *words])
        return (code, *capsys.readouterr())

    return run


def test_cosines_are_a_table_of_all_pairs(similar):
    code, out, _ = similar()
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["expert", "add", "spell", "subtract", "upper"]
    assert lines[1][:2] == ["add", "1.000"]
    rows = {row["expert"]: row for row in json.loads(similar("format=json")[1])}
    assert rows["add"]["subtract"] > 0.9
    assert abs(rows["add"]["spell"]) < 0.9
    assert rows["add"]["subtract"] == rows["subtract"]["add"]


@pytest.mark.parametrize("by", ["updates", "embedding", "parameters"])
def test_the_nearest_are_listed_by_name(similar, by):
    assert similar("show=nearest", "to=spell", "k=1", f"by={by}", "format=names") == (0, "upper\n", "")
    lines = similar("show=nearest", "to=add", f"by={by}")[1].splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["expert", "subtract"]
    assert len(lines) == 4


def test_clusters_are_those_that_are_alike(similar):
    assert similar("show=clusters", "clusters=2", "format=names")[1] == "add subtract\nspell upper\n"
    assert len(similar("show=clusters", "format=names")[1].splitlines()) == 4  # as many as there are experts
    assert json.loads(similar("show=clusters", "clusters=2", "format=json")[1]) == [
        ["add", "subtract"],
        ["spell", "upper"],
    ]
    assert [line.split()[1] for line in similar("show=clusters", "clusters=2", "by=chance")[1].splitlines()] == [
        "size",
        "2",
        "2",
    ]


def test_interference_is_told_of_every_pair(similar):
    rows = json.loads(similar("show=interference", "experts=[add,subtract]", "format=json")[1])
    assert [(row["first"], row["second"]) for row in rows] == [("add", "subtract")]
    assert rows[0]["overlap"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("to=add",), "show=nearest and to=<expert> go together"),
        (("by=chance",), "by=chance makes clusters"),
        (("sparsity=0.5",), "sparsity cuts parameters"),
        (("show=nearest", "to=ad"), "unknown expert 'ad'; did you mean add?"),
        (("experts=[add]",), "two experts at least are compared"),
        (("show=clusters", "clusters=5"), "num_clusters=5 for 4 experts"),
        (("format=names",), "format=names is for"),
    ],
)
def test_bad_input_is_told(similar, words, told):
    code, out, err = similar(*words)
    assert (code, out) == (2, "")
    assert told in err
