"""Multi-adapters at work: what each mode trains, flex adapters, heads, files, checkpointing, refusals."""

import copy

import pytest
import torch
from branch_cases import BATCH, LABELS, alone, backbone, expert, experts, heads, mixture, moved, saved_backbone
from mixture_cases import llama
from test_adapter_kinds_mixed import made
from torch.nn import functional as F

from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.mixtures.growing import put_together, take_apart
from mole.routers.multi_adapter import MultiAdapterConfig

TWO = ("rte", "mrpc")
MODES = ("base", "flex", "base_ft", "full_ft")


def built(family="roberta", whole="train", names=TWO, given=None, **fields):
    """A multi-adapter at its start, with heads to train."""
    torch.manual_seed(3)
    members = experts(family, names) if given is None else given
    config = MultiAdapterConfig(**fields)
    return MultiExpertModel(backbone(family), members, config, modules_to_save=whole, heads=heads(family)).eval()


def kinds_of(model):
    """Kind → names of parameters."""
    found = {kind: set() for kind in ("router", "flex", "experts", "heads", "backbone")}
    groups = {"router": model.routers().values(), "heads": model.trained_modules().values()}
    groups["experts"] = [layer.bank for layer in model.layers.values()]
    groups["flex"] = [layer.flex for layer in model.layers.values() if layer.flex is not None]
    place = {id(p): kind for kind, modules in groups.items() for module in modules for p in module.parameters()}
    replaced = {id(p) for standing in model.stand_ins.values() for p in standing.base.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in replaced:
            found[place.get(id(parameter), "backbone")].add(name)
    return found


def stepped(model, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(**BATCH).logits, LABELS).backward()
        optimizer.step()
    return model.eval()


TRAINED = {
    "base": {"router", "heads"},
    "flex": {"router", "heads", "flex"},
    "base_ft": {"router", "heads", "backbone"},
    "full_ft": {"router", "heads", "backbone", "experts"},
}


@pytest.mark.parametrize("family", ["roberta", "bert", "distilbert", "mpnet", "llama", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_exactly_its_set(mode, family):
    model = built(family, mode=mode)
    kinds, before = kinds_of(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(kinds[kind] for kind in TRAINED[mode])
    wanted = set().union(*(kinds[kind] for kind in TRAINED[mode]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    stepped(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= wanted
    assert all(changed & kinds[kind] for kind in TRAINED[mode])
    assert all(p.grad is None for n, p in model.named_parameters() if n not in wanted)


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_every_sub_layer_has_a_set_of_its_own_whatever_module_is_mixed(family):
    model = built(family, num_groups=None, site="module")
    assert [len(places) for places in model.router.groups.values()] == [2, 1, 1, 1]
    assert model.sites[0].endswith("embeddings.LayerNorm")
    with pytest.raises(ValueError, match="router.num_groups=5 with 4 modules"):
        built(family, num_groups=5)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("mode", ["base", "flex"])
def test_experts_are_bit_equal_after_training(mode, family):
    given = experts(family, TWO)
    model = stepped(built(family, mode=mode, given=given))
    for name, adapter in model.adapters().items():
        assert all(torch.equal(tensor, given[name].tensors()[key]) for key, tensor in adapter.tensors().items())


@pytest.mark.parametrize("mode", MODES)
def test_weights_learn_at_their_own_rate_without_decay_and_outside_the_clipping(mode):
    model = built(mode=mode)
    settings = model.parameter_settings()
    assert set(settings) == kinds_of(model)["router"]
    assert all(own == {"lr": 0.01, "weight_decay": 0.0, "clip": 0.0} for own in settings.values())


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert", "mpnet", "modernbert", "llama"])
@torch.no_grad()
def test_a_new_flex_adapter_without_a_norm_changes_nothing(family):
    given = experts(family, TWO)
    model = built(family, "base", given=given, mode="flex", flex_norm=False)
    plain = built(family, "base", given=given, mode="base")
    assert any(layer.flex is not None for layer in model.layers.values())
    got = model(**BATCH).logits
    with plain.fixed_weights(rte=0.5, mrpc=0.5):
        torch.testing.assert_close(got, plain(**BATCH).logits, rtol=0, atol=1e-6)
    for layer in model.layers.values():
        layer.flex = None
    assert torch.equal(model(**BATCH).logits, got)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_a_flex_adapter_at_a_post_norm_site_equals_its_formula(norm, family):
    model, seen = built(family, mode="flex", flex_norm=norm, flex_size=3), {}
    inputs = []
    for path, module in model.backbone.named_modules():
        if path.endswith(("attention.q_lin", "ffn.lin1", "self.query", "intermediate.dense")):
            module.register_forward_hook(lambda m, given, out: inputs.append(given[0]))
    for layer in model.layers.values():
        if layer.flex is not None:
            moved(layer.flex, 5)
            layer.flex.register_forward_hook(lambda m, given, out: seen.update({m: (given, out)}))
    model(**BATCH)
    assert len(seen) == len(inputs) == 4
    for x, (flex, (given, out)) in zip(inputs, seen.items(), strict=True):
        y = given[0]
        assert torch.equal(given[1], x)
        want = y + F.linear(F.gelu(F.linear(y, flex.down, flex.down_bias)), flex.up, flex.up_bias)
        if norm:
            want = F.layer_norm(want + x, (16,), flex.norm_weight, flex.norm_bias, 1e-12)
        torch.testing.assert_close(out, want, rtol=0, atol=2e-6)


@torch.no_grad()
def test_given_weights_stand_for_the_experts_without_the_flex_adapter():
    given = experts("roberta", TWO)
    model, plain = built(given=given, mode="flex"), built(given=given, mode="base")
    for layer in model.layers.values():
        if layer.flex is not None:
            moved(layer.flex, 5)
    with model.fixed_weights(rte=1.0), plain.fixed_weights(rte=1.0):
        assert torch.equal(model(**BATCH).logits, plain(**BATCH).logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", ["train", "train:mrpc", "base", "take:rte", "mean"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "llama"])
def test_a_saved_multi_adapter_gives_the_same_logits_bit_for_bit(mode, whole, family, tmp_path):
    model = stepped(built(family, whole, mode=mode, num_groups=2, flex_norm=family != "llama"))
    save_mixture(model, tmp_path / "mixture", saved_backbone(family, model.backbone))
    torch.manual_seed(99)
    loaded = load_mixture(tmp_path / "mixture", saved_backbone(family))
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)
    assert loaded.router.weights_by_group() == model.router.weights_by_group()
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, adapter in loaded.adapters().items():
        assert set(adapter.modules) == set(model.adapters()[name].modules)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_the_trained_head_starts_as_the_backbones_or_as_the_named_experts(family):
    given = experts(family, TWO)
    fresh, named = built(family, "train", given=given), built(family, "train:mrpc", given=given)
    plain = backbone(family)
    for path in heads(family):
        for name, parameter in plain.get_submodule(path).named_parameters():
            assert torch.equal(fresh.trained_modules()[path].get_parameter(name), parameter)
            taken = given["mrpc"].full_modules[path][name]
            assert torch.equal(named.trained_modules()[path].get_parameter(name), taken)
            assert not torch.equal(parameter, taken)


@torch.no_grad()
def test_one_hot_with_a_head_that_started_as_the_experts_is_that_expert():
    given = experts("bert", TWO)
    model = built("bert", "train:mrpc", given=given)
    with model.fixed_weights(mrpc=1.0):
        assert torch.equal(model(**BATCH).logits, alone("bert", given["mrpc"])(**BATCH).logits)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "llama"])
@pytest.mark.parametrize("mode", ["base", "flex", "full_ft"])
def test_gradient_checkpointing_gives_the_same_gradients(family, mode):
    model, found = built(family, mode=mode), []
    for layer in model.layers.values():
        if layer.flex is not None:
            moved(layer.flex, 5)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for on in (False, True):
        model.zero_grad()
        if on:
            model.gradient_checkpointing_enable()
        F.cross_entropy(model(**BATCH).logits, LABELS).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("mode", MODES)
def test_weights_heads_flex_adapters_and_backbone_stay_when_an_expert_joins(mode, family):
    model = stepped(built(family, mode=mode))
    flex = {site: copy.deepcopy(layer.flex) for site, layer in model.layers.items() if layer.flex is not None}
    theta, heads_now = model.router.theta.detach().clone(), copy.deepcopy(model.trained_modules())
    words = copy.deepcopy(model.backbone.get_input_embeddings().state_dict())
    parts = take_apart(model)
    joined = {**parts.experts, "cola": expert(family, "cola")}
    grown = put_together(parts, joined, {})
    assert torch.equal(grown.router.theta[:, :2], theta)
    assert torch.equal(grown.backbone.get_input_embeddings().weight, words["weight"])
    for site, kept in flex.items():
        now = grown.layers[site].flex.state_dict()
        assert all(torch.equal(tensor, now[name]) for name, tensor in kept.state_dict().items())
    for path, module in heads_now.items():
        now = grown.trained_modules()[path].state_dict()
        assert all(torch.equal(tensor, now[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "names", "message"),
    [
        ({"mode": "flex"}, ("rte",), "needs two branches at least, and there is 1"),
        ({"exclude": TWO}, TWO, "router.exclude names every expert"),
        ({"exclude": ("sst2",)}, TWO, "router.exclude: unknown expert 'sst2'"),
        ({"init_expert": "sst2"}, TWO, "router.init_expert: unknown expert 'sst2'"),
        ({"num_groups": 5}, TWO, "router.num_groups=5 with 4 modules"),
        ({"num_groups": 3, "site": "block"}, TWO, "router.num_groups=3 with 2 blocks"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_the_field_and_the_backbone_is_left_alone(fields, names, message):
    model, given = backbone("bert"), experts("bert", names)
    with pytest.raises(ValueError, match=message):
        MultiExpertModel(model, given, MultiAdapterConfig(**fields), modules_to_save="base")
    assert not any("Mixture" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("name", ["base", "flex"])
def test_experts_named_as_a_branch_are_refused(name):
    given = {name: expert("bert", "rte"), "other": expert("bert", "mrpc")}
    with pytest.raises(ValueError, match=f"an expert is called '{name}', which names a branch of its own: rename it"):
        mixture("bert", given=given)


def test_an_expert_of_another_backbone_is_refused():
    with pytest.raises(ValueError, match="expert 'rte' .*lacks"):
        mixture("bert", given={"rte": expert("llama", "rte"), "mrpc": expert("bert", "mrpc")})


def test_heads_of_other_labels_are_refused_by_their_policy():
    model, given = backbone("roberta"), experts("roberta", TWO)
    model.classifier.out_proj = torch.nn.Linear(16, 2)
    with pytest.raises(ValueError, match="modules_to_save=train:rte: classifier: a whole module of"):
        MultiExpertModel(model, given, MultiAdapterConfig(), modules_to_save="train:rte", heads=("classifier",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "flex"}, "router.mode=flex: .* gives no hidden states"),
        ({"normalise": "sigmoid"}, "router.normalise=sigmoid gives the backbone a weight of its own"),
        ({"normalise": "none"}, "set router.normalise=softmax"),
    ],
)
def test_a_multi_adapter_of_prefixes_is_refused_what_they_cannot_do(fields, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        MultiExpertModel(model, {"a": made("prefix", 1), "b": made("prefix", 2)}, MultiAdapterConfig(**fields))
    assert not any("Mixture" in type(module).__name__ for module in model.modules())
