"""Kinds of experts and layers, one by one: heads, embeddings, convolutions, quantised layers, DoRA, biases."""

import copy
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from family_cases import GROUPED, backbone, case, inputs, with_peft
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mole.adapters import Adapter, LoraWeights, peft_format
from mole.backbones.modules import compute_dtype_of, dense_weight, in_out_features, kind_of
from mole.mixtures import MultiExpertModel
from mole.mixtures.banks import DoraBank
from mole.routers import TopKConfig, UniformConfig, XLoraConfig
from mole.routing import Routing, RoutingInputs

XLORA = XLoraConfig(layerwise=True, temperature=0.3)


def random(*shape, seed=0, dtype=torch.float32):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ends(model, *names):
    return {path: m for path, m in model.named_modules() if path.endswith(names)}


def experts(model, *names, magnitude=False, bias=False, seeds=(1, 2)):
    """Two experts on the linear modules with these ends."""
    made = {}
    for seed in seeds:
        modules = {}
        for place, (path, module) in enumerate(ends(model, *names).items()):
            d_in, d_out = in_out_features(module)
            modules[path] = LoraWeights(
                A=random(seed + 1, d_in, seed=seed + place),
                B=random(d_out, seed + 1, seed=seed + place + 50),
                alpha=3.0,
                magnitude=random(d_out, seed=seed + 7).abs() + 0.5 if magnitude else None,
                bias=random(d_out, seed=seed + 8) if bias else None,
            )
        made[f"expert {seed}"] = Adapter("lora", modules)
    return made


@pytest.fixture
def ids():
    return inputs("llama")["input_ids"]


# ---- the output head


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([4, 1, 0, 0, 6, 2, 5]), torch.tensor([2])], ids=str)
def test_an_adapted_head_spends_the_gates_of_the_positions_that_are_kept(tmp_path_factory, keep, ids):
    model = case("llama", tmp_path_factory.mktemp("experts")).model
    assert "lm_head" in model.sites
    with torch.no_grad():
        whole, some = model(input_ids=ids).logits, model(input_ids=ids, logits_to_keep=keep).logits
    want = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(some, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "opt"])
def test_generation_with_heads_and_embeddings_adapted_equals_recomputation(name, tmp_path):
    config = XLoraConfig(layerwise=True, temperature=0.3, dtype="float64")
    one = case(name, tmp_path, config)
    one.model.double()
    for options in ({"do_sample": False}, {"num_beams": 2}):
        options |= {"max_new_tokens": 6, "min_new_tokens": 6}
        want = one.model.generate(**one.inputs, use_cache=False, **options)
        assert torch.equal(one.model.generate(**one.inputs, **options), want)


def test_tied_embeddings_stay_tied_and_each_has_its_own_experts(tmp_path):
    model = case("qwen3", tmp_path).model
    assert model.backbone.lm_head.weight is model.backbone.get_input_embeddings().weight
    assert model.backbone.model.embed_tokens is model.backbone.get_input_embeddings()
    assert type(model.backbone.model.embed_tokens) is nn.Embedding


# ---- embeddings


def test_an_embedding_called_on_its_own_is_the_backbones(tmp_path, ids):
    one = case("llama", tmp_path)
    want = one.plain.get_input_embeddings()(ids)
    assert torch.equal(one.model.get_input_embeddings()(ids), want)
    with one.model.context.push(one.model.new_frame(RoutingInputs())):  # as inside generate, between two forwards
        assert torch.equal(one.model.get_input_embeddings()(ids), want)


def test_the_scale_of_an_embedding_is_read_live(tmp_path, ids):
    one = case("gemma3", tmp_path)
    theirs = one.theirs[0]
    for model in (theirs.base_model.model.model.embed_tokens.base_layer, one.model.backbone.model.embed_tokens.base):
        model.embed_scale.fill_(2.5)
    with torch.no_grad(), one.model.fixed_routing({"expert 0": 1.0}):
        want = theirs(input_ids=ids).logits
        torch.testing.assert_close(one.model(input_ids=ids).logits, want, rtol=0, atol=1e-4)


def test_padding_gives_no_gradient_to_an_embedding_expert():
    model = LlamaForCausalLM(LlamaConfig(**GROUPED)).eval()
    weights = LoraWeights(A=random(2, 51), B=random(16, 2, seed=1), alpha=2.0, embedding=True)
    mixture = MultiExpertModel(
        model, {"one": Adapter("lora", {"model.embed_tokens": weights})}, UniformConfig(), train="experts"
    )
    mixture(input_ids=torch.tensor([[0, 4, 5, 0]])).logits.sum().backward()
    grad = mixture.layers["model.embed_tokens"].bank.table.grad
    assert grad[0].abs().sum() == 0
    assert grad[4].abs().sum() > 0
    assert grad[5].abs().sum() > 0


# ---- convolutions


class ConvolutionConfig(PreTrainedConfig):
    model_type = "convolutions"
    hidden_size = 6


class Convolutions(PreTrainedModel):
    """Convolutions of all kinds one after another over [B, 6, S], given back as [B, S, 6]."""

    config_class = ConvolutionConfig
    main_input_name = "inputs_embeds"

    def __init__(self, config):
        super().__init__(config)
        self.point = nn.Conv1d(6, 6, 1)
        self.wide = nn.Conv1d(6, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 6, 3, padding="same", groups=2)
        self.flat = nn.Conv2d(6, 6, 3, padding=(1, 2), stride=1)
        self.deep = nn.Conv3d(6, 6, 1)
        self.post_init()

    def forward(self, inputs_embeds, **kwargs):
        x = inputs_embeds.transpose(1, 2)
        x = x + torch.tanh(self.wide(torch.tanh(self.point(x))))
        x = x + self.grouped(x)
        x = x + torch.tanh(self.flat(x[:, :, None])[:, :, 0, : x.shape[-1]])
        x = x + self.deep(x[:, :, None, None])[:, :, 0, 0]
        return BaseModelOutput(last_hidden_state=x.transpose(1, 2))


def convolutions():
    torch.manual_seed(0)
    return Convolutions(ConvolutionConfig()).eval()


CONVOLUTIONS = [
    {"target_modules": ["point", "wide", "flat"], "r": 2},
    {"target_modules": ["grouped", "wide", "deep"], "r": 4, "lora_bias": True},
    {"target_modules": ["point", "deep"], "r": 3, "use_dora": True},
    {"target_modules": ["point", "flat"], "r": 2, "bias": "all"},
]


@pytest.fixture
def convolved(tmp_path):
    """A mixture over convolutions, and PEFT's model of each expert."""
    theirs, adapters = [], {}
    for index, settings in enumerate(CONVOLUTIONS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = peft.get_peft_model(convolutions(), peft.LoraConfig(**settings)).eval()
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.data += random(*parameter.shape, seed=index)
            made.save_pretrained(tmp_path / str(index))
        theirs.append(made)
        adapters[str(index)] = peft_format.read(tmp_path / str(index))
    return MultiExpertModel(convolutions(), adapters, XLORA, pooled_gate="mean").eval(), theirs


def test_an_expert_alone_on_convolutions_equals_peft(convolved):
    model, theirs = convolved
    x = random(2, 5, 6, seed=4)
    for index, one in enumerate(theirs):
        with torch.no_grad(), model.fixed_routing({str(index): 1.0}):
            got, want = model(inputs_embeds=x).last_hidden_state, one(inputs_embeds=x).last_hidden_state
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert not torch.allclose(want, convolutions()(x).last_hidden_state, atol=1e-2)


def test_a_pointwise_convolution_has_gates_for_every_position_a_wider_one_for_the_example(convolved):
    model, theirs = convolved
    seen = {}
    for site, layer in model.layers.items():
        layer.register_forward_hook(lambda m, args, out, site=site: seen.update({site: (args[0], out)}))
    with torch.no_grad():
        model(inputs_embeds=random(2, 5, 6, seed=4))
        gates = model.router.latest.gates
        for index, site in enumerate(model.sites):
            x, out = seen[site]
            here = gates[:, :, index]
            here = here.transpose(1, 2) if site == "point" else here.mean(1)[..., None]
            base = model.layers[site].base(x)
            want = base
            for e, one in enumerate(theirs):
                share = one.get_submodule(f"base_model.model.{site}")(x) - base
                want = want + here[:, e].reshape(2, 1, *(1,) * (x.dim() - 3), -1) * share
            torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_gates_for_every_position_cannot_be_fixed_where_the_kernel_is_wide(convolved):
    model, _ = convolved
    x = random(2, 5, 6, seed=4)
    message = r"wide: a convolution takes one gate per example.*\[B, 1, E\]"
    with model.fixed_routing(Routing(torch.ones(2, 5, 4))), pytest.raises(ValueError, match=message):
        model(inputs_embeds=x)
    with model.fixed_routing(Routing(torch.ones(2, 1, 4))):
        model(inputs_embeds=x)


def test_experts_on_convolutions_are_given_back_bit_for_bit(convolved, tmp_path):
    model, _ = convolved
    for index, adapter in enumerate(model.adapters().values()):
        given = peft_format.read(tmp_path / str(index)).tensors()
        now = adapter.tensors()
        assert now.keys() == given.keys()
        assert all(torch.equal(tensor.reshape(given[name].shape), given[name]) for name, tensor in now.items())


def test_experts_on_convolutions_get_gradients(convolved):
    model, _ = convolved
    model.set_trainable("experts")
    model(inputs_embeds=random(2, 5, 6, seed=4)).last_hidden_state.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


# ---- quantised layers


class Opaque(nn.Module):
    """A linear layer that holds its weight as whole numbers: nothing of it is a floating-point parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.qweight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) * self.scale, self.bias)


def quantised():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, attention_bias=True)).eval()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Opaque(module))
    return model


def dequantised():
    model = quantised()
    for path, module in list(model.named_modules()):
        if isinstance(module, Opaque):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.qweight.float() * module.scale
            if module.bias is not None:
                linear.bias.data = module.bias.clone()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear)
    return model


@pytest.mark.parametrize("kind", [{}, {"magnitude": True}, {"bias": True}], ids=str)
def test_quantised_layers_are_wrapped_as_they_are(kind, ids):
    model = quantised()
    layers = ends(model, "q_proj", "down_proj")
    made = experts(model, "q_proj", "down_proj", **kind)
    mixture = MultiExpertModel(model, made, UniformConfig()).eval()
    float_model = MultiExpertModel(dequantised(), made, UniformConfig()).eval()
    with torch.no_grad():
        want = float_model(input_ids=ids).logits
        torch.testing.assert_close(mixture(input_ids=ids).logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert all(mixture.layers[path].base is layer for path, layer in layers.items())
    assert all(mixture.layers[path].qweight.dtype == torch.int8 for path in layers)
    restored = mixture.unload()
    assert all(restored.get_submodule(path) is layer for path, layer in layers.items())


def test_the_weight_of_a_layer_that_does_not_show_it_is_found():
    torch.manual_seed(0)
    for bias in (True, False):
        layer = Opaque(nn.Linear(6, 4, bias=bias))
        assert kind_of(layer) == "linear"
        assert compute_dtype_of(layer) == torch.float32
        torch.testing.assert_close(dense_weight(layer), layer.qweight.float() * layer.scale, rtol=0, atol=1e-6)


def test_what_a_quantised_layer_says_of_its_dtype_is_believed():
    layer = Opaque(nn.Linear(6, 4, bias=False))
    layer.compute_dtype = torch.bfloat16
    assert compute_dtype_of(layer) == torch.bfloat16


# ---- DoRA and biases while they train


def test_gradients_of_dora_experts_equal_pefts(tmp_path, ids):
    plain = backbone("llama")
    theirs = with_peft(copy.deepcopy(plain), 1, target_modules=["q_proj", "down_proj"], use_dora=True)
    theirs.save_pretrained(tmp_path)
    model = MultiExpertModel(plain, {"one": peft_format.read(tmp_path)}, UniformConfig(), train="experts").eval()
    for one in (theirs, model):
        one(input_ids=ids).logits.square().mean().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for site, layer in model.layers.items():
        for ours, name in (("A", "lora_A"), ("B", "lora_B"), ("magnitude", "lora_magnitude_vector")):
            want = grads[f"base_model.model.{site}.{name}.default.weight"]
            got = getattr(layer.bank, ours).grad.reshape(want.shape)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_trained_dora_expert_is_normed_anew(ids):
    model = MultiExpertModel(
        backbone("llama"), experts(backbone("llama"), "q_proj", magnitude=True), UniformConfig(), train="experts"
    ).eval()
    with torch.no_grad():
        model(input_ids=ids)
        for layer in model.layers.values():
            assert isinstance(layer.bank, DoraBank)
            layer.bank.B += 0.5
        model.set_trainable("none")
        fresh = MultiExpertModel(backbone("llama"), model.adapters(), UniformConfig()).eval()
        torch.testing.assert_close(model(input_ids=ids).logits, fresh(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_frozen_dora_experts_are_normed_once(ids, monkeypatch):
    model = MultiExpertModel(
        backbone("llama"), experts(backbone("llama"), "q_proj", magnitude=True), UniformConfig()
    ).eval()
    counts = []
    inner = DoraBank._row_lengths
    monkeypatch.setattr(DoraBank, "_row_lengths", lambda bank: counts.append(1) or inner(bank))
    for _ in range(3):
        model(input_ids=ids)
    assert len(counts) == len(model.layers)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_trained_experts_of_all_kinds_learn_and_are_given_back(name, tmp_path):
    one = case(name, tmp_path, XLoraConfig(layerwise=True, temperature=20.0), train="both")
    before = {n: a.tensors() for n, a in copy.deepcopy(one.model).adapters().items()}
    optimizer = torch.optim.SGD([p for p in one.model.parameters() if p.requires_grad], lr=0.1)
    one.model(**one.inputs).logits.square().mean().backward()
    without = [n for n, p in one.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    optimizer.step()
    after = one.model.adapters()
    changed = [not torch.equal(after[n].tensors()[key], t) for n, kept in before.items() for key, t in kept.items()]
    assert sum(changed) > 0.9 * len(changed)
    again = MultiExpertModel(backbone(name), after, one.model.router_config).eval()
    again.router.load_state_dict(one.model.router.state_dict())
    with torch.no_grad():
        want = one.model(**one.inputs).logits
        torch.testing.assert_close(again(**one.inputs).logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["plain", "magnitude"])
@pytest.mark.parametrize(
    ("train", "how", "drops"), [("experts", "auto", True), ("experts", "off", False), ("router", "auto", False)]
)
def test_only_experts_that_train_drop_and_at_the_rate_of_their_own(kind, train, how, drops, ids):
    made = experts(backbone("llama"), "q_proj", magnitude=kind == "magnitude")
    made = {name: replace(adapter, dropout=0.5) for name, adapter in made.items()}
    model = MultiExpertModel(backbone("llama"), made, UniformConfig(), train=train, expert_dropout=how).train()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits) != drops
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["plain", "magnitude", "bias"])
def test_low_precision_backbones_hold_the_experts_in_their_dtype_or_in_the_one_asked_for(kind, ids):
    made = experts(backbone("llama"), "q_proj", **({} if kind == "plain" else {kind: True}))
    for asked, held in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model = MultiExpertModel(backbone("llama").bfloat16(), made, XLORA, expert_dtype=asked).eval()
        assert {p.dtype for layer in model.layers.values() for p in layer.bank.parameters()} == {held}
        assert model(input_ids=ids).logits.dtype == torch.bfloat16
        moved = copy.deepcopy(model).float()
        assert {p.dtype for layer in moved.layers.values() for p in layer.bank.parameters()} == {torch.float32}


def test_an_expert_dtype_of_their_own_stays_when_the_model_moves(ids, tmp_path):
    model = case("gpt2", tmp_path, expert_dtype="float32").model.bfloat16()
    assert {p.dtype for layer in model.layers.values() for p in layer.bank.parameters()} == {torch.float32}
    assert model(input_ids=ids).logits.dtype == torch.bfloat16


# ---- biases that PEFT does not gate


def test_ungated_biases_equal_pefts_xlora(tmp_path, ids):
    folders = []
    for seed in (1, 2):
        made = with_peft(backbone("llama"), seed, target_modules=["q_proj", "down_proj"], lora_bias=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    base = backbone("llama")
    base.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=16,
            adapters={str(i): str(folder) for i, folder in enumerate(folders)},
            layerwise_scalings=True,
            softmax_temperature=0.3,
        )
        oracle = peft.get_peft_model(base, config).eval()
    adapters = {str(i): peft_format.read(folder) for i, folder in enumerate(folders)}
    model = MultiExpertModel(backbone("llama"), adapters, XLORA, gate_lora_bias=False).eval()
    theirs = oracle.base_model.internal_xlora_classifier.parameters()
    for mine, other in zip(model.router.parameters(), theirs, strict=True):
        mine.data = random(*mine.shape)
        other.data = mine.data.clone()
    with torch.no_grad():
        want = oracle(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))
        gated = MultiExpertModel(backbone("llama"), adapters, XLORA).eval()
        gated.router.load_state_dict(model.router.state_dict())
        assert (gated(input_ids=ids).logits - want).abs().max() > 1e-2


def test_the_routing_pass_is_the_plain_backbone_with_biases_too(ids):
    made = experts(backbone("llama"), "q_proj", bias=True)
    model, seen = MultiExpertModel(backbone("llama"), made, XLORA).eval(), []
    model.router.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
        assert torch.equal(seen[0], backbone("llama").model(input_ids=ids).last_hidden_state)


# ---- top-k and single layers


@pytest.mark.parametrize("name", ["gpt2", "vit", "roberta classifies", "t5"])
def test_top_k_leaves_out_the_others(name, tmp_path):
    one = case(name, tmp_path, XLoraConfig(layerwise=True, top_k=1, top_k_softmax=True, softmax=False))
    one.model.router.classifier[0].weight.data.zero_()
    one.model.router.classifier[0].bias.data = torch.tensor([0.0, 5.0, 1.0]).repeat(len(one.model.sites))
    with torch.no_grad():
        got, want = one.model(**one.inputs).logits, one.theirs[1](**one.inputs).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_router_of_each_layer_cannot_read_an_embedding(tmp_path):
    with pytest.raises(ValueError, match=r"that of model.embed_tokens .* use a router for the whole model"):
        case("llama", tmp_path, TopKConfig())


def test_a_copy_computes_the_same_and_is_independent(tmp_path):
    one = case("gpt2", tmp_path)
    with torch.no_grad():
        want = one.model(**one.inputs).logits
        again = copy.deepcopy(one.model)
        assert torch.equal(again(**one.inputs).logits, want)
        for layer in again.layers.values():
            for parameter in layer.bank.parameters():
                parameter += 1.0
        assert torch.equal(one.model(**one.inputs).logits, want)
        assert not torch.equal(again(**one.inputs).logits, want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_self_speculation_drafts_with_experts_of_all_kinds(name, tmp_path):
    one = case(name, tmp_path, XLoraConfig(layerwise=True, temperature=0.3, dtype="float64"))
    model, prompt = one.model.double(), {"input_ids": one.inputs["input_ids"][:1]}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    want = model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options, self_speculation=True), want)


def test_self_speculation_has_the_biases_that_no_gate_weighs_in_its_drafts(ids):
    made = experts(backbone("llama").double(), "q_proj", "down_proj", bias=True)
    config = XLoraConfig(layerwise=True, temperature=0.3, dtype="float64")
    model = MultiExpertModel(backbone("llama").double(), made, config, gate_lora_bias=False).eval()
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    want = model.generate(input_ids=ids[:1], **options)
    assert torch.equal(model.generate(input_ids=ids[:1], **options, self_speculation=True), want)
