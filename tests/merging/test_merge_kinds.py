"""Experts of every kind: what can be merged is, exactly; what cannot is refused, and told why."""

from dataclasses import replace

import peft
import pytest
import torch
from merging_cases import dense, lora
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import Adapter, LoraWeights, peft_format
from mole.adapters.bottleneck import BottleneckWeights
from mole.adapters.ia3 import Ia3Weights
from mole.adapters.prefix import PrefixWeights
from mole.adapters.prompt import PromptWeights
from mole.experts import BackboneRef, Expert, describe, load_expert
from mole.merging import DareConfig, LinearConfig, SlerpConfig, TaskArithmeticConfig, TiesConfig, TsvConfig, merge

close = {"rtol": 0, "atol": 1e-11}


def llama(dtype=torch.float64) -> LlamaForCausalLM:
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
    return LlamaForCausalLM(config).to(dtype).eval()


def test_embeddings_are_merged_as_matrices():
    two = {
        name: Adapter("lora", {"embed": lora((8, 31), rank, seed=rank, embedding=True)})
        for name, rank in (("a", 2), ("b", 3))
    }
    result = merge(two, TaskArithmeticConfig(), dtype="float64")
    assert result.adapter.modules["embed"].embedding
    torch.testing.assert_close(dense(result.adapter)["embed"], sum(dense(a)["embed"] for a in two.values()), **close)


def convolution(seed, rank=3, groups=1):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 4, 3, 3, generator=generator, dtype=torch.float64)
    B = torch.randn(6, rank // groups, 1, 1, generator=generator, dtype=torch.float64)
    return LoraWeights(A=A, B=B, alpha=2.0)


def test_convolutions_are_merged_over_channels_and_kernel():
    two = {name: Adapter("lora", {"conv": convolution(seed)}) for seed, name in enumerate("ab")}
    result = merge(two, LinearConfig(), rank=4, dtype="float64").adapter.modules["conv"]
    assert (tuple(result.A.shape), tuple(result.B.shape)) == ((4, 4, 3, 3), (6, 4, 1, 1))
    whole = sum(dense(a)["conv"] for a in two.values()) / 2
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(result.B.flatten(1) @ result.A.flatten(1), U[:, :4] * S[:4] @ Vh[:4], **close)


def test_a_convolution_with_groups_is_refused():
    two = {name: Adapter("lora", {"conv": convolution(0, rank=4, groups=2)}) for name in "ab"}
    with pytest.raises(ValueError, match="expert 'a' at conv: a convolution with groups is no single product"):
        merge(two, LinearConfig())


def test_a_convolution_and_a_linear_module_are_refused_as_unlike():
    two = {"a": Adapter("lora", {"m": convolution(0)}), "b": Adapter("lora", {"m": lora((6, 4), 2, seed=0)})}
    with pytest.raises(
        ValueError, match=r"m: the experts 'a' and 'b' were made for unlike modules: convolution 4×3×3 → 6"
    ):
        merge(two, LinearConfig())


def dora_experts(tmp_path) -> dict[str, Adapter]:
    """Two DoRAs trained by nobody, saved by PEFT."""
    found = {}
    for place, name in enumerate("ab"):
        model = peft.get_peft_model(
            llama(torch.float32),
            peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        )
        generator = torch.Generator().manual_seed(place)
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
            elif "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
        found[name] = peft_format.read(tmp_path / name)
    return found


def test_dora_is_merged_through_what_it_does_to_the_weight(tmp_path):
    two, model = dora_experts(tmp_path), llama()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        for name, adapter in two.items():
            alone = merge({name: adapter}, LinearConfig(), backbone=model, dtype="float64").adapter
            oracle = peft.PeftModel.from_pretrained(llama(), tmp_path / name).eval()
            changed = llama()
            for path, delta in dense(alone).items():
                changed.get_submodule(path).weight += delta
            torch.testing.assert_close(changed(ids).logits, oracle(ids).logits, rtol=0, atol=1e-9)
    both = dense(merge(two, LinearConfig(), backbone=model, dtype="float64").adapter)
    each = [dense(merge({n: a}, LinearConfig(), backbone=model, dtype="float64").adapter) for n, a in two.items()]
    for path in both:
        torch.testing.assert_close(both[path], (each[0][path] + each[1][path]) / 2, **close)


def test_dora_without_the_backbone_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(
        ValueError, match=r"expert 'a' at .*: what DoRA adds depends on the backbone's weight: name the"
    ):
        merge(dora_experts(tmp_path), LinearConfig())


def biased(seed, name="m"):
    return Adapter("lora", {name: lora((5, 4), 2, seed=seed, bias=torch.arange(5.0, dtype=torch.float64) - seed)})


@pytest.mark.parametrize("config", [LinearConfig(), TaskArithmeticConfig(scale=0.5), TiesConfig(density=1.0)], ids=str)
def test_biases_of_lora_are_merged_with_their_scale(config):
    two = {"a": biased(0), "b": biased(3)}
    found = merge(two, config, dtype="float64").adapter.modules["m"]
    one, other = (w.scale * w.bias for w in (a.modules["m"] for a in two.values()))
    wanted = (one + other) / 2
    if config.name == "ties":  # where signs differ the larger one alone
        wanted = torch.where(one * other < 0, torch.where((one + other).sign() == one.sign(), one, other), wanted)
        wanted = torch.where(one == 0, other, torch.where(other == 0, one, wanted))
    torch.testing.assert_close(found.bias, wanted, **close)
    assert found.scale == 1


def test_a_module_without_a_bias_gets_none_that_acts():
    two = {"a": biased(1), "b": Adapter("lora", {"n": lora((5, 4), 2, seed=1)})}
    modules = merge(two, LinearConfig()).adapter.modules
    assert not modules["n"].bias.any()
    assert modules["m"].bias.any()


@pytest.mark.parametrize("config", [TsvConfig()], ids=str)
def test_vectors_are_refused_by_methods_for_matrices(config):
    with pytest.raises(ValueError, match=r"m: method=tsv merges matrices, and the experts have vectors there \(bias\)"):
        merge({"a": biased(0), "b": biased(1)}, config)


def ia3(seed, **more):
    generator = torch.Generator().manual_seed(seed)
    factors = 1 + 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)
    return Adapter(
        "ia3", {"k_proj": Ia3Weights(factors), "down_proj": Ia3Weights(2 - factors, feedforward=True), **more}
    )


def test_ia3_is_merged_on_what_its_factors_are_above_one():
    two = {"a": ia3(0), "b": ia3(1)}
    for config, weights in (
        (LinearConfig(), (0.5, 0.5)),
        (TaskArithmeticConfig(weights={"a": 2.0, "b": -1.5}), (2.0, -1.5)),
    ):
        found = merge(two, config, dtype="float64").adapter
        assert found.method == "ia3"
        assert found.modules["down_proj"].feedforward
        for path, part in found.modules.items():
            wanted = 1 + sum(w * (a.modules[path].factors - 1) for w, a in zip(weights, two.values(), strict=True))
            torch.testing.assert_close(part.factors, wanted, **close)
    for config in (TiesConfig(), DareConfig(), SlerpConfig()):
        assert merge(two, config).adapter.modules["k_proj"].factors.isfinite().all()


def bottleneck(seed, rank=3, **more):
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((rank, 8), (8, rank)))
    return Adapter("bottleneck", {"mlp": BottleneckWeights(down, down[:, 0].clone(), up, up[:, 0].clone(), **more)})


def test_of_bottlenecks_the_parameters_are_averaged():
    two = {"a": bottleneck(0), "b": bottleneck(1)}
    found = merge(two, LinearConfig(weights={"a": 0.25, "b": 0.75}), dtype="float64").adapter
    for name, tensor in found.modules["mlp"].tensors().items():
        one, other = (adapter.modules["mlp"].tensors()[name] for adapter in two.values())
        torch.testing.assert_close(tensor, 0.25 * one + 0.75 * other, **close)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("prompt", lambda seed: PromptWeights(drawn(seed, 5, 16))),
        ("prefix", lambda seed: PrefixWeights(drawn(seed, 5, 2, 4), drawn(seed + 9, 5, 2, 4), block=1)),
    ],
)
def test_prompts_and_prefixes_of_equal_length_are_averaged(method, weights):
    two = {name: Adapter(method, {"model": weights(seed)}) for seed, name in enumerate("ab")}
    found = merge(two, LinearConfig(), dtype="float64").adapter
    assert found.method == method
    for name, tensor in found.modules["model"].tensors().items():
        wanted = sum(adapter.modules["model"].tensors()[name] for adapter in two.values()) / 2
        torch.testing.assert_close(tensor, wanted, **close)


@pytest.mark.parametrize(
    ("adapters", "config", "told"),
    [
        (
            {"a": bottleneck(0), "b": bottleneck(1)},
            TiesConfig(),
            "of these experts only the parameters can be averaged",
        ),
        ({"a": bottleneck(0), "b": bottleneck(1, rank=4)}, LinearConfig(), "mlp: the experts 'a' and 'b' are unlike"),
        ({"a": bottleneck(0), "b": bottleneck(1, activation="gelu")}, LinearConfig(), "unlike in more than values"),
        (
            {"a": bottleneck(0), "b": ia3(0)},
            LinearConfig(),
            r"unlike kinds cannot become one \(bottleneck: 'a' at mlp; ia3",
        ),
        ({"a": biased(0), "b": ia3(0)}, LinearConfig(), r"lora: 'a' at m; ia3: 'b' at"),
    ],
)
def test_what_cannot_be_merged_is_refused(adapters, config, told):
    with pytest.raises(ValueError, match=told):
        merge(adapters, config)


def headed(seed, labels=3, **more):
    generator = torch.Generator().manual_seed(seed)
    head = {"weight": torch.randn(labels, 16, generator=generator, dtype=torch.float64)}
    modules = {"model.layers.0.self_attn.q_proj": lora((16, 16), 2, seed=seed)}
    return Adapter("lora", modules, full_modules={"score": head}, full_names=("score",), task_type="SEQ_CLS", **more)


@pytest.mark.parametrize("make", [ia3, bottleneck, biased], ids=lambda make: make.__name__)
def test_what_was_merged_is_an_expert_that_is_saved_and_read_again(make, tmp_path):
    made = merge({"a": make(0), "b": make(1)}, LinearConfig()).adapter
    Expert(describe(made, BackboneRef("tiny")), made).save(tmp_path / "expert")
    found = load_expert(tmp_path / "expert").adapter
    assert found.method == made.method
    assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in made.tensors().items())


def test_numbers_that_are_not_finite_are_refused():
    bad = replace(lora((5, 4), 2, seed=0), B=torch.full((5, 2), torch.nan))
    with pytest.raises(ValueError, match="expert 'b' at m: B holds numbers that are not finite"):
        merge({"a": biased(0), "b": Adapter("lora", {"m": bad})}, TsvConfig())


def test_heads_are_merged_linearly_whatever_the_method():
    two = {"a": headed(0), "b": headed(1)}
    mean = sum(a.full_modules["score"]["weight"] for a in two.values()) / 2
    for config in (LinearConfig(), TiesConfig(), TsvConfig()):
        found = merge(two, config, dtype="float64").adapter
        torch.testing.assert_close(found.full_modules["score"]["weight"], mean, **close)
        assert (found.full_names, found.task_type) == (("score",), "SEQ_CLS")


def test_heads_whose_weights_do_not_add_up_need_the_backbones_own():
    two, config = {"a": headed(0), "b": headed(1)}, TaskArithmeticConfig(scale=0.8)
    with pytest.raises(
        ValueError, match=r"score.weight: the weights .* add up to 1.6, and the rest is the backbone's own"
    ):
        merge(two, config)
    model = llama()
    model.score = torch.nn.Linear(16, 3, bias=False).double()
    found = merge(two, config, backbone=model, dtype="float64").adapter.full_modules["score"]["weight"]
    own = model.score.weight
    wanted = own + 0.8 * sum(a.full_modules["score"]["weight"] - own for a in two.values())
    torch.testing.assert_close(found, wanted.detach(), **close)


def test_heads_with_other_labels_cannot_become_one():
    with pytest.raises(ValueError, match=r"score.weight: the experts' shapes differ .*heads with other labels"):
        merge({"a": headed(0), "b": headed(1, labels=4)}, LinearConfig())


def test_trained_biases_of_the_backbone_are_merged_linearly():
    bias = {n: torch.arange(16, dtype=torch.float64) * n for n in (1, 3)}
    path = "model.layers.0.self_attn.q_proj"
    two = {
        name: Adapter("lora", {path: lora((16, 16), 2, seed=n)}, biases={path: bias[n]}, bias_kind="lora_only")
        for name, n in (("a", 1), ("b", 3))
    }
    found = merge(two, LinearConfig(), dtype="float64").adapter
    assert found.bias_kind == "lora_only"
    torch.testing.assert_close(found.biases[path], torch.arange(16, dtype=torch.float64) * 2, **close)


def test_experts_that_came_with_unlike_weights_of_the_backbone_are_refused():
    part = {"m": lora((5, 4), 2, seed=0)}
    weight = torch.ones(5, 4)
    two = {
        "a": Adapter("lora", part, base_weights={"m": weight}),
        "b": Adapter("lora", part, base_weights={"m": weight}),
    }
    assert torch.equal(merge(two, LinearConfig()).adapter.base_weights["m"], weight)
    two["b"] = replace(two["b"], base_weights={"m": 2 * weight})
    with pytest.raises(ValueError, match="m: the experts 'a' and 'b' came with unlike weights of the backbone"):
        merge(two, LinearConfig())


def test_targets_and_task_type_are_those_of_the_experts():
    part = {"m": lora((5, 4), 2, seed=0)}
    one, other = Adapter("lora", part, targets=("q_proj",)), Adapter("lora", part, targets=("v_proj", "q_proj"))
    assert merge({"a": one, "b": other}, LinearConfig()).adapter.targets == ("q_proj", "v_proj")
    assert merge({"a": one, "b": replace(other, targets=())}, LinearConfig()).adapter.targets == ()
    assert merge({"a": one, "b": replace(other, task_type=None)}, LinearConfig()).adapter.task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match=r"under unlike heads \(CAUSAL_LM, SEQ_CLS\)"):
        merge({"a": one, "b": replace(other, task_type="SEQ_CLS")}, LinearConfig())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_result_has_the_dtype_that_was_asked_for(dtype):
    found = merge({"a": biased(0), "b": biased(1)}, LinearConfig(), dtype=dtype).adapter
    assert {tensor.dtype for tensor in found.tensors().values()} == {getattr(torch, dtype)}
