"""Norms that an adapter trains along: every make of norm with other numbers, misfits, and what reads such experts."""

import copy

import pytest
import torch
from site_cases import IDS, adapted, backbone, moved
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from mole.adapters import Adapter, BottleneckWeights, NormWeights, attach_weights, extract
from mole.adapters.norm import NormLayer, normed
from mole.experts import BackboneRef, Expert, describe, load_expert
from mole.experts.similarity import gram
from mole.merging import LinearConfig, TiesConfig, merge

NORMS = {
    "layer": nn.LayerNorm(8, eps=1e-3),
    "layer without bias": nn.LayerNorm(8, bias=False),
    "rms": nn.RMSNorm(8),
    "llama": LlamaRMSNorm(8),
    "gemma": GemmaRMSNorm(8),
    "t5": T5LayerNorm(8),
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_norm_with_other_numbers_is_the_norm_that_has_them_bit_for_bit(name, dtype):
    base, x = copy.deepcopy(NORMS[name]).to(dtype), drawn(2, 3, 8).to(dtype)
    other = copy.deepcopy(base)
    for seed, parameter in enumerate(other.parameters()):
        parameter.copy_(drawn(8, seed=seed + 1))
    weights = NormWeights.of(other)
    assert torch.equal(normed(base, x, weights.weight, weights.bias), other(x))
    assert torch.equal(NormLayer(base, weights)(x), other(x))
    assert torch.equal(NormLayer(base, NormWeights.of(base))(x), base(x))


@pytest.mark.parametrize("name", NORMS)
def test_gradients_reach_the_own_numbers_alone(name):
    base = copy.deepcopy(NORMS[name]).requires_grad_(False)
    layer = NormLayer(base, NormWeights.of(base))
    layer(drawn(4, 8)).square().sum().backward()
    own = [layer.own_weight, *([] if layer.own_bias is None else [layer.own_bias])]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own)
    assert all(parameter.grad is None for parameter in base.parameters())
    assert layer.weights().tensors().keys() == NormWeights.of(base).tensors().keys()


@pytest.mark.parametrize(
    ("weights", "module", "message"),
    [
        (NormWeights(torch.ones(8)), nn.Linear(8, 8), "made for a norm, which a Linear is not"),
        (NormWeights(torch.ones(8)), nn.LayerNorm(8), "a norm of .*the backbone has .*bias"),
        (NormWeights(torch.ones(6)), nn.RMSNorm(8), r"a norm of .*\(6,\).*the backbone has .*\(8,\)"),
        (NormWeights(torch.ones(8), torch.ones(8)), nn.RMSNorm(8), "a norm of .*bias"),
    ],
)
def test_misfits_are_told_with_both_shapes(weights, module, message):
    with pytest.raises(ValueError, match=message):
        weights.layer(module, 0.0, module)


@pytest.mark.parametrize("shapes", [((8,), (6,)), ((2, 4), (2, 4))], ids=str)
def test_tensors_of_a_norm_that_do_not_fit_each_other_are_refused(shapes):
    with pytest.raises(ValueError, match="tensors of a norm of shapes"):
        NormWeights(*(torch.ones(shape) for shape in shapes))


def with_norms(seed, family="bert", **options):
    model, _ = adapted(family, "houlsby", trained=("classifier",), **options)
    return extract(moved(model, seed), ("classifier",))


def test_an_expert_with_norms_is_saved_and_loaded_bit_for_bit(tmp_path):
    adapter = with_norms(1)
    card = describe(adapter, BackboneRef("tests/bert"), tasks=["rte"])
    assert (card.adapter["rank"], card.adapter["alpha"], card.adapter["full_modules"]) == (5, None, ["classifier"])
    assert card.adapter["parameters"] == sum(tensor.numel() for tensor in adapter.tensors().values())
    Expert(card, adapter).save(tmp_path / "expert")
    loaded = load_expert(tmp_path / "expert").adapter
    assert loaded.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(tensor, adapter.tensors()[name]) for name, tensor in loaded.tensors().items())
    assert {type(part) for part in loaded.modules.values()} == {NormWeights, BottleneckWeights}


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_of_experts_alike_norms_and_bottlenecks_are_averaged(family):
    one, other = (extract(moved(adapted(family, "houlsby")[0], seed)) for seed in (1, 2))
    found = merge({"a": one, "b": other}, LinearConfig(weights={"a": 0.25, "b": 0.75}), dtype="float64").adapter
    assert found.modules.keys() == one.modules.keys()
    for name, tensor in found.tensors().items():
        want = 0.25 * one.tensors()[name].double() + 0.75 * other.tensors()[name].double()
        torch.testing.assert_close(tensor, want, rtol=0, atol=1e-12)


def test_an_expert_averaged_with_itself_gives_it_back():
    one = with_norms(1)
    found = merge(dict.fromkeys(("a", "b", "c", "d"), one), LinearConfig()).adapter
    assert all(torch.equal(tensor, one.tensors()[name]) for name, tensor in found.tensors().items())


def test_what_has_no_average_is_refused_with_the_reason():
    one, plain = with_norms(1), with_norms(2, train_norms="none")
    with pytest.raises(ValueError, match="the experts 'a' and 'b' adapt other modules"):
        merge({"a": one, "b": plain}, LinearConfig())
    with pytest.raises(ValueError, match="of these experts only the parameters can be averaged"):
        merge({"a": one, "b": with_norms(2)}, TiesConfig())


def test_experts_without_low_rank_factors_are_not_compared_and_the_reason_is_told():
    with pytest.raises(ValueError, match="holds no LoRA factors"):
        gram({"a": with_norms(1), "b": with_norms(2)})


@torch.no_grad()
def test_a_norm_by_itself_is_an_adapter_too():
    plain, other = backbone("llama"), backbone("llama")
    norm = plain.model.norm.weight
    attach_weights(other, Adapter("bottleneck", {"model.norm": NormWeights(norm * 2)}))
    want = plain(IDS).logits
    torch.testing.assert_close(other(IDS).logits, want * 2, rtol=1e-5, atol=1e-5)
