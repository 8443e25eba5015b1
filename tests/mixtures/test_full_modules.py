"""Whole modules that experts trained along, under every policy; and mixtures of all kinds on disk."""

import copy
from pathlib import Path

import pytest
import torch
from family_cases import backbone, case, inputs, with_peft

from mole.adapters import peft_format
from mole.backbones import Backbone
from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.mixtures.files import _options
from mole.mixtures.full_modules import StandIn
from mole.routers import XLoraConfig
from mole.untrusted import Damaged

NAME = "llama classifies"
XLORA = XLoraConfig(layerwise=True, temperature=0.3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two experts with a head of their own, one without, and PEFT's models of them."""
    folder, plain = tmp_path_factory.mktemp("experts"), backbone(NAME)
    settings = [
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
        {"target_modules": ["v_proj"], "task_type": "SEQ_CLS"},
        {"target_modules": ["q_proj", "up_proj"]},
    ]
    theirs = [with_peft(copy.deepcopy(plain), index, **options) for index, options in enumerate(settings)]
    for index, model in enumerate(theirs):
        model.save_pretrained(folder / str(index))
    adapters = {name: peft_format.read(folder / str(index)) for index, name in enumerate(["law", "bio", "plain"])}
    return adapters, theirs


def mixture(trained, policy, config=XLORA, train="router"):
    torch.manual_seed(5)
    return MultiExpertModel(backbone(NAME), trained[0], config, modules_to_save=policy, train=train).eval()


def pooled(model):
    with torch.no_grad():
        return model(**inputs(NAME)).logits


def with_head(logits_of, weight):
    """The logits of `logits_of` under another head."""
    with torch.no_grad():
        logits_of.get_submodule("score").weight.data = weight.clone()
    return pooled(logits_of)


def test_without_a_policy_modules_experts_and_policies_are_named(trained):
    with pytest.raises(ValueError, match=r"expert 'law': score; expert 'bio': score.*base, take:<expert>, mean, mix"):
        mixture(trained, "error")


@pytest.mark.parametrize("policy", ["keep", "take", "take:", "mean:law"])
def test_an_unknown_policy_is_refused(trained, policy):
    with pytest.raises(ValueError, match=r"unknown modules_to_save|modules_to_save"):
        mixture(trained, policy)


def test_an_unknown_expert_of_take_is_refused(trained):
    with pytest.raises(ValueError, match="unknown expert 'lw'; did you mean law"):
        mixture(trained, "take:lw")


@pytest.mark.parametrize(("policy", "expert"), [("take:law", 0), ("take:bio", 1)])
def test_take_is_that_experts_head(trained, policy, expert):
    model = mixture(trained, policy)
    name = list(trained[0])[expert]
    with model.fixed_routing({name: 1.0}):
        torch.testing.assert_close(pooled(model), pooled(trained[1][expert]), rtol=0, atol=1e-5)


def test_base_is_the_backbones_own_head(trained):
    model = mixture(trained, "base")
    assert "score" not in model.sites
    assert not model.stand_ins
    with model.fixed_routing({}):
        assert torch.equal(pooled(model), pooled(backbone(NAME)))


def test_mean_is_the_average_of_the_heads(trained):
    heads = [trained[0][name].full_modules["score"]["weight"] for name in ("law", "bio")]
    model = mixture(trained, "mean")
    with model.fixed_routing({}):
        want = with_head(backbone(NAME), torch.stack(heads).mean(0))
        torch.testing.assert_close(pooled(model), want, rtol=0, atol=1e-6)


def test_mix_weighs_the_heads_token_by_token(trained):
    model = mixture(trained, "mix")
    assert "score" in model.sites
    seen = []
    handle = model.get_submodule("backbone.score").register_forward_hook(
        lambda m, args, out: seen.append((args[0], out))
    )
    pooled(model)
    handle.remove()
    x, out = seen[-1]
    gates = model.router.latest.gates[:, :, model.sites.index("score")]
    base = backbone(NAME).score.weight
    heads = [trained[0][n].full_modules.get("score", {"weight": base})["weight"] for n in ("law", "bio", "plain")]
    want = x @ base.T + sum(gates[..., e, None] * (x @ (head - base).T) for e, head in enumerate(heads))
    torch.testing.assert_close(out, want.detach(), rtol=0, atol=1e-5)


def test_mix_with_one_expert_alone_equals_peft(trained):
    model = mixture(trained, "mix")
    for name, theirs in zip(("law", "bio"), trained[1], strict=False):
        with model.fixed_routing({name: 1.0}):
            torch.testing.assert_close(pooled(model), pooled(theirs), rtol=0, atol=1e-5)


def test_train_is_a_new_copy_that_learns_with_the_router_and_leaves_the_backbones(trained):
    model = mixture(trained, "train")
    before = model.backbone.score.base.weight.clone()
    assert torch.equal(model.backbone.score.module.weight, before)
    model(**inputs(NAME), labels=torch.tensor([0, 2])).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "backbone.score.module.weight" in grads
    assert all(name.startswith(("router.", "backbone.score.module.")) for name in grads)
    model.set_trainable("none")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("policy", ["take:law", "mean", "mix", "train"])
def test_with_the_experts_off_the_head_is_the_backbones(trained, policy):
    model = mixture(trained, policy)
    for standing in model.stand_ins.values():
        standing.module.weight.data += 1.0
    with model.experts_off():
        assert torch.equal(pooled(model), pooled(backbone(NAME)))


@pytest.mark.parametrize("policy", ["take:law", "mix", "train"])
def test_unload_gives_back_the_backbones_head(trained, policy):
    model = mixture(trained, policy)
    head = model.get_submodule("backbone.score").base
    assert model.unload().score is head
    assert not any(isinstance(module, StandIn) for module in model.backbone.modules())


def test_the_head_that_stands_there_still_looks_like_the_backbones(trained):
    model = mixture(trained, "take:bio")
    assert model.backbone.score.weight.dtype == torch.float32
    assert model.backbone.score.out_features == 3


def test_heads_of_unlike_shapes_are_refused(trained):
    adapters = copy.deepcopy(trained[0])
    adapters["law"].full_modules["score"]["weight"] = torch.zeros(4, 16)
    for policy in ("take:law", "mean", "mix"):
        backend = backbone(NAME)
        with pytest.raises(ValueError, match=r"score: .*(4, 16)"):
            MultiExpertModel(backend, adapters, XLORA, modules_to_save=policy)
        assert type(backend.score) is torch.nn.Linear


def as_backbone(model, name):
    return Backbone(model=model, tokenizer=None, name=f"test/{name}", revision=None, shapes="0" * 64)


@pytest.mark.parametrize("policy", ["base", "take:law", "mean", "mix", "train"])
def test_a_saved_mixture_keeps_its_policy_and_its_heads(trained, tmp_path, policy):
    model = mixture(trained, policy, train="both")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    want = pooled(model)
    save_mixture(model, tmp_path / "mixture", as_backbone(model.backbone, "llama"))
    loaded = load_mixture(tmp_path / "mixture", as_backbone(backbone(NAME), "llama"))
    assert loaded.options.modules_to_save == policy
    assert torch.equal(pooled(loaded), want)


@pytest.mark.parametrize("options", [{"pooled": "first"}, {"pooled_gate": "none"}, {"gate_lora_bias": []}], ids=str)
def test_options_on_disk_that_are_none_are_damaged(options):
    with pytest.raises(Damaged, match=r"mixture\.json: options: .*(pooled|gate_lora_bias)"):
        _options(options, Path("folder"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "t5"])
def test_a_saved_mixture_of_all_kinds_gives_equal_logits(name, tmp_path):
    one = case(name, tmp_path / "experts", XLORA)
    with torch.no_grad():
        want = one.model(**one.inputs).logits
    save_mixture(one.model, tmp_path / "mixture", as_backbone(one.model.backbone, name))
    loaded = load_mixture(tmp_path / "mixture", as_backbone(one.plain, name))
    with torch.no_grad():
        assert torch.equal(loaded(**one.inputs).logits, want)
