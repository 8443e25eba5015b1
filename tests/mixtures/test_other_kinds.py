"""IA3, bottleneck, prefix and prompt experts: saved mixtures, combining by parameters, and what is refused."""

import warnings

import family_cases
import peft
import pytest
import torch
from mixture_cases import llama
from test_adapter_kinds_mixed import KINDS, alone, made
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from mole.adapters import (
    BottleneckWeights,
    HoulsbyConfig,
    Ia3Config,
    Ia3Weights,
    PrefixConfig,
    PrefixWeights,
    PromptConfig,
    PromptWeights,
    attach,
    attach_weights,
    peft_format,
)
from mole.adapters.adapter import Adapter
from mole.adapters.bottleneck import ACTIVATIONS
from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.mixtures.banks import BottleneckBank, Ia3Bank
from mole.mixtures.growing import put_together, take_apart
from mole.routers import TaskConfig, TopKConfig, UniformConfig, XLoraConfig
from mole.routers.attention import AttentionConfig
from mole.routing import Routing


@pytest.fixture
def ids():
    return torch.randint(3, 101, (3, 7), generator=torch.Generator().manual_seed(1))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- saved


def backbone(model) -> Backbone:
    return Backbone(model, None, "tests/llama", None, shapes_digest(llama()))


def test_a_mixture_of_all_kinds_is_saved_and_loaded_with_equal_logits(ids, tmp_path):
    adapters = {kind.replace(" ", "-"): made(kind, place) for place, kind in enumerate(KINDS)}
    tasks = {name: (name,) for name in adapters}
    model = MultiExpertModel(llama(), adapters, TaskConfig(), tasks=tasks).eval()
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    loaded = load_mixture(tmp_path / "mixture", backbone(llama()))
    assert loaded.sites == model.sites
    for name in adapters:
        with torch.no_grad():
            want = model(ids, task_names=[name] * 3).logits
            assert torch.equal(loaded(ids, task_names=[name] * 3).logits, want)


def test_trained_experts_are_saved_as_they_are_now(ids, tmp_path):
    adapters = {"factors": made("ia3", 1), "small": made("houlsby", 2)}
    model = MultiExpertModel(llama(), adapters, UniformConfig(), train="experts").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(load_mixture(tmp_path / "mixture", backbone(llama()))(ids).logits, want)


def test_a_mixture_grows_by_experts_of_other_kinds_and_those_there_stay_as_they_are(ids):
    adapters = {"small": made("parallel", 1), "before": made("prefix", 2)}
    model = MultiExpertModel(llama(), adapters, TaskConfig(), tasks={name: (name,) for name in adapters}).eval()
    with torch.no_grad():
        want = {name: model(ids, task_names=[name] * 3).logits for name in adapters}
    more = {"prompt": made("prompt", 3), "factors": made("ia3", 4)}
    parts = take_apart(model)
    grown = put_together(parts, {**more, **parts.experts}, {name: (name,) for name in (*more, *adapters)})
    for name, logits in want.items():
        with torch.no_grad():
            got = grown(ids, task_names=[name] * 3).logits
        torch.testing.assert_close(got, logits, rtol=0, atol=2e-5)
    with torch.no_grad():
        got = grown(ids, task_names=["factors"] * 3).logits
    torch.testing.assert_close(got, alone(more["factors"])(ids).logits.detach(), rtol=0, atol=5e-5)


# ---- IA3 beside PEFT on encoders and pairs of encoder and decoder

IA3 = {
    "bert": {"target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]},
    "t5": {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    "vit": {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
}


@pytest.mark.parametrize("family", IA3)
def test_one_hot_ia3_equals_peft_on_encoders_and_pairs(family, tmp_path):
    adapters, wanted, given = {}, {}, family_cases.inputs(family)
    for seed in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(family_cases.backbone(family), peft.IA3Config(**IA3[family])).eval()
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.5 * random(*parameter.shape, seed=seed, dtype=torch.float32)
            theirs.save_pretrained(tmp_path / str(seed))
        adapters[str(seed)] = peft_format.read(tmp_path / str(seed))
        with torch.no_grad():
            wanted[str(seed)] = theirs(**given).logits
    model = MultiExpertModel(family_cases.backbone(family), adapters, UniformConfig()).eval()
    for name, want in wanted.items():
        with torch.no_grad(), model.fixed_routing({name: 1.0}):
            assert (model(**given).logits - want).abs().max() <= 1e-4 * want.abs().max()
    assert (wanted["1"] - wanted["2"]).abs().max() > 1e-3


# ---- combining by parameters


def bottlenecks(count=3, size=4, **more):
    return {
        e: BottleneckWeights(
            random(size, 6, seed=e),
            random(size, seed=e + 10),
            random(6, size, seed=e + 20),
            random(6, seed=e + 30),
            **more,
        )
        for e in range(count)
    }


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "identity"])
def test_bottlenecks_combined_by_parameters_are_one_with_averaged_tensors(shape, activation):
    experts = bottlenecks(activation=activation, scale=2.0)
    bank = BottleneckBank(experts, 3, dtype=torch.float64)
    bank.spend(combine="parameters")
    weights, out = random(*shape, 3, seed=5), random(2, 5, 6, seed=6)
    got = bank(out, out, Routing(weights))
    for b in range(2):
        for t in range(5):
            w = weights.expand(2, 5, -1)[b, t]
            names = ("down", "down_bias", "up", "up_bias")
            mean = {n: sum(w[e] * getattr(experts[e], n) for e in range(3)) for n in names}
            hidden = ACTIVATIONS[activation](mean["down"] @ out[b, t] + mean["down_bias"])
            want = out[b, t] + 2.0 * (mean["up"] @ hidden + mean["up_bias"])
            torch.testing.assert_close(got[b, t], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 5)], ids=str)
def test_bottlenecks_combined_by_outputs_equal_a_loop_over_tokens_and_experts(shape):
    experts = {**bottlenecks(2, activation="gelu"), 4: bottlenecks(6, 7, activation="tanh", scale=0.5)[5]}
    bank = BottleneckBank(experts, 5, dtype=torch.float64)
    weights, out = random(*shape, 5, seed=5), random(2, 5, 6, seed=6)
    got = bank(out, out, Routing(weights))
    want = out.clone()
    act = {"gelu": torch.nn.functional.gelu, "tanh": torch.tanh}
    for b in range(2):
        for t in range(5):
            for e, one in experts.items():
                hidden = act[one.activation](one.down @ out[b, t] + one.down_bias)
                delta = one.scale * (one.up @ hidden + one.up_bias)
                want[b, t] += weights.expand(2, 5, -1)[b, t, e] * delta
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_ia3_is_the_same_combined_either_way_and_by_blocks_of_features():
    base = torch.nn.Linear(6, 4).double()
    x = random(2, 5, 6)
    for feedforward, width in ((False, 4), (True, 6)):
        experts = {e: Ia3Weights(random(width, seed=e), feedforward) for e in range(3)}
        bank, weights = Ia3Bank(experts, 3, base=base, dtype=torch.float64), random(2, 5, 3, seed=9)
        by_outputs = bank(base(x), x, Routing(weights))
        bank.spend(combine="parameters")
        assert torch.equal(bank(base(x), x, Routing(weights)), by_outputs)
        twice = Routing(weights[..., None, :].expand(2, 5, 2, 3))
        torch.testing.assert_close(bank(base(x), x, twice), by_outputs, rtol=0, atol=1e-12)
        split = Routing(random(2, 5, 2, 3, seed=3))
        parts = [sum(split.weights[..., q, e, None] * (experts[e].factors - 1) for e in range(3)) for q in range(2)]
        change = torch.cat([part.chunk(2, -1)[q] for q, part in enumerate(parts)], dim=-1)
        want = base(x) + (base(change * x) - base.bias if feedforward else change * base(x))
        torch.testing.assert_close(bank(base(x), x, split), want, rtol=0, atol=1e-12)


def test_bottlenecks_of_unlike_sizes_have_no_average():
    bank = BottleneckBank({0: bottlenecks()[0], 1: bottlenecks(2, 7)[1]}, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"sizes \(4, 7\).*use combine=outputs"):
        bank.spend(combine="parameters")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_prefixes_and_prompts_are_not_combined_by_parameters(kind):
    with pytest.raises(ValueError, match="combine=parameters"):
        MultiExpertModel(llama(), {"a": made(kind, 1)}, UniformConfig(combine="parameters"))


def test_kinds_at_one_module_are_not_combined_by_parameters():
    adapters = {"a": made("ia3", 1), "b": made("lora", 2)}
    with pytest.raises(ValueError, match="experts of different kinds, .*ia3.* share no parameters"):
        MultiExpertModel(llama(), adapters, UniformConfig(combine="parameters"))


def test_dropout_of_bottlenecks_acts_while_they_train_with_shared_masks_or_one_for_each():
    out = random(2, 50, 6, seed=6)
    one = bottlenecks(1)[0]
    both = Routing(torch.tensor([[[1.0, -1.0]]], dtype=torch.float64))  # equal experts cancel under equal masks
    for mode, cancels in (("auto", True), ("shared", True), ("independent", False), ("off", True)):
        bank = BottleneckBank({0: one, 1: one}, 2, dtype=torch.float64, dropout={0: 0.5, 1: 0.5}, expert_dropout=mode)
        alone = Routing(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64))
        still = bank.train()(out, out, alone)
        assert torch.equal(bank(out, out, alone), still)  # frozen experts drop nothing
        bank.requires_grad_(True)
        assert torch.allclose(bank(out, out, both), out, rtol=0, atol=1e-10) == cancels
        assert torch.equal(bank(out, out, alone), still) == (mode == "off")
        assert torch.equal(bank.eval()(out, out, alone), still)


# ---- prefixes and prompts


def test_the_weight_of_a_prefix_falls_smoothly_to_nothing(ids):
    model = MultiExpertModel(llama(torch.float64), {"a": made("prefix", 1)}, UniformConfig()).eval()
    want = llama(torch.float64)(ids).logits
    gaps = []
    for weight in (1e-4, 1e-6, 1e-8):
        with torch.no_grad(), model.fixed_routing({"a": weight}):
            gaps.append(float((model(ids).logits - want).abs().max().detach()))
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2] > 0


def test_prompts_of_one_length_are_averaged(ids):
    one, two = made("prompt", 1), made("prompt", 2)
    mean = 0.25 * one.modules["prompt"].embeddings + 0.75 * two.modules["prompt"].embeddings
    want = alone(Adapter("prompt", {"prompt": PromptWeights(mean)}))(ids).logits
    model = MultiExpertModel(llama(), {"a": one, "b": two}, UniformConfig()).eval()
    with torch.no_grad(), model.fixed_routing({"a": 0.25, "b": 0.75}):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=2e-5)


def test_prompts_of_unlike_lengths_need_one_expert_for_each_example(ids):
    adapters = {"a": made("prompt", 1), "b": made("prompt longer", 2)}
    model = MultiExpertModel(llama(), adapters, UniformConfig()).eval()
    with pytest.raises(ValueError, match="prompts of unlike lengths have no average"):
        model(ids)


@pytest.mark.parametrize("config", [TopKConfig(), XLoraConfig()], ids=lambda config: config.name)
def test_prompts_under_a_router_of_tokens_are_refused_at_build(config):
    with pytest.raises(ValueError, match="prompt experts act on whole sequences, and router="):
        MultiExpertModel(llama(), {"a": made("prompt", 1), "b": made("prompt", 2)}, config)


def test_weights_for_every_token_are_refused_for_prompts(ids):
    model = MultiExpertModel(llama(), {"a": made("prompt", 1)}, UniformConfig()).eval()
    with model.fixed_routing(Routing(torch.ones(3, 7, 1))), pytest.raises(ValueError, match="whole sequences"):
        model(ids)


def test_negative_weights_of_prefixes_are_refused(ids):
    model = MultiExpertModel(llama(), {"a": made("prefix", 1)}, UniformConfig()).eval()
    with model.fixed_routing({"a": -1.0}), pytest.raises(ValueError, match="no negative weights"):
        model(ids)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_router_that_goes_by_outputs_is_refused(kind):
    with pytest.raises(ValueError, match="prompt experts act on whole|add nothing"):
        MultiExpertModel(llama(), {"a": made(kind, 1)}, AttentionConfig())


# ---- backbones that a method has no place in


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=32)).eval()


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


def flash():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    return model


NESTED = HoulsbyConfig(sites={"attention": r".*\.mlp", "ffn": r".*\.down_proj"})
REFUSED = {
    "learned positions": (gpt2, PrefixConfig(), "prefixes need rotary positions.*use adapter=prompt"),
    "flash": (flash, PrefixConfig(), "flash_attention_2 takes no mask with weights.*backbone.attention=eager or sdpa"),
    "prompt before an encoder": (t5, PromptConfig(), "prompts are for models .*without an encoder"),
    "prefix in an encoder": (t5, PrefixConfig(), "prefixes are for models .*without an encoder"),
    "bottleneck by itself": (t5, HoulsbyConfig(), "where the sub-layers of a t5 end is not known"),
    "ia3 by itself": (t5, Ia3Config(), "name the modules"),
    "ia3 twice": (llama, Ia3Config(targets=("down_proj",)), "among adapter.targets too"),
    "bottleneck at a norm": (
        llama,
        HoulsbyConfig(sites={"ffn": "model.norm"}, train_norms="none"),
        "neither a linear module nor a sub-layer",
    ),
    "nested": (llama, NESTED, "is a part of .*mlp, which is adapted too"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_without_a_place_is_refused_with_the_reason(name):
    build, config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        attach(build(), config, seed=0)


Q = "model.layers.0.self_attn.q_proj"
MISFITS = {
    "ia3 of another width": ({Q: Ia3Weights(torch.ones(5))}, "5 factors for 32 features of the module's output"),
    "ia3 at an embedding": ({"model.embed_tokens": Ia3Weights(torch.ones(32))}, "is not a linear module"),
    "bottleneck of another width": (
        {Q: BottleneckWeights(torch.ones(2, 5), torch.ones(2), torch.ones(32, 2), torch.ones(32))},
        "made for 5 → 32 features, the backbone has 32 → 32",
    ),
    "prefix of other heads": (
        {"0.prefix": PrefixWeights(torch.ones(3, 4, 8), torch.ones(3, 4, 8), 0)},
        "made for 4 heads of 8 features, the backbone has 2 of 8",
    ),
    "prefix for more blocks": (
        {"9.prefix": PrefixWeights(torch.ones(3, 2, 8), torch.ones(3, 2, 8), 9)},
        "a prefix for block 9, and the backbone has 2 blocks",
    ),
    "prompt of another width": ({"prompt": PromptWeights(torch.ones(3, 5))}, "embeddings of 5 features"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_the_backbone_are_refused_alone_and_in_a_mixture(name):
    modules, message = MISFITS[name]
    adapter = Adapter(name.split()[0], modules)
    with pytest.raises(ValueError, match=message):
        attach_weights(llama(), adapter)
    model = llama()
    with pytest.raises(ValueError, match=f"'bad'.*{message}"):
        MultiExpertModel(model, {"bad": adapter}, UniformConfig())
    assert not any("Mixture" in type(module).__name__ for module in model.modules())
