"""Bottlenecks and norms beside other kinds of experts on one encoder, and the backbone's own weight at all of them."""

import pytest
import torch
from branch_cases import BATCH, LABELS, alone, backbone, expert, mixture, moved, saved_backbone
from torch.nn import functional as F

from mole.adapters import Adapter, LoraConfig, attach, extract
from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.mixtures.exploding import exploded
from mole.routers import TaskConfig, TopKConfig, XLoraConfig
from mole.routers.multi_adapter import MultiAdapterConfig

FAMILIES = ("bert", "roberta", "deberta-v2", "distilbert", "mpnet")
TARGETS = {"distilbert": ("q_lin", "out_lin", "lin1", "lin2"), "mpnet": ("q", "o", "dense")}
CONFIGS = {
    "top_k": TopKConfig(top_k=2),
    "top_k_all": TopKConfig(top_k=None),
    "xlora": XLoraConfig(layerwise=True, depth=2, size=8),
    "multi_adapter": MultiAdapterConfig(),
}


def lora(family, targets=None, seed=5):
    model = backbone(family)
    targets = TARGETS.get(family, ("dense",)) if targets is None else targets
    attach(model, LoraConfig(rank=2, targets=targets), seed=seed, trained=())
    return extract(moved(model, seed))


def members(family):
    return {"rte": expert(family, "rte", head=False), "low": lora(family), "mrpc": expert(family, "mrpc", head=False)}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_hot_is_the_expert_alone_whatever_its_kind(family):
    given = members(family)
    model = mixture(family, given=given)
    for name, adapter in given.items():
        with model.fixed_weights(**{name: 1.0}):
            got = model(**BATCH).logits
        torch.testing.assert_close(got, alone(family, adapter)(**BATCH).logits, rtol=0, atol=1e-5)
    with model.fixed_weights(base=1.0):
        torch.testing.assert_close(model(**BATCH).logits, backbone(family)(**BATCH).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_the_router_and_every_expert(name, family):
    model = MultiExpertModel(backbone(family), members(family), CONFIGS[name], train="both").train()
    if (name, family) == ("xlora", "deberta-v2"):  # its table of positions has rows that are no tokens
        with pytest.raises(ValueError, match="the routing for deberta.encoder.LayerNorm has shape"):
            model(**BATCH)
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    F.cross_entropy(model(**BATCH).logits, LABELS).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    for index in range(3):
        grads = [
            parameter.grad.abs().sum()
            for layer in model.layers.values()
            for bank in getattr(layer.bank, "banks", [layer.bank])
            if index in bank.present
            for parameter in bank.parameters()
        ]
        assert sum(grads) > 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_a_saved_mixture_of_kinds_gives_the_same_logits(name, family, tmp_path):
    torch.manual_seed(2)
    model = mixture(family, CONFIGS[name], given=members(family))
    save_mixture(model, tmp_path / "mixture", saved_backbone(family, model.backbone))
    loaded = load_mixture(tmp_path / "mixture", saved_backbone(family))
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


@torch.no_grad()
def test_examples_of_one_batch_go_to_experts_of_unlike_kinds():
    given = members("bert")
    model = MultiExpertModel(backbone("bert"), given, TaskConfig(), tasks={name: (name,) for name in given}).eval()
    got = model(**BATCH, task_names=["rte", "low"]).logits
    for row, name in enumerate(("rte", "low")):
        want = alone("bert", given[name])(**BATCH).logits[row]
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_the_backbones_own_weight_acts_where_a_head_sees_pooled_vectors(family):
    """LoRA in the head: y = Σ w (W x + δ) + w_base W x, for rows that are examples."""
    target = "pooler.dense" if family == "bert" else "classifier.dense"
    given = {"a": lora(family, (target,), 5), "b": lora(family, (target,), 6)}
    model, seen = mixture(family, MultiAdapterConfig(normalise="none"), given=given, dtype=torch.float64), {}
    ((site, layer),) = model.layers.items()
    layer.register_forward_hook(lambda m, inputs, out: seen.update(x=inputs[0], out=out))
    model(**BATCH)
    assert seen["x"].shape == (2, 16)
    weights, own = model.router.weights()[0], model.router.base_weights()[0]
    plain = layer.base(seen["x"])
    want = own * plain
    for weight, adapter in zip(weights, given.values(), strict=True):
        part = adapter.modules[site]
        want = want + weight * (plain + part.scale * seen["x"] @ part.A.double().T @ part.B.double().T)
    torch.testing.assert_close(seen["out"], want, rtol=0, atol=1e-12)


def biased(family, path, seed=9):
    """What PEFT's bias=all leaves: a LoRA, and the bias of a norm."""
    adapter = lora(family, ("q_lin",) if family == "distilbert" else ("query",), seed)
    bias = backbone(family).get_submodule(path).bias.detach() + 0.5
    return Adapter("lora", adapter.modules, biases={path: bias}, bias_kind="all")


@torch.no_grad()
def test_norms_beside_a_bias_of_the_same_norm_count_the_backbone_once():
    path = "bert.embeddings.LayerNorm"
    given = {"rte": expert("bert", "rte", head=False), "bias": biased("bert", path)}
    model, seen = mixture("bert", MultiAdapterConfig(normalise="none"), given=given, dtype=torch.float64), {}
    layer = model.layers[path]
    layer.register_forward_hook(lambda m, inputs, out: seen.update(x=inputs[0], out=out))
    model(**BATCH)
    (first, second), own = model.router.weights()[0], model.router.base_weights()[0]
    norm, base, z = given["rte"].modules[path], layer.base, seen["x"]
    branch = F.layer_norm(z, (16,), norm.weight.double(), norm.bias.double(), base.eps)
    want = first * branch + second * (base(z) + 0.5) + own * base(z)
    torch.testing.assert_close(seen["out"], want, rtol=0, atol=1e-6)


CLOSING = {
    "bert": "bert.encoder.layer.0.output.LayerNorm",
    "distilbert": "distilbert.transformer.layer.0.output_layer_norm",
}


@pytest.mark.parametrize("family", CLOSING)
def test_a_bias_of_a_norm_that_closes_a_sub_layer_is_refused_beside_branches(family):
    path, model = CLOSING[family], backbone(family)
    given = {"rte": expert(family, "rte", head=False), "bias": biased(family, path)}
    with pytest.raises(ValueError, match=f"{path}: experts trained its bias.*leave one of these kinds out"):
        MultiExpertModel(model, given, MultiAdapterConfig())
    assert not any("Mixture" in type(module).__name__ for module in model.modules())


def test_parts_of_rank_one_are_of_lora_alone_and_the_reason_is_told():
    with pytest.raises(ValueError, match="explode=rank_one: expert 'rte' is no sum of parts.*it is no LoRA"):
        exploded({"rte": expert("bert", "rte", head=False)})
