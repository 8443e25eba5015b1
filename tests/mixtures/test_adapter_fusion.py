"""AdapterFusion over bottlenecks: its formula, its part of the loss, equal experts, norms, files."""

import pytest
import torch
from branch_cases import BATCH, LABELS, alone, backbone, ending, expert, experts, heads, mixture, noted, saved_backbone
from torch.nn import functional as F

from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.routers.attention import AdapterFusionConfig, AttentionConfig

PLAIN = {"train_norms": "none"}
NAMES = ("rte", "mrpc", "cola")


def fused(family="bert", names=NAMES, given=None, *, dtype=torch.float32, train="router", **fields):
    """A fusion whose attention and values are not at their start."""
    members = experts(family, names, **PLAIN) if given is None else given
    return mixture(family, AdapterFusionConfig(**fields), given=members, dtype=dtype, train=train)


def small(weights, z):
    activate = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[weights.activation]
    part = {name: tensor.double() for name, tensor in weights.tensors().items()}
    hidden = activate(z @ part["down"].T + part["down_bias"])
    return weights.scale * part.get("gain", 1.0) * (hidden @ part["up"].T + part["up_bias"])


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
@pytest.mark.parametrize("names", [("rte", "qnli"), ("mrpc",), ("cola",), ("rte", "mrpc", "cola")], ids=str)
@pytest.mark.parametrize("fields", [{}, {"value": False}, {"query": "input", "temperature": 2.0}], ids=str)
@torch.no_grad()
def test_every_post_norm_site_equals_the_formula(names, fields, family):
    given = experts(family, names, **PLAIN)
    model, seen = fused(family, given=given, dtype=torch.float64, **fields), {}
    noted(model, seen)
    model(**BATCH)
    assert len(seen) == len(model.sites)
    for site, (inputs, out) in seen.items():
        layer = model.layers[site]
        router, path = layer.router, layer.bottleneck_path
        h, x = ending(layer, inputs)
        normed = layer.norm(h + x)
        here = [adapter.modules[path] for adapter in given.values() if path in adapter.modules]
        reads = {part.reads for part in here}
        query = {"h": h, "x": x}.get(*reads, normed) if len(reads) == 1 else normed
        query = x if fields.get("query") == "input" else query
        asked = query @ router.queries.weight.T + router.queries.bias
        values = [small(part, {"h": h, "x": x, "normed": normed}[part.reads]) for part in here]
        scores = torch.stack([(asked * (v @ router.keys.T)).sum(-1) for v in values], -1)
        attention = torch.softmax(scores / fields.get("temperature", 1.0), -1)
        mixed = sum(attention[..., k, None] * v for k, v in enumerate(values))
        mixed = mixed if fields.get("value") is False else mixed @ router.values.T
        torch.testing.assert_close(out, layer.norm(mixed + h + x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_regulariser_is_in_the_loss_of_the_same_step_and_0_at_the_start(family):
    torch.manual_seed(0)
    given = experts(family, NAMES, **PLAIN)
    fresh = MultiExpertModel(backbone(family), given, AdapterFusionConfig(), modules_to_save="base").train()
    assert fresh(**BATCH).auxiliary_losses["value_reg"].item() == 0.0
    model = fused(family, given=given, value_reg=0.05).train()
    found = model(**BATCH)
    routers = list(model.routers().values())
    assert len(routers) == len(model.sites)
    want = 0.05 * sum((torch.eye(16) - router.values).square().sum() for router in routers)
    torch.testing.assert_close(found.auxiliary_loss, want)
    found.auxiliary_loss.backward()
    for router in routers:
        torch.testing.assert_close(router.values.grad, 0.1 * (router.values.detach() - torch.eye(16)))
    assert not hasattr(model.eval()(**BATCH), "auxiliary_loss")


def test_without_a_regulariser_or_values_nothing_joins_the_loss():
    for fields in ({"value_reg": 0.0}, {"value": False}):
        assert not hasattr(fused(**fields).train()(**BATCH), "auxiliary_loss")


def test_two_equal_experts_get_equal_attention_and_equal_gradients():
    adapter = expert("bert", "rte", **PLAIN)
    model = fused(given={"a": adapter, "b": adapter}, train="both").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    seen = {}
    for layer in model.layers.values():
        layer.router.register_forward_hook(lambda m, given, out: seen.update({m: out.weights}))
    F.cross_entropy(model(**BATCH).logits, LABELS).backward()
    for weights in seen.values():
        torch.testing.assert_close(weights, torch.full_like(weights, 0.5))
    for layer in model.layers.values():
        one, other = layer.bank.members
        for first, second in zip(one.parameters(), other.parameters(), strict=True):
            assert first.grad.any()
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("train", ["router", "both"])
def test_attention_alone_is_trained_or_the_experts_with_it(train):
    model = fused(train=train)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    routers = {id(p) for router in model.routers().values() for p in router.parameters()}
    banks = {id(p) for layer in model.layers.values() for p in layer.bank.parameters()}
    wanted = routers | banks if train == "both" else routers
    assert trained == {n for n, p in model.named_parameters() if id(p) in wanted}


@torch.no_grad()
def test_evaluating_twice_gives_equal_results_and_the_temperature_stays():
    model = fused(temperature=3.0, dropout=0.5)
    assert torch.equal(model(**BATCH).logits, model(**BATCH).logits)
    assert all(router.config.temperature == 3.0 for router in model.routers().values())


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_experts_that_trained_norms_are_refused_unless_the_backbones_are_asked_for(family):
    given = experts(family, ("rte", "mrpc"))
    with pytest.raises(ValueError, match="expert 'rte' trained norms along.*router.norms=base leaves them out"):
        fused(family, given=given)
    without = experts(family, ("rte", "mrpc"), **PLAIN)
    with torch.no_grad():
        got = fused(family, given=given, norms="base")(**BATCH).logits
        for name, adapter in without.items():
            for path, part in adapter.modules.items():
                for key, tensor in part.tensors().items():
                    tensor.copy_(given[name].modules[path].tensors()[key])
        assert torch.equal(got, fused(family, given=without)(**BATCH).logits)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_plain_attention_refuses_norms_that_it_would_leave_out(family):
    with pytest.raises(ValueError, match="router=attention mixes before the norm that closes .*router=adapter_fusion"):
        mixture(family, AttentionConfig())


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet", "llama"])
@pytest.mark.parametrize("whole", ["train", "take:rte"])
def test_a_saved_fusion_gives_the_same_logits_bit_for_bit(family, whole, tmp_path):
    given = experts(family, NAMES)
    torch.manual_seed(1)
    config = AdapterFusionConfig(norms="base")
    model = MultiExpertModel(backbone(family), given, config, modules_to_save=whole, heads=heads(family)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    save_mixture(model, tmp_path / "mixture", saved_backbone(family, model.backbone))
    loaded = load_mixture(tmp_path / "mixture", saved_backbone(family))
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_gradient_checkpointing_gives_the_same_gradients_and_counts_the_regulariser_once(family):
    model, found = fused(family, value_reg=0.1).train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for on in (False, True):
        model.zero_grad()
        if on:
            model.gradient_checkpointing_enable()
        output = model(**BATCH)
        (F.cross_entropy(output.logits, LABELS) + output.auxiliary_loss).backward()
        found.append([output.auxiliary_loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_fixed_routing_is_the_mix_of_branches():
    adapter = expert("bert", "rte", **PLAIN)
    given = {"a": adapter, "b": expert("bert", "mrpc", **PLAIN)}
    model = mixture("bert", AdapterFusionConfig(), given=given, whole="take:a")
    with model.fixed_weights(a=1.0):
        assert torch.equal(model(**BATCH).logits, alone("bert", adapter)(**BATCH).logits)
