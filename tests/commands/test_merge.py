"""`mole merge` end to end: the files it leaves, what the card says, what is refused."""

import json

import peft
import pytest
import torch
from walk import SMALL, files, mole

from mole import backbones
from mole.adapters import Adapter, LoraWeights
from mole.backbones import TinyConfig
from mole.cli.main import main
from mole.experts import Expert, ExpertLibrary, describe, load_expert
from mole.mixtures import experts_of, mixture_of, open_model, pinned, save_mixture
from mole.routers import StaticConfig, TopKConfig

RUN = {"config.yaml", "run.json", "log.txt", "merge.json"}
PARTS = {"README.md", "adapter_config.json", "adapter_model.safetensors", "expert.json"}
IDS = torch.arange(4, 40)[None]


def tiny():
    return backbones.load(TinyConfig(device="cpu"))


@pytest.fixture
def library(tmp_path):
    return filled(tmp_path / "library")


def filled(folder, dora=False):
    """A library with two experts that nobody has trained: `reverse` and `shouting`, of unlike ranks."""
    backbone, home = tiny(), ExpertLibrary.open(str(folder))
    for rank, task in ((3, "reverse"), (4, "shouting")):
        generator = torch.Generator().manual_seed(rank)
        modules = {
            path: LoraWeights(
                A=0.1 * torch.randn(rank, module.in_features, generator=generator),
                B=0.1 * torch.randn(module.out_features, rank, generator=generator),
                alpha=8.0,
                magnitude=1 + torch.rand(module.out_features, generator=generator) if dora else None,
            )
            for path, module in backbone.model.named_modules()
            if path.endswith(("q_proj", "down_proj"))
        }
        adapter = Adapter("lora", modules, targets=("down_proj", "q_proj"))
        home.add_expert(Expert(describe(adapter, backbone, tasks=[task], license="mit"), adapter), task)
    return folder


def test_merging_leaves_an_expert_a_report_and_nothing_else(library, tmp_path, capsys):
    run = tmp_path / "run"
    mole("merge", f"library={library}", "method=ties", "name=both", "rank=3", "tags=[merged]", f"run.folder={run}")
    assert files(run) == {*RUN, *(f"expert/{part}" for part in PARTS)}
    out = capsys.readouterr().out
    assert "What the rank lost, worst first" in out
    assert f"added both to {library}" in out
    report = json.loads((run / "merge.json").read_text())
    card = ExpertLibrary.open(str(library)).card("both")
    assert card.revision == load_expert(run / "expert").revision
    parents = ExpertLibrary.open(str(library)).cards()
    assert [(row["relation"], row["name"], row["revision"], row["content"]) for row in card.derived_from] == [
        ("merged", name, parents[name].revision, parents[name].content) for name in ("reverse", "shouting")
    ]
    assert card.license == "mit"
    assert (card.tasks, card.tags, card.adapter["rank"]) == (("reverse", "shouting"), ("merged",), 3)
    told = card.training
    assert (told["method"], told["density"], told["rank"], told["space"]) == ("ties", 0.2, 3, "delta")
    assert told["error"] == pytest.approx(report["error"])
    worst = max(report["layers"], key=lambda layer: layer["error"])
    assert told[f"error.{worst['path']}"] == pytest.approx(worst["error"])
    assert set(worst) == {"path", "rank", "norm", "error", "next_sigma", "disputed"}
    assert report["method"]["name"] == "ties"
    assert len(told) <= 64


def test_the_merged_expert_loads_in_peft_and_in_mole_alike(library, tmp_path):
    mole("merge", f"library={library}", "method=linear", f"run.folder={tmp_path / 'run'}")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny().model, library / "merged")
        backbone = tiny()
        mine = open_model(f"{library}/merged", backbone)(input_ids=IDS).logits
        assert (theirs(input_ids=IDS).logits - mine).abs().max() <= 1e-5 * mine.abs().max()
        uniform = open_model(str(library), tiny())
        with uniform.fixed_routing({"reverse": 0.5, "shouting": 0.5}):
            mixed = uniform(input_ids=IDS).logits
    assert (mixed - mine).abs().max() <= 1e-5 * mine.abs().max()


def test_what_was_merged_itself_is_left_out_unless_it_is_named(library, tmp_path, capsys):
    merge = ("merge", f"library={library}", "method=concat")
    mole(*merge, "name=one", f"run.folder={tmp_path / 'one'}")
    mole(*merge, "name=two", f"run.folder={tmp_path / 'two'}")
    assert "left out, as merged themselves: one" in capsys.readouterr().out
    mole(*merge, "name=three", "experts=[one,reverse]", f"run.folder={tmp_path / 'three'}")
    assert list(experts_of(ExpertLibrary.open(str(library)), None)) == ["reverse", "shouting"]
    assert list(experts_of(ExpertLibrary.open(str(library)), ["one", "reverse"])) == ["one", "reverse"]
    cards = ExpertLibrary.open(str(library)).cards()
    assert [[row["name"] for row in cards[name].derived_from] for name in ("one", "two", "three")] == [
        ["reverse", "shouting"],
        ["reverse", "shouting"],
        ["one", "reverse"],
    ]


def test_without_publishing_the_library_stays_as_it_is(library, tmp_path):
    before = files(library)
    mole("merge", f"library={library}", "method=tsv", "publish=false", f"run.folder={tmp_path / 'run'}")
    assert files(library) == before
    assert (tmp_path / "run" / "expert" / "expert.json").is_file()


def test_another_library_takes_the_result(library, tmp_path):
    before = files(library)
    into = f"into={tmp_path / 'merges'}"
    mole("merge", f"library={library}", "method=wudi", into, f"run.folder={tmp_path / 'run'}")
    assert files(library) == before
    assert ExpertLibrary.open(str(tmp_path / "merges")).names() == ["merged"]


def test_weights_on_the_command_line_reach_the_method(library, tmp_path):
    words = ("method=task_arithmetic", "method.weights={reverse: 1.5, shouting: -0.5}", "method.scale=0.5")
    mole("merge", f"library={library}", *words, f"run.folder={tmp_path / 'run'}")
    told = ExpertLibrary.open(str(library)).card("merged").training
    assert (told["weights.reverse"], told["weights.shouting"], told["scale"]) == (1.5, -0.5, 0.5)


def test_dora_experts_need_the_backbone_and_become_the_mixture_of_them(tmp_path, capsys):
    library = filled(tmp_path / "library", dora=True)
    words = ("merge", f"library={library}", "method=linear", f"run.folder={tmp_path / 'run'}")
    assert main(list(words)) == 2
    assert "what DoRA adds depends on the backbone's weight: name the backbone (backbone=…)" in capsys.readouterr().err
    mole(*words, *SMALL)
    with torch.no_grad():
        mine = open_model(f"{library}/merged", tiny())(input_ids=IDS).logits
        uniform = open_model(str(library), tiny())
        with uniform.fixed_routing({"reverse": 0.5, "shouting": 0.5}):
            mixed = uniform(input_ids=IDS).logits
    assert (mixed - mine).abs().max() <= 1e-5 * mine.abs().max()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("method=linear", "device=cuda:7"), "device=cuda:7: no such device here"),
        (("method=linear", "method.weights={revers: 1.0}"), "unknown expert 'revers'; did you mean reverse?"),
        (("method=linear", "experts=[revers]"), "unknown expert 'revers'"),
        (("method=slerp", "experts=[reverse]"), "slerp merges 2 experts, got 1"),
        (("method=linear", "name=reverse"), "'reverse' is taken"),
        (("method=linear", "rank=none"), "rank=none: wanted a whole number from 1"),
        (("method=concat", "rank=2"), "keeps every rank"),
        ((), "method: not chosen; choose one: method=concat"),
        (("method=linear", "mixture=x"), "leave out method"),
        (("method=linear", "into=x", "publish=false"), "leave out one of them"),
        (("mixture=x",), "mixture needs the backbone"),
        (("mixture=x", "backbone=tiny"), "no mixture in /"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(library, tmp_path, capsys, words, told):
    before = files(tmp_path)
    code = main(["merge", f"library={library}", *words, f"run.folder={tmp_path / 'run'}"])
    assert code == 2
    assert told in capsys.readouterr().err
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.fixture
def mixture(library, tmp_path):
    """Builds a mixture of the library's experts and gives its folder."""

    def build(router):
        backbone = tiny()
        experts = experts_of(ExpertLibrary.open(str(library)), None)
        model = mixture_of(experts, backbone, router)
        for one in model.routers().values():
            for parameter in one.parameters():
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        save_mixture(model, tmp_path / "mixture", backbone, origins=pinned(experts, str(library)))
        return tmp_path / "mixture"

    return build


def test_a_mixture_with_constant_weights_becomes_an_expert(library, mixture, tmp_path, capsys):
    folder = mixture(StaticConfig(num_groups=None))
    words = (f"mixture={folder}", *SMALL, "name=soup", f"library={library}")
    mole("merge", *words, f"run.folder={tmp_path / 'run'}")
    out = capsys.readouterr().out
    assert "nothing was lost" in out
    assert "largest difference from the mixture's logits" in out
    assert files(tmp_path / "run") == {*RUN, *(f"expert/{part}" for part in PARTS)}
    card = ExpertLibrary.open(str(library)).card("soup")
    assert card.training["method"] == "mixture"
    assert [row["name"] for row in card.derived_from] == ["reverse", "shouting"]
    assert {row["relation"] for row in card.derived_from} == {"merged"}
    with torch.no_grad():
        logits = [open_model(place, tiny())(input_ids=IDS).logits for place in (str(folder), f"{library}/soup")]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_a_mixture_made_one_of_a_lower_rank_stays_in_the_runs_folder_without_a_library(mixture, tmp_path, capsys):
    folder = mixture(StaticConfig())
    mole("merge", f"mixture={folder}", *SMALL, "rank=2", f"run.folder={tmp_path / 'run'}")
    assert f"kept in {tmp_path / 'run'}/expert" in capsys.readouterr().out
    assert load_expert(tmp_path / "run").card.adapter["rank"] == 2


def test_a_mixture_that_goes_by_its_input_is_refused_with_the_reason(mixture, tmp_path, capsys):
    code = main(["merge", f"mixture={mixture(TopKConfig())}", *SMALL, f"run.folder={tmp_path / 'run'}"])
    assert code == 2
    assert "router=top_k weighs each input anew: no single expert does the same" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
