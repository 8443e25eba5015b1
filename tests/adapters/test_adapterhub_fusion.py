"""AdapterHub's fusion: a router that starts from its folder gives its formula's output, written out in plain torch."""

import json
from dataclasses import replace

import pytest
import torch
from adapterhub_cases import KINDS, TOKENS, encoder, folder, homes, put_theirs, random
from adapterhub_cases import tensors_of as of
from safetensors.torch import save

from mole.adapters import adapterhub_format as adapterhub
from mole.adapters.adapterhub_fusion import CONFIG, WEIGHTS, parse, read_fusion
from mole.backbones import Backbone
from mole.experts.card import bytes_facts, new_card
from mole.experts.folder import write_card
from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.routers import AdapterFusionConfig
from mole.untrusted import Damaged, LibraryError, Refused

DYNAMIC = {
    "dropout_prob": None,
    "key": True,
    "query": True,
    "query_before_ln": False,
    "regularization": True,
    "residual_before": False,
    "temperature": False,
    "value": True,
    "value_before_softmax": True,
    "value_initialized": True,
}
STATIC = {**DYNAMIC, "regularization": False, "value": False, "value_initialized": ""}
NAMES = {"dynamic": DYNAMIC, "static": STATIC}


def maps_at(places, *, value=True):
    """Query, its bias, key, its bias, value: random ones at each place."""
    found = {}
    for seed, home in enumerate(places):
        maps = [random(16, 16, seed=3 * seed), random(16, seed=seed), random(16, 16, seed=3 * seed + 1)]
        maps += [random(16, seed=seed + 20), random(16, 16, seed=3 * seed + 2) if value else None]
        found[home] = [None if tensor is None else 0.4 * tensor for tensor in maps]
    return found


def tensors_in(maps):
    names = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    return {
        f"{home}.adapter_fusion_layer.a,b.{name}": tensor
        for home, parts in maps.items()
        for name, tensor in zip(names, parts, strict=True)
        if tensor is not None
    }


def fusion_files(config, tensors, kind="bert"):
    node = {"config": config, "hidden_size": 16, "model_type": kind, "name": "a,b", "version": "adapters.1.2.0"}
    return json.dumps(node).encode(), save(tensors)


def write(path, config, tensors, kind="bert"):
    path.mkdir()
    for name, data in zip((CONFIG, WEIGHTS), fusion_files(config, tensors, kind), strict=True):
        (path / name).write_bytes(data)
    return str(path)


def two(kind, named):
    """The tensors of two adapters, and the experts in them."""
    made = {name: of(kind, KINDS[named], seed=10 * place) for place, name in enumerate("ab")}
    experts = {n: adapterhub.parse(*folder(KINDS[named], tensors, kind), n).adapter for n, tensors in made.items()}
    return made, experts


def places_of(named):
    return homes("bert", ["output"] if named != "double_seq_bn" else ["attention.output", "output"])


class TestReading:
    def test_names_and_maps_are_those_of_the_file_but_for_the_keys_bias(self):
        maps = maps_at(places_of("double_seq_bn"))
        fusion = parse(*fusion_files("dynamic", tensors_in(maps)), "x")
        assert (fusion.names, fusion.value, set(fusion.sites)) == (("a", "b"), True, set(maps))
        for home, (query, bias, key, _, value) in maps.items():
            wanted = {"queries.weight": query, "queries.bias": bias, "keys": key, "values": value}
            assert fusion.sites[home].keys() == wanted.keys()
            assert all(torch.equal(fusion.sites[home][name], tensor) for name, tensor in wanted.items())

    def test_before_a_norm_it_is_at_the_last_linear_map(self):
        maps = maps_at(["model.layers.0.attention_adapters", "model.layers.0.output_adapters"])
        fusion = parse(*fusion_files(DYNAMIC, tensors_in(maps), "llama"), "x")
        assert set(fusion.sites) == {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"query": False}, "query is False"),
            ({"key": False}, "key is False"),
            ({"query_before_ln": True}, "query_before_ln is True: it asks with another value"),
            ({"residual_before": True}, "residual_before is True"),
            ({"temperature": True}, "temperature is True: its temperature falls"),
            ({"value": 1}, "value is 1"),
            ({"surprise": 2}, "surprise is set to 2"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_field_that_changes_the_maths_is_named(self, change, told):
        tensors = tensors_in(maps_at(places_of("seq_bn")))
        with pytest.raises(Refused, match=told):
            parse(*fusion_files({**DYNAMIC, **change}, tensors), "x")

    @pytest.mark.parametrize(
        ("change", "error", "told"),
        [
            ({"bert.elsewhere.adapter_fusion_layer.a,b.query.weight": (16, 16)}, Refused, "of no fusion at a place"),
            ({"bert.encoder.layer.0.output.adapter_fusion_layer.a,b.value.bias": (16,)}, Refused, "has no bias"),
            ({"bert.encoder.layer.0.output.adapter_fusion_layer.b,c.key.bias": (16,)}, Refused, "2 fusions"),
            ({"bert.encoder.layer.0.output.adapter_fusion_layer.a,b.key.weight": (16, 8)}, Damaged, "of shapes"),
            ({"bert.encoder.layer.0.attention.output.adapter_fusion_layer.a,b.key.weight": (16, 16)}, Damaged, "lacks"),
        ],
    )
    def test_tensors_that_are_no_fusion_are_told(self, change, error, told):
        tensors = tensors_in(maps_at(places_of("seq_bn"))) | {name: random(*shape) for name, shape in change.items()}
        with pytest.raises(error, match=told):
            parse(*fusion_files(DYNAMIC, tensors), "x")

    def test_a_mapped_mix_is_in_the_tensors_too(self):
        maps = maps_at(places_of("seq_bn"), value=False)
        assert not parse(*fusion_files("static", tensors_in(maps)), "x").value
        with pytest.raises(Damaged, match="lacks values"):
            parse(*fusion_files("dynamic", tensors_in(maps)), "x")

    def test_a_folder_without_one_is_told(self, tmp_path):
        with pytest.raises(LibraryError, match=f"it has no {CONFIG}"):
            read_fusion(tmp_path)


@pytest.mark.parametrize("config", NAMES)
@pytest.mark.parametrize("named", ["seq_bn", "double_seq_bn"])
def test_a_router_that_starts_from_it_gives_the_formulas_output(tmp_path, named, config):
    adapters, experts = two("bert", named)
    maps = maps_at(places_of(named), value=config == "dynamic")
    path = write(tmp_path / "fusion", NAMES[config], tensors_in(maps))
    theirs = encoder("bert").double()  # six sharp softmaxes on end make much of a last bit
    double = [{name: tensor.double() for name, tensor in tensors.items()} for tensors in adapters.values()]
    fusions = {home: [None if part is None else part.double() for part in parts] for home, parts in maps.items()}
    put_theirs(theirs, KINDS[named], double, fusions)
    router = AdapterFusionConfig(from_folder=path, value=config == "dynamic")
    mixture = MultiExpertModel(encoder("bert").double(), experts, router).eval().double()
    fresh = MultiExpertModel(encoder("bert").double(), experts, replace(router, from_folder=None)).eval().double()
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        torch.testing.assert_close(mixture(TOKENS).logits, wanted)
        assert not torch.allclose(fresh(TOKENS).logits, wanted, atol=1e-2)
    assert all(parameter.requires_grad for one in mixture.routers().values() for parameter in one.parameters())


def test_the_order_of_the_experts_does_not_matter(tmp_path):
    _, experts = two("bert", "seq_bn")
    path = write(tmp_path / "fusion", DYNAMIC, tensors_in(maps_at(places_of("seq_bn"))))
    orders = ({name: experts[name] for name in order} for order in ("ab", "ba"))
    found = [MultiExpertModel(encoder("bert"), order, AdapterFusionConfig(from_folder=path)) for order in orders]
    with torch.no_grad():
        torch.testing.assert_close(found[0].eval()(TOKENS).logits, found[1].eval()(TOKENS).logits)


def test_a_saved_mixture_needs_the_folder_no_more_and_names_none(tmp_path):
    _, experts = two("bert", "seq_bn")
    path = write(tmp_path / "fusion", DYNAMIC, tensors_in(maps_at(places_of("seq_bn"))))
    model = encoder("bert")
    mixture = MultiExpertModel(model, experts, AdapterFusionConfig(from_folder=path)).eval()
    backbone = Backbone(model=model, tokenizer=None, name="user/model", revision=None, shapes="0" * 64)
    save_mixture(mixture, tmp_path / "mixture", backbone)
    with torch.no_grad():
        wanted = mixture(TOKENS).logits
    for file in (tmp_path / "fusion").iterdir():
        file.unlink()
    again = load_mixture(tmp_path / "mixture", replace(backbone, model=encoder("bert")))
    assert again.router_config.from_folder is None
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, wanted)


@pytest.mark.parametrize(
    ("named", "config", "options", "told"),
    [
        ("par_bn", DYNAMIC, {}, "experts that read x .par_bn."),
        ("seq_bn", STATIC, {}, "does not map the mix: set router.value=false"),
        ("seq_bn", DYNAMIC, {"value": False}, "maps the mix: set router.value=true"),
        ("seq_bn", DYNAMIC, {"query": "input"}, "router.query=input"),
        ("double_seq_bn", DYNAMIC, {}, "at 3 modules, the experts are at 6.*attention.output is of the experts alone"),
    ],
)
def test_a_fusion_that_does_not_fit_is_told_and_leaves_the_backbone_as_it_was(tmp_path, named, config, options, told):
    _, experts = two("bert", named)
    maps = maps_at(places_of("seq_bn"), value=config["value"])
    path = write(tmp_path / "fusion", config, tensors_in(maps))
    model = encoder("bert")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"router.from_folder={path}: .*{told}"):
        MultiExpertModel(model, experts, AdapterFusionConfig(from_folder=path, **options))
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())


def test_another_width_is_told(tmp_path):
    _, experts = two("bert", "seq_bn")
    tensors = tensors_in(maps_at(places_of("seq_bn")))
    cut = {name: (t[:8, :8] if t.dim() == 2 else t[:8]).contiguous() for name, t in tensors.items()}
    path = write(tmp_path / "fusion", DYNAMIC, cut)
    with pytest.raises(ValueError, match=r"keys has shape \(8, 8\), the router's \(16, 16\)"):
        MultiExpertModel(encoder("bert"), experts, AdapterFusionConfig(from_folder=path))


def test_a_mixtures_own_files_start_it_from_no_other_folder(tmp_path):
    _, experts = two("bert", "seq_bn")
    model = encoder("bert")
    mixture = MultiExpertModel(model, experts, AdapterFusionConfig()).eval()
    backbone = Backbone(model=model, tokenizer=None, name="user/model", revision=None, shapes="0" * 64)
    card = save_mixture(mixture, tmp_path / "mixture", backbone)
    node = json.loads((tmp_path / "mixture" / "mixture.json").read_text())
    node["router"]["from_folder"] = str(tmp_path)
    data = json.dumps(node).encode()
    (tmp_path / "mixture" / "mixture.json").write_bytes(data)
    forged = new_card({**card.files, "mixture.json": bytes_facts(data)}, card.backbone, kind="mixture")
    write_card(forged, tmp_path / "mixture")
    with pytest.raises(Damaged, match="from_folder: a mixture starts from no other folder"):
        load_mixture(tmp_path / "mixture", replace(backbone, model=encoder("bert")))
