"""evaluate and generate of a run take the backbone that its config.yaml names, unless another one is chosen."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from walk import SHORT, data, mole

from mole import backbones
from mole.backbones.tiny_backbone import TinyConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of train-expert on a backbone of the user's own."""
    root = tmp_path_factory.mktemp("own")
    shape = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).save_pretrained(root / "other")
    backbones.load(TinyConfig(device="cpu")).tokenizer.save_pretrained(root / "other")
    chosen = ["backbone=pretrained", f"backbone.path={root / 'other'}", "backbone.device=cpu"]
    mole("train-expert", *chosen, *SHORT, *data("reverse"), f"run.folder={root / 'run'}")
    return root / "run"


@pytest.mark.parametrize("part", ["", "expert"])
def test_evaluate_needs_no_backbone_for_a_run(run, tmp_path, part):
    mole("evaluate", *data("reverse"), f"model={run / part}", "rows=[experts]", f"run.folder={tmp_path / 'run'}")
    ((value,),) = (
        row.values() for row in json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"].values()
    )
    assert value > 0
    assert "on the backbone of" in (tmp_path / "run" / "log.txt").read_text()


def test_generate_needs_no_backbone_for_a_run_and_what_is_set_beside_acts(run, tmp_path):
    mole(
        "generate",
        f"model={run}",
        "prompt=ab",
        "max_new_tokens=2",
        "backbone.device=cpu",
        f"run.folder={tmp_path / 'run'}",
    )
    assert (tmp_path / "run" / "generations.jsonl").is_file()
