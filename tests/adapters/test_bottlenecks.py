"""Bottlenecks at the ends of sub-layers: formulas in plain tensors, first steps, what is trained, counts, refusals."""

import copy

import pytest
import torch
import transformers as t
from site_cases import BUILD, HEADS, IDS, POST_NORM, PRESETS, adapted, backbone, config, moved, split_of
from torch.nn import functional as F

from mole.adapters import attach, attach_weights, detach, extract, files
from mole.adapters.bottleneck import BottleneckLayer, OutputLayer, SplitLayer
from mole.adapters.norm import NormLayer
from mole.backbones.sites import norms_of, sites_of

CASES = [(preset, family) for preset in PRESETS for family in BUILD]
ACTIVATE = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


def small(weights, z):
    """s (U φ(D z + b) + c), row by row."""
    hidden = ACTIVATE[weights.activation](z @ weights.down.T + weights.down_bias)
    gain = 1.0 if weights.gain is None else weights.gain
    return weights.scale * gain * (hidden @ weights.up.T + weights.up_bias)


def layer_norm(z, weights, eps):
    mean, variance = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, unbiased=False)
    return (z - mean) / (variance + eps).sqrt() * weights.weight + weights.bias


def seen_at(model, layers):
    """Path → (inputs, output) of the layers in one forward; of those at split sites h and x for inputs."""
    found, noted = {}, {}
    for path, layer in layers.items():
        layer.register_forward_hook(
            lambda module, given, output, path=path: found.update({path: (noted.get(path, given), output)})
        )
        if isinstance(layer, SplitLayer):
            reads, gives, _ = split_of(path)
            noted[path] = [None, None]
            model.get_submodule(reads).register_forward_hook(lambda m, a, _, n=noted[path]: n.__setitem__(1, a[0]))
            model.get_submodule(gives).register_forward_hook(lambda m, _, out, n=noted[path]: n.__setitem__(0, out))
    with torch.no_grad():
        model(IDS)
    return found


@pytest.mark.parametrize(("preset", "family"), CASES)
@pytest.mark.parametrize("scale", [0.7, "learned"])
@torch.no_grad()
def test_each_placement_equals_its_formula(preset, family, scale):
    model, found = adapted(family, preset, activation="silu", scale=scale, train_norms="all")
    moved(model)
    plain = dict(backbone(family).named_modules())
    sites = {path: layer for path, layer in found.items() if isinstance(layer, BottleneckLayer)}
    assert len(sites) == (4 if preset == "houlsby" else 2)
    for path, (given, output) in seen_at(model, sites).items():
        weights = sites[path].weights()
        if family in POST_NORM:
            closing = split_of(path)[2] if split_of(path) else f"{path}.LayerNorm"
            h, x = given if split_of(path) else (plain[path].dense(given[0]), given[1])
            norm, eps = found[closing].weights(), plain[closing].eps
            z = {"houlsby": h, "pfeiffer": layer_norm(h + x, norm, eps), "parallel": x}[preset]
            want = layer_norm(h + small(weights, z) + x, norm, eps)
        else:
            h = plain[path](given[0])
            want = h + small(weights, given[0] if preset == "parallel" else h)
        torch.testing.assert_close(output, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("preset", "family"), CASES)
@torch.no_grad()
def test_zero_up_gives_the_logits_of_the_backbone_bit_for_bit(preset, family):
    model, _ = adapted(family, preset, train_norms="all")
    assert torch.equal(model(IDS).logits, backbone(family)(IDS).logits)


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize(("init", "std"), [("normal", 2e-3), ("trunc_normal", 1e-2)])
@torch.no_grad()
def test_other_first_weights_are_near_the_backbone_and_not_on_it(family, init, std):
    model, found = adapted(family, "houlsby", init=init, init_std=std)
    bottlenecks = [layer for layer in found.values() if isinstance(layer, BottleneckLayer)]
    assert all(layer.up.any() and layer.down.any() for layer in bottlenecks)
    if init == "trunc_normal":
        assert max(float(p.abs().max()) for layer in bottlenecks for p in (layer.up, layer.down)) <= 2 * std
    away = (model(IDS).logits - backbone(family)(IDS).logits).abs().max()
    assert 0 < away < (1e-3 if init == "normal" else 2e-3)


@pytest.mark.parametrize(("preset", "family"), CASES)
@pytest.mark.parametrize("norms", ["all", "sites", "none"])
def test_declared_parameters_alone_get_gradients(preset, family, norms):
    if norms == "sites" and family not in POST_NORM:
        with pytest.raises(ValueError, match="adapter.train_norms=sites: no norm closes a sub-layer"):
            adapted(family, preset, train_norms=norms)
        return
    head = HEADS.get(family, "classifier")
    model, found = adapted(family, preset, activation="gelu", train_norms=norms, trained=(head,))
    moved(model)
    model(IDS, labels=torch.tensor([0, 2])).loss.backward()
    declared = {id(p) for layer in found.values() for p in layer.parameters(recurse=False)}
    declared |= {id(p) for p in model.get_submodule(head).parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in declared), name
        assert (parameter.grad is not None) == (id(parameter) in declared), name
    trained = {path for path, layer in found.items() if isinstance(layer, NormLayer)}
    closing = {site.norm for site in sites_of(backbone(family)) if preset == "houlsby" or site.part == "ffn"}
    assert trained == {"all": set(norms_of(backbone(family))), "sites": closing, "none": set()}[norms]


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_what_was_attached_comes_off_without_a_trace(preset, family):
    plain = backbone(family)
    state, paths = copy.deepcopy(plain.state_dict()), [path for path, _ in plain.named_modules()]
    modules = dict(plain.named_modules())
    attach(plain, config(preset, train_norms="all"), seed=0)
    moved(plain)
    with torch.no_grad():
        plain(IDS)
    detach(plain)
    assert [path for path, _ in plain.named_modules()] == paths
    assert all(module is modules[path] for path, module in plain.named_modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert plain.state_dict().keys() == state.keys()


BASE_SIZED = {
    "roberta": lambda: t.RobertaForSequenceClassification(
        t.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    ),
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(vocab_size=30522, num_labels=2)),
}


@pytest.mark.parametrize("family", BASE_SIZED)
def test_houlsby_on_a_base_sized_encoder_trains_3009794_parameters(family):
    with torch.device("meta"):
        model = BASE_SIZED[family]()
    trained = ("classifier",) if family == "roberta" else ("classifier", "bert.pooler")
    found = attach(model, config("houlsby", size=64), seed=0, trained=trained)
    own = {
        kind: sum(p.numel() for layer in found.values() if isinstance(layer, kind) for p in layer.parameters(False))
        for kind in (BottleneckLayer, NormLayer)
    }
    assert own == {BottleneckLayer: 2_379_264, NormLayer: 38_400}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_009_794


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"size": 3}, [3, 3, 3, 3]),
        ({"size": {"1": 7, "default": 2}}, [2, 2, 7, 7]),
        ({"reduction_factor": 3.0}, [5, 5, 5, 5]),
        ({"reduction_factor": {"0": 16, "1": 0.25}}, [1, 1, 64, 64]),
        ({"size": 3, "layers": (1,)}, [3, 3]),
    ],
)
def test_sizes_are_those_of_the_block(options, sizes):
    _, found = adapted("bert", "houlsby", train_norms="none", **options)
    assert [layer.down.shape[0] for layer in found.values()] == sizes
    assert all(isinstance(layer, OutputLayer) for layer in found.values())
    assert "layers" not in options or all(".layer.1." in path for path in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4, "reduction_factor": 2.0}, "adapter.size and adapter.reduction_factor: exactly one"),
        ({"size": None}, "adapter.size and adapter.reduction_factor: exactly one"),
        ({"size": {"first": 4}}, "adapter.size: 'first' is no number of a block"),
        ({"size": 0}, "size"),
        ({"reduction_factor": 0.0}, "reduction_factor"),
        ({"activation": "gelou"}, "adapter.activation: unknown activation 'gelou'.*gelu"),
        ({"activation": "xielu"}, "adapter.activation"),
        ({"init": "zeros"}, "init"),
        ({"init_std": 0.0}, "init_std"),
        ({"scale": 0.0}, "scale"),
        ({"scale": "free"}, "scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": ()}, "adapter.layers=.*name at least one block"),
        ({"layers": (1, 1)}, "adapter.layers=.*each once"),
        ({"layers": (-1,)}, "layers"),
        ({"train_norms": "some"}, "train_norms"),
        ({"placement": "pfeiffer"}, "placement"),
    ],
)
def test_wrong_fields_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        config("houlsby", **options)


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("houlsby", {"layers": (0, 2)}, "adapter.layers: there is no block 2: the backbone has 0 … 1"),
        ("houlsby", {"size": 65}, "a bottleneck of 65 features at a width of 16: 1 to 64 are good"),
        ("pfeiffer", {"reduction_factor": 17.0}, "a bottleneck of 0 features"),
        ("houlsby", {"size": {"0": 4}}, "adapter.size has nothing for block 1, and no default"),
        ("pfeiffer", {"sites": {"attention": r".*attention\.output", "kind": "output"}}, "add ffn to adapter.sites"),
    ],
)
def test_fields_that_do_not_fit_the_backbone_are_refused_and_nothing_is_wrapped(preset, options, message):
    model = backbone("bert")
    with pytest.raises(ValueError, match=message):
        attach(model, config(preset, **options), seed=0)
    assert not any(isinstance(module, BottleneckLayer) for module in model.modules())


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_expert_with_its_head_is_read_again_bit_for_bit(preset, family):
    model, _ = adapted(family, preset, train_norms="all", trained=("classifier",))
    with torch.no_grad():
        want = moved(model)(IDS).logits
        written = files.dump(extract(model, ["classifier"]), "user/model")
        read = files.parse(written, "here").adapter
        other = backbone(family)
        attach_weights(other, read)
        assert torch.equal(other(IDS).logits, want)
    assert files.dump(read, "user/model") == written
    assert set(read.full_modules) == {"classifier"}


def test_a_head_for_other_labels_is_refused():
    model, _ = adapted("roberta", "houlsby", trained=("classifier",))
    adapter = extract(model, ["classifier"])
    other = backbone("roberta")
    other.classifier.out_proj = torch.nn.Linear(16, 2)
    with pytest.raises(ValueError, match="classifier: the adapter's head has .* are the labels the same"):
        attach_weights(other, adapter)


@pytest.mark.parametrize(
    ("family", "other"), [("bert", "roberta"), ("llama", "bert"), ("distilbert", "mpnet"), ("mpnet", "distilbert")]
)
def test_an_expert_of_another_family_is_refused(family, other):
    model, _ = adapted(family, "houlsby")
    with pytest.raises(ValueError, match="the adapter is for another backbone"):
        attach_weights(backbone(other), extract(model))


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "llama"])
def test_the_adapter_computes_in_float32_on_a_backbone_of_another_dtype(family):
    model = backbone(family).bfloat16()
    found = attach(model, config("houlsby"), seed=0)
    moved(model)
    loss = model(IDS, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite()
    for layer in found.values():
        for parameter in layer.parameters(recurse=False):
            assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("family", ["roberta", "distilbert", "gpt2"])
def test_dropout_acts_on_what_a_bottleneck_reads_in_training_alone(family):
    model, _ = adapted(family, "houlsby", dropout=0.5)
    moved(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p != 0.5:
            module.p = 0.0
    with torch.no_grad():
        still = [model(IDS).logits for _ in range(2)]
        model.train()
        moving = [model(IDS).logits for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)
