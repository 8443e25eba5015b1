"""`mole build-moe router=adapter_fusion router.from_folder=…`, end to end: where it starts, what a run keeps of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from walk import files, mole

from mole.cli.main import main
from mole.experts import load_expert

ON = ["backbone=tiny_encoder", "backbone.device=cpu"]
FEW = ["dataset.examples=24", "dataset.validation_examples=8", "dataset.test_examples=4"]
SHORT = ["training.max_steps=1", "training.evaluate_every=null", "training.checkpoint_every=null"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two experts at the feed-forwards of the encoder, and a fusion at the same modules."""
    root = tmp_path_factory.mktemp("fusion")
    for task in ("majority_a", "majority_b"):
        words = [*ON, f"dataset={task}", *FEW, *SHORT, "adapter=pfeiffer", f"name={task}"]
        mole("train-expert", *words, f"library={root / 'library'}", f"run.folder={root / task}")
    expert = load_expert(root / "majority_a").adapter
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, part in expert.modules.items():
        width = len(part.up)
        for name, shape in {"query": (width, width), "key": (width, width), "value": (width, width)}.items():
            home = f"{path}.adapter_fusion_layer.majority_a,majority_b.{name}"
            tensors[f"{home}.weight"] = torch.randn(*shape, generator=generator)
            if name != "value":
                tensors[f"{home}.bias"] = torch.randn(width, generator=generator)
    (root / "theirs").mkdir()
    save_file(tensors, root / "theirs" / "model_adapter_fusion.safetensors")
    node = {"config": "dynamic", "model_type": "roberta", "name": "majority_a,majority_b"}
    (root / "theirs" / "adapter_fusion_config.json").write_text(json.dumps(node))
    return root


def build(root, folder, *words):
    fixed = [*ON, "dataset=majority_a", *FEW, *SHORT, f"library={root / 'library'}", "router=adapter_fusion"]
    return ["build-moe", *fixed, "training.learning_rate=1e-9", f"run.folder={folder}", *words]


def test_the_router_starts_there_and_the_mixture_needs_the_folder_no_more(root, tmp_path):
    folder = shutil.copytree(root / "theirs", tmp_path / "theirs")
    mole(*build(root, tmp_path / "run", f"router.from_folder={folder}"))
    router = json.loads((tmp_path / "run" / "mixture" / "mixture.json").read_text())["router"]
    assert router["from_folder"] is None
    saved = load_file(tmp_path / "run" / "mixture" / "router.safetensors")
    given = load_file(folder / "model_adapter_fusion.safetensors")
    sites = {name.partition(".adapter_fusion_layer.")[0] for name in given}
    names = {"queries.weight": "query.weight", "queries.bias": "query.bias", "keys": "key.weight"}
    for site in sites:
        for ours, theirs in names.items():
            wanted = given[f"{site}.adapter_fusion_layer.majority_a,majority_b.{theirs}"]
            torch.testing.assert_close(saved[f"{site}.{ours}"], wanted, atol=1e-6, rtol=0)
    shutil.rmtree(folder)
    words = [*ON, "dataset=majority_a", *FEW, f"model={tmp_path / 'run'}", f"run.folder={tmp_path / 'table'}"]
    mole("evaluate", *words)
    assert "evaluation.json" in files(tmp_path / "table")


def test_a_folder_without_a_fusion_is_told(root, tmp_path, capsys):
    assert main(build(root, tmp_path / "run", f"router.from_folder={tmp_path}")) == 2
    assert "no fusion of AdapterHub's in" in capsys.readouterr().err
