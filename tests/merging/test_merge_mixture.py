"""A mixture as one expert: the same logits where its weights are constant, and a refusal with the reason where not."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import Adapter, LoraWeights
from mole.adapters.ia3 import Ia3Weights
from mole.merging import one_expert, static_weights, with_modules
from mole.mixtures import MultiExpertModel
from mole.routers import SingleConfig, StaticConfig, TaskConfig, TopKConfig, UniformConfig, XLoraConfig

IDS = torch.arange(3, 21).view(2, 9)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


def lora(ends, rank, seed, *, dora=False, bias=False) -> Adapter:
    """On q_proj (square), v_proj and down_proj, as `ends` says."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    modules = {}
    for path, module in llama().named_modules():
        if path.endswith(ends):
            more = {"magnitude": 1 + draw(module.out_features).abs()} if dora else {}
            more |= {"bias": draw(module.out_features)} if bias else {}
            A, B = draw(rank, module.in_features), draw(module.out_features, rank)
            modules[path] = LoraWeights(A=A, B=B, alpha=2.0 + seed, **more)
    return Adapter("lora", modules)


def unlike() -> dict[str, Adapter]:
    """Ranks, scales and targets differ."""
    return {
        "a": lora(("q_proj", "v_proj"), 2, 0),
        "b": lora(("v_proj", "down_proj"), 3, 1),
        "c": lora(("q_proj", "down_proj"), 1, 2),
    }


def alike(**more) -> dict[str, Adapter]:
    return {name: lora(("q_proj", "down_proj"), 2, seed, **more) for seed, name in enumerate("abc")}


def mixture(experts, config, **options) -> MultiExpertModel:
    """With parameters of the router that are not at their start."""
    model = MultiExpertModel(llama(), experts, config, expert_dtype="auto", **options).double().eval()
    generator = torch.Generator().manual_seed(3)
    for router in model.routers().values():
        for parameter in router.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@torch.no_grad()
def assert_same_logits(model, tolerance=1e-9, **options):
    wanted = model(input_ids=IDS).logits
    experts, routers = model.adapters(), model.routers()
    backbone = model.unload()
    merged = one_expert(experts, routers, backbone=backbone, dtype="float64", **options)
    alone = (
        MultiExpertModel(llama(), {"one": merged.adapter}, UniformConfig(), modules_to_save="take:one").double().eval()
    )
    assert (alone(input_ids=IDS).logits - wanted).abs().max() <= tolerance * wanted.abs().max()
    return merged


CONSTANT = [
    UniformConfig(),
    UniformConfig(exclude=("b",)),
    SingleConfig(expert="c"),
    StaticConfig(),
    StaticConfig(num_groups=None, site="module"),
    StaticConfig(num_groups=2, normalise="sigmoid"),
    StaticConfig(normalise="none"),
]


@pytest.mark.parametrize("missing", ["drop", "renormalise"])
@pytest.mark.parametrize("config", CONSTANT, ids=str)
def test_constant_weights_make_one_expert_with_the_mixtures_logits(config, missing):
    assert_same_logits(mixture(unlike(), replace(config, missing=missing)))


@pytest.mark.parametrize("config", CONSTANT, ids=str)
def test_constant_weights_of_parameters_make_one_expert_of_their_rank(config):
    merged = assert_same_logits(mixture(alike(), replace(config, combine="parameters")))
    assert {layer.rank for layer in merged.layers} == {2}


@pytest.mark.parametrize("experts", [alike(dora=True), alike(bias=True)], ids=["dora", "lora_bias"])
def test_experts_with_dora_or_biases_make_one_exactly(experts):
    assert_same_logits(mixture(experts, StaticConfig()))


def test_ia3_experts_make_one_exactly():
    generator = torch.Generator().manual_seed(0)
    experts = {}
    for name in "ab":
        modules = {
            path: Ia3Weights(
                1 + 0.3 * torch.randn(16 if path.endswith("q_proj") else 24, generator=generator, dtype=torch.float64),
                feedforward=path.endswith("down_proj"),
            )
            for path, _ in llama().named_modules()
            if path.endswith(("q_proj", "down_proj"))
        }
        experts[name] = Adapter("ia3", modules)
    assert_same_logits(mixture(experts, StaticConfig()))


def test_whole_modules_are_mixed_or_stand_as_the_mixture_had_them():
    generator = torch.Generator().manual_seed(0)
    experts = {}
    for name, adapter in alike().items():
        norm = {"weight": 1 + 0.3 * torch.rand(16, generator=generator, dtype=torch.float64)}
        experts[name] = replace(adapter, full_modules={"model.norm": norm}, full_names=("norm",))
    assert_same_logits(mixture(experts, StaticConfig(normalise="none"), modules_to_save="mix"))
    model = mixture(experts, UniformConfig(), modules_to_save="take:b")
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    standing = {path: stand_in.module for path, stand_in in model.stand_ins.items()}
    bare = {name: replace(one, full_modules={}, full_names=()) for name, one in model.adapters().items()}
    merged = with_modules(one_expert(bare, model.routers(), dtype="float64"), standing)
    assert merged.adapter.full_names == ("norm",)
    alone = (
        MultiExpertModel(llama(), {"one": merged.adapter}, UniformConfig(), modules_to_save="take:one").double().eval()
    )
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=IDS).logits, wanted, rtol=0, atol=1e-9)


def test_experts_without_weight_are_left_out_of_the_result():
    model = mixture(unlike(), SingleConfig(expert="b"))
    merged = one_expert(model.adapters(), model.routers())
    assert [layer.rank for layer in merged.layers] == [3, 3, 3, 3]
    assert all(path.endswith(("v_proj", "down_proj")) for path in merged.adapter.modules)


def test_a_lower_rank_is_taken_with_its_error_told():
    model = mixture(unlike(), UniformConfig())
    merged = one_expert(model.adapters(), model.routers(), rank=1)
    assert {layer.rank for layer in merged.layers} == {1}
    assert merged.error > 0.01


@pytest.mark.parametrize("config", [TopKConfig(), XLoraConfig(), TaskConfig()], ids=lambda c: c.name)
def test_weights_that_depend_on_the_input_are_refused_with_the_reason(config):
    tasks = {name: (name,) for name in "abc"}
    model = mixture(alike(), config, tasks=tasks)
    with pytest.raises(ValueError, match=rf"router={config.name} .*no single expert"):
        one_expert(model.adapters(), model.routers())


def test_ungated_biases_are_refused():
    model = mixture(alike(bias=True), UniformConfig(), gate_lora_bias=False)
    with pytest.raises(ValueError, match=r"expert 'a' at .*: its bias is added whatever the weights"):
        one_expert(model.adapters(), model.routers(), gate_lora_bias=False)


def test_weights_are_told_by_module():
    model = mixture(unlike(), StaticConfig(num_groups=None, site="module"))
    found = static_weights(model.routers())
    assert tuple(found) == model.sites
    assert len({tuple(row.tolist()) for row in found.values()}) == len(model.sites)
