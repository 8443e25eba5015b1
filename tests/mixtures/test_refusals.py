"""What cannot be mixed is refused when the mixture is built, with expert, module and reason; names of modules."""

import copy
import warnings

import pytest
import torch
from family_cases import GROUPED, SIZES, backbone, inputs, with_peft
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from mole.adapters import Adapter, LoraWeights, peft_format
from mole.mixtures import MixtureOptions, MultiExpertModel
from mole.routers import UniformConfig, XLoraConfig


def lora(a, b, **more):
    return LoraWeights(A=torch.ones(a), B=torch.ones(b), alpha=1.0, **more)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**GROUPED)).eval()


def with_module(path, module):
    model = llama()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(**GROUPED)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=50)
    ).eval()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2)


def mixtral_of_modules():
    """Experts as modules in a list, as other mixtures-of-experts have them."""
    model = MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=2)).eval()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(16, 24)}) for _ in range(2)])
    return model


EMBED = "model.embed_tokens"
Q = "model.layers.0.self_attn.q_proj"
VISION = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
CASES = {
    "no module at all": (llama, {}, "adapts no module at all"),
    "a module that is not there": (
        llama,
        {"model.layers.0.self_attn.query_proj": lora((1, 16), (16, 1))},
        r"lacks \(nearest: .*q_proj",
    ),
    "another width": (llama, {Q: lora((1, 8), (16, 1))}, "made for 8 → 16 features, the backbone has 16 → 16"),
    "a norm": (llama, {"model.norm": lora((1, 16), (16, 1))}, "a LlamaRMSNorm is not a linear module, an embedding"),
    "an embedding's weights for a linear module": (
        llama,
        {Q: lora((1, 16), (16, 1), embedding=True)},
        "the weights are for an embedding, the backbone has a linear module",
    ),
    "a linear module's weights for an embedding": (
        llama,
        {EMBED: lora((1, 51), (16, 1))},
        "the weights are for a linear module, the backbone has an embedding",
    ),
    "max_norm": (
        lambda: with_module(EMBED, nn.Embedding(51, 16, max_norm=1.0)),
        {EMBED: lora((1, 51), (16, 1), embedding=True)},
        "the embedding has max_norm",
    ),
    "DoRA at an embedding": (
        llama,
        {EMBED: lora((1, 51), (16, 1), embedding=True, magnitude=torch.ones(16))},
        "DoRA at an embedding",
    ),
    "an embedding that makes its ids": (
        lambda: backbone("opt"),
        {"model.decoder.embed_positions": lora((1, 2050), (16, 1), embedding=True)},
        "makes its ids itself",
    ),
    "attention of torch": (
        lambda: with_module("model.layers.0.mlp", Attending()),
        {"model.layers.0.mlp.inner": lora((1, 16), (16, 1))},
        "nn.MultiheadAttention is no single product",
    ),
    "its output projection": (
        lambda: with_module("model.layers.0.mlp", Attending()),
        {"model.layers.0.mlp.inner.out_proj": lora((1, 16), (16, 1))},
        "reads the weights of its parts without calling them",
    ),
    "inside an expert": (
        mixtral_of_modules,
        {"model.layers.0.mlp.experts.1.w1": lora((1, 16), (24, 1))},
        "inside one of the experts of a mixture-of-experts block",
    ),
    "stacked experts": (
        lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=2)),
        {"model.layers.0.mlp.experts": lora((1, 16), (24, 1))},
        "a MixtralExperts is not a linear module",
    ),
    "the tower for images": (llava, {VISION: lora((1, 16), (16, 1))}, "part of the tower for pixel_values"),
    "an embedding that is never called": (
        lambda: backbone("t5"),
        {"shared": lora((1, 51), (16, 1), embedding=True)},
        "never called",
    ),
    "DoRA at a wide convolution": (
        lambda: backbone("vit"),
        {"vit.embeddings.patch_embeddings.projection": lora((1, 3, 4, 4), (16, 1, 1, 1), magnitude=torch.ones(16))},
        r"DoRA at a convolution with a kernel of \(4, 4\)",
    ),
    "another kernel": (
        lambda: backbone("vit"),
        {"vit.embeddings.patch_embeddings.projection": lora((1, 3, 2, 2), (16, 1, 1, 1))},
        r"made for a kernel of \(2, 2\)",
    ),
    "dilation": (
        lambda: with_module("model.layers.0.mlp", nn.Conv1d(16, 16, 3, dilation=2)),
        {"model.layers.0.mlp": lora((1, 16, 3), (16, 1, 1))},
        "has dilation",
    ),
    "groups": (
        lambda: with_module("model.layers.0.mlp", nn.Conv1d(16, 16, 3, groups=2)),
        {"model.layers.0.mlp": lora((2, 16, 3), (16, 2, 1))},
        "for 2 groups",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_mixed_is_refused_by_expert_module_and_reason(name):
    build, modules, reason = CASES[name]
    model = build()
    before = [(path, id(module)) for path, module in model.named_modules()]
    with pytest.raises(ValueError, match=rf"expert 'odd'.*{reason}"):
        MultiExpertModel(model, {"odd": Adapter("lora", modules)}, XLoraConfig())
    assert [(path, id(module)) for path, module in model.named_modules()] == before


def test_the_text_of_a_vision_language_model_is_mixed_with_images_in_it():
    model = llava()
    q = "model.language_model.layers.0.self_attn.q_proj"
    given = {
        "input_ids": torch.tensor([[3, 50, 50, 50, 50, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        want, hidden = model(**given).logits, model.model(**given).last_hidden_state
        weights = lora((1, 16), (16, 1))
        mixture = MultiExpertModel(model, {"one": Adapter("lora", {q: weights})}, XLoraConfig()).eval()
        seen = []
        mixture.router.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        got = mixture(**given).logits
        assert torch.equal(seen[0], hidden)
        assert not torch.allclose(got, want, atol=1e-3)
        with mixture.fixed_routing({}):
            assert torch.equal(mixture(**given).logits, want)


def test_weights_that_came_with_an_expert_have_to_be_the_backbones(tmp_path):
    model = llama()
    theirs = with_peft(copy.deepcopy(model), 1, target_modules=["embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    adapter = peft_format.read(tmp_path)
    assert list(adapter.base_weights) == [EMBED]
    MultiExpertModel(model, {"one": adapter}, UniformConfig()).unload()
    model.model.embed_tokens.weight.data[7, 3] += 0.5
    with pytest.raises(ValueError, match=r"expert 'one' at model.embed_tokens: it came with the weight"):
        MultiExpertModel(model, {"one": adapter}, UniformConfig())


def test_a_bias_that_is_more_than_added_is_refused():
    model = with_module("model.layers.0.mlp", nn.BatchNorm1d(16))
    adapter = Adapter(
        "lora", {Q: lora((1, 16), (16, 1))}, biases={"model.layers.0.mlp": torch.ones(16)}, bias_kind="all"
    )
    with pytest.raises(ValueError, match=r"model.layers.0.mlp: a BatchNorm1d does more with its bias"):
        MultiExpertModel(model, {"odd": adapter}, UniformConfig())


def test_biases_that_an_expert_left_alone_need_no_mixture():
    model = backbone("gpt2")
    biases = {path: m.bias.detach().clone() for path, m in model.named_modules() if path.endswith(("ln_1", "c_fc"))}
    adapter = Adapter(
        "lora", {"transformer.wte": lora((1, 51), (16, 1), embedding=True)}, biases=biases, bias_kind="all"
    )
    assert MultiExpertModel(model, {"one": adapter}, UniformConfig()).sites == ("transformer.wte",)


@pytest.mark.parametrize(
    "options", [{"pooled_gate": "max"}, {"expert_dtype": "int8"}, {"expert_dropout": "on"}], ids=str
)
def test_an_unknown_option_is_refused_with_the_known_ones(options):
    with pytest.raises(ValueError, match=f"unknown {next(iter(options))} '{next(iter(options.values()))}'.*auto"):
        MixtureOptions(**options)


def test_an_encoder_has_no_cache():
    model = MultiExpertModel(
        backbone("bert"),
        {"one": Adapter("lora", {"cls.predictions.transform.dense": lora((1, 16), (16, 1))})},
        XLoraConfig(),
    )
    with pytest.raises(ValueError, match="its tokens see later ones"):
        model(**inputs("bert"), use_cache=True)
    assert getattr(model(**inputs("bert")), "past_key_values", None) is None


def test_a_backbone_without_an_inner_model_has_no_hidden_states():
    model = llama()
    model.base_model_prefix = ""
    mixture = MultiExpertModel(model, {"one": Adapter("lora", {Q: lora((1, 16), (16, 1))})}, XLoraConfig())
    with pytest.raises(ValueError, match="base_model_prefix"):
        mixture(**inputs("llama"))


# ---- names


def test_older_names_of_a_class_find_its_modules():
    old = "vit.encoder.layer.1.attention.attention.query"
    model = MultiExpertModel(backbone("vit"), {"old": Adapter("lora", {old: lora((1, 16), (16, 1))})}, UniformConfig())
    assert model.sites == ("vit.layers.1.attention.q_proj",)
    assert list(model.adapters()["old"].modules) == ["vit.layers.1.attention.q_proj"]


def test_one_prefix_of_peft_is_taken_off_and_no_more():
    model = llama()
    MultiExpertModel(
        model, {"one": Adapter("lora", {f"base_model.model.{Q}": lora((1, 16), (16, 1))})}, UniformConfig()
    )
    twice = Adapter("lora", {f"base_model.model.base_model.model.{Q}": lora((1, 16), (16, 1))})
    with pytest.raises(ValueError, match="which this backbone lacks"):
        MultiExpertModel(llama(), {"two": twice}, UniformConfig())


def test_names_need_not_start_with_model():
    for name in ("gpt2", "t5", "bert", "vit"):
        first = next(path for path, m in backbone(name).named_modules() if isinstance(m, nn.Linear))
        module = backbone(name).get_submodule(first)
        weights = lora((1, module.in_features), (module.out_features, 1))
        built = MultiExpertModel(backbone(name), {"e": Adapter("lora", {first: weights})}, XLoraConfig())
        assert built.sites == (first,)
        assert not first.startswith("model.")


def test_twelve_experts_keep_their_order():
    names = [f"adapter_{index}" for index in range(12)]
    modules = {name: Adapter("lora", {Q: lora((1, 16), (16, 1))}) for name in names}
    model = MultiExpertModel(llama(), modules, XLoraConfig())
    assert list(model.expert_names) == names
    assert list(model.adapters()) == names
