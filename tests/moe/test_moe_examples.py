"""The examples on real data: MoEfy's page as it is written, photographs, a pretrained model; skipped without them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from surgery_cases import MLPS, Patches
from torch import nn
from torch.nn import Linear, Sequential

import mole
from mole.moe import (
    MoEBlock,
    display_abs_experts_load,
    display_experts_load,
    image_through_experts,
    make_experts_masks,
    moefy,
)

ROOT = Path(mole.__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "vision").is_dir(), reason="no data folder beside the checkout")


class CustomMoEBlock(MoEBlock):
    """As MoEfy's page has it."""

    def __init__(self, input_dim, output_dim, num_experts, *args, **kwargs):
        experts = [nn.Linear(in_features=input_dim, out_features=output_dim) for _ in range(num_experts)]
        super().__init__(input_dim=input_dim, experts=experts, *args, **kwargs)  # noqa: B026  (their way of calling it)

    def expert_forward(self, expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return expert(x)


def test_moefys_first_example_runs():
    lin_moe = CustomMoEBlock(
        k=1,
        num_experts=3,
        input_dim=4,
        output_dim=5,
        expert_choice=False,
        hole=True,
        noise="gumbel",
        aux_criterion="entropy",
        aggregation="sum",
        layer_id=0,
    )
    assert "layer_id=0" in repr(lin_moe)
    assert lin_moe(torch.randn(8, 30, 4)).shape == (8, 30, 5)
    assert lin_moe.aux_loss.requires_grad
    expert_loads = lin_moe.experts_load()
    for display in (display_experts_load, display_abs_experts_load):
        heights = [bar.get_height() for axes in display(lin_moe, expert_loads).axes for bar in axes.patches]
        assert sum(heights) == 8 * 30


@real
def test_moefys_vision_example_shows_every_patch_of_the_photograph_once():
    plt = pytest.importorskip("matplotlib.pyplot")
    torch.manual_seed(0)
    patch_size, hidden_dim = 50, 96
    moe_model = Sequential(
        Patches(patch_size),
        Linear(patch_size * patch_size * 3, hidden_dim),
        CustomMoEBlock(k=1, num_experts=4, input_dim=hidden_dim, output_dim=hidden_dim, hole=False, layer_id=1),
        Linear(hidden_dim, hidden_dim),
        CustomMoEBlock(k=1, num_experts=3, input_dim=hidden_dim, output_dim=hidden_dim, hole=True, layer_id=3),
        Linear(hidden_dim, 10),
    )
    image = plt.imread(DATA / "vision" / "coffee.png")
    figures = image_through_experts(image=image, model=moe_model, patch_size=patch_size)
    assert list(figures) == ["CustomMoEBlock 1", "CustomMoEBlock 3"]
    for figure, block in zip(figures.values(), (moe_model[2], moe_model[4]), strict=True):
        masks = make_experts_masks(block, (400, 600), patch_size)
        assert (masks.sum(0) == 1).all()
        painted = sum(
            (axes.images[0].get_array() == image).all(-1) & (mask == 1)
            for axes, mask in zip(figure.axes, masks, strict=True)
        )
        assert (painted == 1).all()


@real
def test_a_pretrained_model_has_its_loss_after_surgery():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = DATA / "models" / "stories260K" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Once upon a time there was a little girl who loved to play.", return_tensors="pt").input_ids
    with torch.no_grad():
        dense = float(model(ids, labels=ids).loss)
        moefy(model, MLPS, num_experts=4, k=1, init_noise=0.0, noise=None)
        assert float(model(ids, labels=ids).loss) == pytest.approx(dense, abs=1e-5)
    assert dense < 2


@pytest.mark.slow
@real
def test_the_vision_example_paints_photographs_and_shows_every_patch(tmp_path, monkeypatch):
    script = ROOT / "scripts" / "moe_vision.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(DATA), str(tmp_path), "12"])
    runpy.run_path(str(script), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("attention.png", "attention-load.png", "attention-total.png"),
        *("mlp.png", "mlp-load.png", "mlp-total.png", "facts.json"),
    }
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["losses"][-1] < 0.8 * facts["losses"][0]
    patches = 2 * (400 // 25) * (600 // 25)
    for name in ("mlp", "attention"):
        assert sum(facts["blocks"][name]["loads"].values()) == patches
        assert sum(sum(loads) for loads in facts["by_photo"][name].values()) == patches


@pytest.mark.slow
@real
def test_the_upcycling_example_compares_with_the_dense_model(tmp_path):
    env = {**os.environ, "MOLE": str(Path(sys.executable).parent / "mole"), "STEPS": "3", "WINDOWS": "8"}
    script = ROOT / "scripts" / "moe_upcycle.sh"
    done = subprocess.run(["bash", script, DATA, tmp_path / "out"], env=env, capture_output=True, text=True, check=True)
    table = done.stdout[done.stdout.index("nats per token") :].splitlines()
    assert table[0].split()[-3:] == ["untrained", "dense", "moe"]
    untrained, dense, mixed = map(float, table[1].split()[1:])
    assert dense < untrained
    assert mixed < untrained
    assert "experts with less than a hundredth of their even share: 0 of 20" in table[-1]
    assert (tmp_path / "out" / "moe" / "plots" / "experts-load.png").is_file()
