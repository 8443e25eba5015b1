"""train-expert with every adapter of the registry: into one library, a mixture of all of them, its use."""

import json

import pytest
import torch
from walk import SHORT, SMALL, data, files, mole

from mole import adapters, backbones
from mole.backbones.tiny_backbone import TinyConfig
from mole.cli.main import main
from mole.experts import ExpertLibrary, load_expert
from mole.mixtures import load_mixture
from mole.registry import ADAPTERS

NAMES = ADAPTERS.names()
STEPS = [*SHORT, "training.max_steps=2", "training.learning_rate=0.01"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run for each adapter, and the library of them."""
    root = tmp_path_factory.mktemp("adapters")
    for name in NAMES:
        words = [*SMALL, *STEPS, *data("reverse"), f"adapter={name}", f"name={name}", f"tasks=[{name}]"]
        mole("train-expert", *words, f"library={root / 'library'}", f"run.folder={root / name}")
    return root


@pytest.fixture
def backbone():
    return backbones.load(TinyConfig(device="cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_trains_and_leaves_an_expert_of_its_method(runs, name):
    facts = json.loads((runs / name / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["result"]["steps"] == 2
    card = ExpertLibrary.open(str(runs / "library")).card(name)
    lora, bottleneck = name in ("dora", "lora", "pissa", "rslora"), name in ("houlsby", "pfeiffer", "parallel")
    assert card.adapter["method"] == ("lora" if lora else "bottleneck" if bottleneck else name)
    config = "mole_adapter.json" if bottleneck else "adapter_config.json"
    assert set(card.files) == {config, "adapter_model.safetensors"}
    assert {f"expert/{file}" for file in card.files} <= files(runs / name)


@pytest.mark.parametrize("name", NAMES)
def test_the_expert_of_the_library_works_on_a_fresh_backbone(runs, name, backbone):
    ids = torch.arange(3, 17).reshape(2, 7)
    plain = backbone.model(ids).logits
    expert = ExpertLibrary.open(str(runs / "library")).get_expert(name)
    assert expert.card.content == load_expert(runs / name).card.content
    adapters.attach_weights(backbone.model, expert.adapter)
    assert (backbone.model(ids).logits - plain).abs().max() > 1e-4


def test_an_expert_of_another_method_than_lora_is_continued_from_its_weights(runs, tmp_path):
    words = [*SMALL, *STEPS, *data("reverse"), f"expert={runs / 'library' / 'prefix'}", "name=more"]
    mole("train-expert", *words, f"run.folder={tmp_path / 'more'}")
    start, end = load_expert(runs / "prefix"), load_expert(tmp_path / "more")
    assert end.card.derived_from[0]["content"] == start.card.content
    assert end.adapter.tensors().keys() == start.adapter.tensors().keys()
    assert end.card.content != start.card.content


def test_a_mixture_of_all_adapters_is_built_and_generates(runs, tmp_path, backbone):
    mole("build-moe", *SMALL, f"library={runs / 'library'}", "router=task", f"run.folder={tmp_path / 'mixture'}")
    model = load_mixture(tmp_path / "mixture" / "mixture", backbone)
    assert set(model.expert_names) == set(NAMES)
    for task in ("prefix", "prompt", "pfeiffer"):
        words = [*SMALL, f"model={tmp_path / 'mixture'}", "prompt=reverse: abc", f"task={task}", "max_new_tokens=3"]
        mole("generate", *words, f"run.folder={tmp_path / task}")
        assert (tmp_path / task / "generations.jsonl").is_file()


def test_a_setting_out_of_range_is_told_before_anything_runs(tmp_path, capsys):
    folder = tmp_path / "run"
    words = [*SMALL, *data("reverse"), "adapter=parallel", "adapter.placement=pfeifer", f"run.folder={folder}"]
    assert main(["train-expert", *words]) == 2
    assert "adapter.placement" in capsys.readouterr().err
    assert not folder.exists()
