import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mole.adapters import Adapter, LoraConfig, LoraWeights, attach, attach_weights, detach, extract, layers
from mole.backbones.modules import find_modules


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        with torch.no_grad():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.2)


def test_a_new_adapter_changes_no_logit(backbone, tokens):
    before = backbone(tokens).logits
    attach(backbone, LoraConfig(), seed=0)
    assert torch.equal(backbone(tokens).logits, before)


def test_a_layer_adds_the_scaled_product(llama):
    attach(llama, LoraConfig(rank=4, alpha=6.0, rslora=True), seed=0)
    randomize(llama)
    layer = layers(llama)["model.layers.1.mlp.down_proj"]
    x = torch.randn(3, 24, dtype=torch.float64)
    expected = F.linear(x, layer.base.weight.double()) + 6.0 / 2.0 * (x @ layer.A.double().T @ layer.B.double().T)
    torch.testing.assert_close(layer(x.float()).double(), expected, atol=1e-6, rtol=0)


def test_only_the_factors_get_gradients_and_the_backbone_stays(backbone, tokens):
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    attach(backbone, LoraConfig(rank=2), seed=0)
    randomize(backbone)
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for layer in layers(backbone).values() for p in (layer.A, layer.B)}
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    backbone(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    optimizer.step()
    detach(backbone)
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())


def test_wrapped_modules_are_the_same_objects_and_come_back(backbone):
    before = {path: id(module) for path, module in backbone.named_modules()}
    made = attach(backbone, LoraConfig(), seed=0)
    assert all(id(layer.base) == before[path] for path, layer in made.items())
    detach(backbone)
    assert {path: id(module) for path, module in backbone.named_modules()} == before


def test_unknown_attributes_are_the_wrapped_modules(llama):
    layer = attach(llama, LoraConfig(targets=("q_proj",)), seed=0)["model.layers.0.self_attn.q_proj"]
    assert layer.weight is layer.base.weight
    assert layer.in_features == 16
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


def test_first_weights_depend_on_seed_and_path_only(llama):
    one = extract(attached(copy.deepcopy(llama), LoraConfig(targets=("q_proj",)), 3))
    two = extract(attached(copy.deepcopy(llama), LoraConfig(), 3))
    other = extract(attached(copy.deepcopy(llama), LoraConfig(targets=("q_proj",)), 4))
    path = "model.layers.0.self_attn.q_proj"
    assert torch.equal(one.modules[path].A, two.modules[path].A)
    assert not torch.equal(one.modules[path].A, other.modules[path].A)
    assert not torch.equal(one.modules[path].A, one.modules["model.layers.1.self_attn.q_proj"].A)


def attached(model, config, seed):
    attach(model, config, seed=seed)
    return model


@pytest.mark.parametrize(("init", "spread"), [("kaiming", 1 / (3 * 16) ** 0.5), ("gaussian", 1 / 64)])
def test_first_weights_have_the_spread_of_their_start(llama, init, spread):
    config = LoraConfig(rank=64, targets=("model.layers.0.self_attn.q_proj",), init=init)
    (layer,) = attach(llama, config, seed=0).values()
    assert layer.A.std().item() == pytest.approx(spread, rel=0.1)
    assert not layer.B.any()


def test_extracted_weights_put_on_again_give_equal_logits(backbone, tokens):
    attach(backbone, LoraConfig(rank=3, alpha=5.0, dropout=0.1), seed=0)
    randomize(backbone)
    logits = backbone(tokens).logits
    adapter = detach(backbone)
    assert adapter.dropout == 0.1
    attach_weights(backbone, adapter)
    assert torch.equal(backbone(tokens).logits, logits)
    assert all(layer.dropout.p == 0.1 for layer in layers(backbone).values())


def test_extracted_weights_are_copies(llama):
    attach(llama, LoraConfig(), seed=0)
    adapter = extract(llama)
    randomize(llama)
    assert not any(weights.B.any() for weights in adapter.modules.values())


def test_dropout_acts_in_training_only(llama, tokens):
    attach(llama, LoraConfig(dropout=0.5), seed=0)
    randomize(llama)
    assert torch.equal(llama(tokens).logits, llama(tokens).logits)
    llama.train()
    assert not torch.equal(llama(tokens).logits, llama(tokens).logits)


def test_the_output_keeps_the_backbones_dtype_and_factors_are_float32(llama, tokens):
    llama.to(torch.bfloat16)
    attach(llama, LoraConfig(), seed=0)
    randomize(llama)
    assert llama(tokens).logits.dtype == torch.bfloat16
    assert {p.dtype for p in llama.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "short"),
    [
        (("q_proj", "v_proj"), ("q_proj", "v_proj")),
        (("model.layers.*.mlp.*",), ("down_proj", "gate_proj", "up_proj")),
        (("model.layers.0.self_attn.q_proj",), ("0.self_attn.q_proj",)),
    ],
)
def test_targets_are_the_shortest_ends_of_paths_that_find_these_modules_only(llama, targets, short):
    attach(llama, LoraConfig(targets=targets), seed=0)
    found = detach(llama)
    assert found.targets == short
    assert list(find_modules(llama, found.targets)) == list(found.modules)


def test_all_linear_leaves_the_head_alone(backbone):
    made = attach(backbone, LoraConfig(), seed=0)
    linear = [m for m in backbone.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert len(made) == len(linear) - 1
    assert "lm_head" not in made


def test_a_target_that_matches_nothing_names_near_ones_and_changes_nothing(llama):
    with pytest.raises(ValueError, match=r"target 'qproj' matches no module; did you mean q_proj"):
        attach(llama, LoraConfig(targets=("qproj",)), seed=0)
    assert not layers(llama)


def test_a_module_that_is_not_linear_is_refused(llama):
    with pytest.raises(ValueError, match=r"model\.norm: .*RMSNorm.*linear module"):
        attach(llama, LoraConfig(targets=("model.norm",)), seed=0)
    assert not layers(llama)


def test_a_second_adapter_is_refused(llama):
    attach(llama, LoraConfig(), seed=0)
    with pytest.raises(ValueError, match="adapter already"):
        attach(llama, LoraConfig(), seed=0)


def test_a_backbone_without_the_adapters_modules_is_told(llama):
    weights = LoraWeights(A=torch.zeros(2, 16), B=torch.zeros(16, 2), alpha=1.0)
    with pytest.raises(ValueError, match=r"another backbone: unknown module 'h\.0\.q_proj'.*q_proj"):
        attach_weights(llama, Adapter("lora", {"h.0.q_proj": weights}))


def test_a_backbone_of_another_shape_is_told_and_nothing_is_replaced(llama):
    good = LoraWeights(A=torch.zeros(2, 16), B=torch.zeros(16, 2), alpha=1.0)
    bad = LoraWeights(A=torch.zeros(2, 99), B=torch.zeros(16, 2), alpha=1.0)
    adapter = Adapter("lora", {"model.layers.0.self_attn.q_proj": good, "model.layers.1.self_attn.q_proj": bad})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: .*99 → 16 features, this one has 16 → 16"):
        attach_weights(llama, adapter)
    assert not layers(llama)


def test_a_model_without_adapter_has_none_to_extract(llama):
    with pytest.raises(ValueError, match="no adapter"):
        extract(llama)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rank": 4097}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}, {"targets": ""}, {"rnk": 3}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoraConfig(**wrong)
