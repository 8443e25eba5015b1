"""PEFT's XLoraModel beside ours: logits, scalings, gates, gradients; and PEFT loading what we wrote, bit for bit."""

import json
import warnings

import peft
import pytest
import torch
from xlora_cases import build, ids, llama, logits, write_experts

from mole import xlora

CASES = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True},
    "temperature": {"layerwise_scalings": True, "softmax_temperature": 0.3},
    "depth 2": {"xlora_depth": 2, "xlora_size": 16, "layerwise_scalings": True},
    "depth 3": {"xlora_depth": 3, "xlora_size": 8},
    "depth 8": {"xlora_depth": 8, "xlora_size": 8, "layerwise_scalings": True},
    "no dropout layers": {"xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0},
    "top-k": {"top_k_lora": 2},
    "top-k layerwise": {"top_k_lora": 1, "layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
    "top-k softmax": {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
    "no softmax, weight": {"enable_softmax": False, "global_scaling_weight": 1.7},
    "scaling pass": {"scaling_pass_value": 0.2},
    "scaling pass, top-k": {"scaling_pass_value": 0.2, "top_k_lora": 2, "layerwise_scalings": True},
    "everything": {
        "xlora_depth": 2,
        "xlora_size": 8,
        "layerwise_scalings": True,
        "top_k_lora": 2,
        "enable_softmax_topk": True,
        "enable_softmax": False,
        "scaling_pass_value": 0.3,
        "global_scaling_weight": 0.8,
    },
}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> dict[str, str]:
    return write_experts(tmp_path_factory.mktemp("numbered"), names=("0", "1", "2"), alpha=1.5)


def peft_of(fields, adapters, layers=None) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about its settings
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=dict(adapters), **fields)
        return peft.get_peft_model(llama(use_cache=False), config).eval()


def pair(fields, adapters):
    ours = build(adapters, **fields)
    theirs = peft_of(fields, adapters)
    parameters = list(theirs.base_model.internal_xlora_classifier.parameters())
    for mine, other in zip(ours.router.parameters(), parameters, strict=True):
        other.data = mine.data.clone()
    return ours, theirs, parameters


@pytest.mark.parametrize("case", CASES)
def test_logits_scalings_gates_and_gradients_are_pefts(case, numbered):
    ours, theirs, parameters = pair(CASES[case], numbered)
    got, want = ours(ids()).logits, theirs(ids()).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    scalings = theirs.base_model.get_latest_scalings().detach()
    torch.testing.assert_close(ours.get_latest_scalings(), scalings, rtol=0, atol=1e-5 * float(scalings.abs().max()))
    weight = CASES[case].get("global_scaling_weight", 1.0)
    for layer, site in enumerate(ours.sites):
        module = theirs.base_model.model.get_submodule(site)
        their_gates = module.forward.__self__.get_maybe_topk_scalings(scalings) * weight
        mine = ours.get_latest_gates()[:, :, layer]
        torch.testing.assert_close(mine, their_gates, rtol=0, atol=1e-5 * float(scalings.abs().max()))
        torch.testing.assert_close(ours.effective_gates(ours.get_latest_scalings(), site), mine)
    want.square().mean().backward()
    got.square().mean().backward()
    for mine, other in zip(ours.router.parameters(), parameters, strict=True):
        assert (mine.grad - other.grad).norm() <= 3e-5 * other.grad.norm()  # below 1e-5 with wide vector units


def test_experts_with_targets_of_their_own_are_pefts(tmp_path):
    targets = [("q_proj", "v_proj"), ("v_proj", "down_proj"), ("up_proj",)]
    adapters = {}
    for index, own in enumerate(targets):
        adapters |= {str(index): write_experts(tmp_path / str(index), names=("x",), targets=own, rank=2 + index)["x"]}
    ours, theirs, _ = pair({"layerwise_scalings": True, "top_k_lora": 2}, adapters)
    want = theirs(ids()).logits
    assert (ours(ids()).logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_trained_experts_get_pefts_gradients(numbered):
    fields = {"use_trainable_adapters": True, "layerwise_scalings": True}
    ours, theirs, _ = pair(fields, numbered)
    ours(ids()).logits.square().mean().backward()
    theirs(ids()).logits.square().mean().backward()
    compared = 0
    for site, layer in ours.layers.items():
        module = theirs.base_model.model.get_submodule(site)
        grads = dict(layer.bank.named_parameters())
        a = torch.cat([module.lora_A[str(e)].weight.grad for e in range(3)], 0)
        b = torch.cat([module.lora_B[str(e)].weight.grad for e in range(3)], 1)
        for mine, other in ((grads["A"].grad, a), (grads["B"].grad, b)):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
            compared += 1
    assert compared == 2 * len(ours.sites)


# ---- files
@pytest.mark.parametrize("case", ["plain", "depth 8", "no dropout layers", "everything"])
def test_peft_loads_what_we_wrote_bit_for_bit(case, numbered, tmp_path):
    ours = build(numbered, **CASES[case])
    ours.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(use_cache=False), tmp_path / "saved").eval()
    loaded = list(theirs.base_model.internal_xlora_classifier.parameters())
    for mine, other in zip(ours.router.parameters(), loaded, strict=True):
        assert torch.equal(mine, other)
    for site, layer in ours.layers.items():
        module = theirs.base_model.model.get_submodule(site)
        for index in range(3):
            assert torch.equal(layer.bank.weights(index).A, module.lora_A[str(index)].weight)
            assert torch.equal(layer.bank.weights(index).B, module.lora_B[str(index)].weight)
    want = logits(theirs)
    assert (logits(ours) - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_router_without_biases_has_zero_biases_in_pefts_file(numbered, tmp_path):
    ours = build(numbered, xlora_depth=2, xlora_size=8, use_bias=False)
    ours.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(use_cache=False), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-4)


def test_a_moved_folder_is_loaded_by_peft_with_the_config_that_the_readme_shows(folders, tmp_path):
    ours = build(folders)
    ours.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    config = peft.XLoraConfig.from_pretrained(tmp_path / "moved")
    config.adapters = {str(i): f"{tmp_path}/moved/{name}" for i, name in enumerate(folders)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(use_cache=False), tmp_path / "moved", config=config).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-4)


def test_what_peft_saves_has_lost_its_router_and_is_refused_with_the_cause(numbered, tmp_path):
    theirs = peft_of({"xlora_depth": 2, "xlora_size": 8}, numbered)
    theirs.save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"layers\.0\.weight.*PEFT 0\.20\.0 to 0\.21\.2 drops.*PEFT 0\.19\.1"):
        xlora.from_pretrained(tmp_path / "lost", llama())


def test_a_peft_folder_is_read_alone(numbered, tmp_path):
    ours = build(numbered, layerwise_scalings=True, xlora_depth=2, xlora_size=8)
    want = logits(ours)
    ours.save_pretrained(tmp_path / "saved", layouts=("peft",))
    for name in ("mole_xlora.json", "xlora_config.json", "xlora_classifier.safetensors"):
        (tmp_path / "saved" / name).unlink()
    loaded = xlora.from_pretrained(tmp_path / "saved", llama())
    assert torch.equal(logits(loaded), want)
    named = xlora.from_pretrained(tmp_path / "saved", llama(), adapters={f"n{k}": v for k, v in numbered.items()})
    assert named.experts == ("n0", "n1", "n2")
    assert torch.equal(logits(named), want)


def test_trained_experts_of_a_peft_folder_are_asked_for(numbered, tmp_path):
    build(numbered).save_pretrained(tmp_path / "saved")
    for name in ("mole_xlora.json", "xlora_config.json", "xlora_classifier.safetensors"):
        (tmp_path / "saved" / name).unlink()
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_trainable_adapters": True}))
    with pytest.raises(ValueError, match=r"experts were trained.*adapters=\{name: path\}"):
        xlora.from_pretrained(tmp_path / "saved", llama())
    assert xlora.from_pretrained(tmp_path / "saved", llama(), adapters=numbered).get_use_trainable_adapters()
