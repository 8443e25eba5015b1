"""Bottlenecks at split sites: x and h are those of the forward that is under way, and nothing else is touched."""

import copy

import pytest
import torch
from site_cases import IDS, PRESETS, adapted, backbone, config, moved
from torch.nn import functional as F

from mole.adapters import Adapter, BottleneckWeights, attach, attach_weights, detach, extract, layers
from mole.adapters.bottleneck import SplitLayer
from mole.backbones.sites import split_sites

FAMILIES = ("distilbert", "mpnet")
LABELS = torch.tensor([0, 2])


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def trained(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_named_by_the_last_linear_map_beside_the_norm_of_their_own(family):
    model, found = adapted(family, "houlsby", train_norms="all")
    split = {site.path: site.norm for site in split_sites(backbone(family))}
    layer = {path: layer for path, layer in found.items() if isinstance(layer, SplitLayer)}
    assert set(layer) == set(split) < set(found)
    assert set(split.values()) < set(found)
    assert set(layers(model)) == set(found) == set(extract(model).modules)
    assert len(split) == (4 if family == "distilbert" else 2)
    assert all(model.get_submodule(norm) is layer[path] for path, norm in split.items())
    assert all(layer[path].base is found[norm] for path, norm in split.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norms", ["all", "none"])
def test_no_hook_is_left_when_the_adapter_is_off(family, norms):
    model, _ = adapted(family, "houlsby", train_norms=norms)
    assert hooks(model)
    detach(model)
    assert not hooks(model)
    attach(model, config("parallel"), seed=1)
    detach(model)
    assert not hooks(model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_copy_of_the_model_works_by_itself(family):
    model = moved(adapted(family, "houlsby", train_norms="all")[0])
    want, other = model(IDS).logits, copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SplitLayer):
            module.joint.remove()
    assert torch.equal(other(IDS).logits, want)
    detach(other)
    assert not hooks(other)
    assert torch.equal(other(IDS).logits, backbone(family)(IDS).logits)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_a_feed_forward_in_chunks_gives_the_same(preset):
    model = moved(adapted("distilbert", preset)[0])
    want = model(IDS).logits
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1
    torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_checkpointing_gives_the_same_gradients(preset):
    model, found = moved(adapted("distilbert", preset, train_norms="all", trained=("classifier",))[0]), []
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for on in (False, True):
        model.zero_grad()
        if on:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        F.cross_entropy(model(IDS).logits, LABELS).backward()
        found.append(trained(model))
    assert found[0].keys() == found[1].keys() != set()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_x_and_h_are_not_held_after_a_forward(family):
    model, found = adapted(family, "houlsby")
    model(IDS)
    joints = [layer.joint for layer in found.values() if isinstance(layer, SplitLayer)]
    assert joints
    assert all(joint.x is joint.h is None for joint in joints)


@pytest.mark.parametrize("family", FAMILIES)
def test_h_is_what_dropout_leaves_of_it(family):
    """In training too, h + x is what the norm reads."""
    model, found = adapted(family, "houlsby")
    model.train()
    for layer in found.values():
        if isinstance(layer, SplitLayer):
            layer.register_forward_pre_hook(
                lambda m, given: torch.testing.assert_close(m.joint.h + m.joint.x, given[0], rtol=0, atol=0)
            )
    model(IDS)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_model_is_one_graph_for_every_length_when_compiled():
    torch._dynamo.reset()
    model, made = moved(adapted("distilbert", "houlsby", trained=("classifier",))[0]), []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (7, 9, 13):
        ids, found = torch.arange(3, 3 + length).repeat(2, 1), []
        for run in (compiled, model):
            model.zero_grad()
            logits = run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits.square().sum().backward()
            found.append({"logits": logits.detach(), **trained(model)})
        assert found[0].keys() == found[1].keys()
        for name, tensor in found[1].items():
            torch.testing.assert_close(found[0][name], tensor, rtol=1e-4, atol=1e-5)
    assert len(made) == 1


def bottleneck(width, reads, made=16):
    return BottleneckWeights(torch.ones(3, width), torch.ones(3), torch.ones(made, 3), torch.ones(made), reads=reads)


@pytest.mark.parametrize(
    ("family", "path", "weights", "message"),
    [
        ("distilbert", "ffn.lin1", bottleneck(16, "h", 24), "made for the output module of a post-norm block"),
        ("distilbert", "attention.q_lin", bottleneck(16, "normed"), "made for the output module of a post-norm block"),
        ("distilbert", "ffn.lin2", bottleneck(24, "x"), "made for 24 → 16 features, the backbone has 16 → 16"),
        ("bert", "attention.output.dense", bottleneck(16, "h"), "made for the output module of a post-norm block"),
    ],
)
def test_what_a_norm_closes_is_at_no_other_module(family, path, weights, message):
    model = backbone(family)
    whole = next(name for name, _ in model.named_modules() if name.endswith(f".0.{path}"))
    with pytest.raises(ValueError, match=message):
        attach_weights(model, Adapter("bottleneck", {whole: weights}))
    assert not hooks(model)
