"""Saved blocks: what is loaded gives bit for bit what was saved; other models and damaged folders are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from surgery_cases import MLPS, TwoBranches, batch, llama
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from mole.moe import MoEConfig, MoERouterConfig, aux_loss, load, moefy, save, unmoefy, update_router_bias
from mole.moe.opening import open_model
from mole.untrusted import Damaged, LibraryError


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def trained(model):
    """After a step on everything that may learn."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    loss = model(**batch()).logits.square().mean() + aux_loss(model)
    loss.backward()
    optimizer.step()
    update_router_bias(model)
    return model.eval()


def frozen(model):
    """Nothing but the blocks learns."""
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(aggregation="mean"),
        MoEConfig(k=2, router=MoERouterConfig(score="sigmoid", bias_rate=0.1, norm_topk=True, noise=None)),
        MoEConfig(k=2, null_experts=("zero", "constant"), router=MoERouterConfig(noise="gumbel", noise_steps=9)),
        MoEConfig(router=MoERouterConfig(score="cosine", proj_dim=5)),
        MoEConfig(shared_experts=1, k=1),
    ],
    ids=["plain", "bias", "nulls and tau", "cosine", "shared"],
)
def test_loaded_is_saved_bit_for_bit(tmp_path, config):
    model = frozen(llama())
    moefy(model, MLPS, num_experts=3, config=config)
    for block in (layer.mlp for layer in model.model.layers):
        block.requires_grad_(True)
    wanted = logits(trained(model))
    save(model, tmp_path / "moe")
    assert sorted(path.name for path in (tmp_path / "moe").iterdir()) == [
        "config.json",
        "model.safetensors",
        "moe.json",
    ]
    again = load(llama(), tmp_path / "moe")
    assert torch.equal(logits(again), wanted)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert [layer.mlp.layer_id for layer in again.model.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert json.loads((tmp_path / "moe" / "moe.json").read_text())["whole"] is False


def test_what_lies_outside_is_saved_where_it_may_have_learnt(tmp_path):
    model = llama()
    moefy(model, MLPS, num_experts=2)
    wanted = logits(trained(model))
    save(model, tmp_path / "moe")
    assert json.loads((tmp_path / "moe" / "moe.json").read_text())["whole"] is True
    assert torch.equal(logits(load(llama(seed=3), tmp_path / "moe")), wanted)


def test_the_blocks_alone_go_onto_the_same_model_only(tmp_path):
    model = frozen(llama())
    moefy(model, MLPS, num_experts=2)
    save(model, tmp_path / "moe")
    with pytest.raises(ValueError, match="holds the blocks alone, and the rest .* has other weights"):
        load(llama(seed=3), tmp_path / "moe")
    with pytest.raises(ValueError, match="this TwoBranches has no module model.layers.0.mlp"):
        load(TwoBranches(), tmp_path / "moe")
    with pytest.raises(LibraryError, match="holds the blocks alone"):
        open_model(tmp_path / "moe")
    loaded = load(llama(), tmp_path / "moe")
    with pytest.raises(ValueError, match="mixture of experts"):
        load(loaded, tmp_path / "moe")
    with pytest.raises(ValueError, match="its original was trained"):
        unmoefy(loaded)


def test_blocks_that_differ_and_a_block_under_two_names_are_kept_apart_and_together(tmp_path):
    model, x = TwoBranches(), torch.randn(2, 5, 6)
    moefy(model, "left", num_experts=3, k=2, noise=None)
    moefy(model, "other", num_experts=2, hole=True)
    save(model.eval(), tmp_path / "moe")
    again = load(TwoBranches().eval(), tmp_path / "moe")
    assert again.left is again.right
    with safe_open(tmp_path / "moe" / "model.safetensors", "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"left", "other"}  # noqa: SIM118  (no mapping)
    assert (len(again.left.experts), len(again.other.experts)) == (3, 2)
    assert again.other.config.null_experts == ("zero",)
    assert torch.equal(again(x), model(x))


def test_a_folder_is_written_whole_or_not_and_never_over_another(tmp_path):
    model = frozen(llama())
    with pytest.raises(ValueError, match="has no blocks that moefy made"):
        save(model, tmp_path / "moe")
    moefy(model, MLPS, num_experts=2)
    save(model, tmp_path / "moe")
    with pytest.raises(FileExistsError):
        save(model, tmp_path / "moe")
    save(model, tmp_path / "moe", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def spoil(folder, **changes):
    path = folder / "moe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_folders_are_refused(tmp_path):
    model = frozen(llama())
    moefy(model, MLPS, num_experts=2)
    with pytest.raises(LibraryError, match=r"has no moe\.json"):
        load(llama(), tmp_path)
    for number, (changes, told) in enumerate(
        [
            ({"format": 2}, "its format is 2"),
            ({"extra": 1}, "extra: "),
            (
                {"blocks": [{"names": ["model.layers.0.mlp"], "input_dim": 16, "num_experts": 2, "config": {"k": 0}}]},
                "k",
            ),
        ]
    ):
        folder = save(model, tmp_path / str(number))
        spoil(folder, **changes)
        dense = llama()
        with pytest.raises(Damaged, match=told):
            load(dense, folder)
        assert not dense._forward_pre_hooks
    folder = save(model, tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(Damaged, match="bytes of tensors"):
        load(llama(), folder)


def test_a_model_of_transformers_opens_from_its_folder_alone(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
    )
    model = ViTForImageClassification(config).eval()
    moefy(model, r"vit\.layers\.\d+\.mlp", num_experts=3)
    save(model, tmp_path / "vit")
    again = open_model(tmp_path / "vit")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
    assert not again.training
    path = tmp_path / "vit" / "config.json"
    for named in ("os.system", "AutoConfig", "Trainer", "_private"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [named]}))
        with pytest.raises(Damaged, match="no model of transformers"):
            open_model(tmp_path / "vit")


def test_a_model_of_ones_own_has_to_be_made_by_oneself(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    moefy(model, "0", num_experts=2)
    save(model, tmp_path / "own", whole=True)
    with pytest.raises(LibraryError, match="load it yourself"):
        open_model(tmp_path / "own")
