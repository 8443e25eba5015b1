"""Every family of backbones: X-LoRA on it equals plain hooks around PEFT's own modules."""

import pytest
import torch
from family_cases import FAMILIES, case, hooked

from mole.mixtures.two_pass.encoder_decoder import reads_encoder


class Kept:
    """A listener that keeps the scalings of every forward."""

    def __init__(self):
        self.scalings = []

    def record(self, scalings, **facts):
        self.scalings.append(scalings)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return case(request.param, tmp_path_factory.mktemp("experts"))


def pooled(site, scalings, given):
    """The gates of one vector per example, as the family pools its tokens."""
    if "pixel_values" in given:
        return scalings.mean(1)
    return scalings[:, 0]


def gate_of(site, scalings, given):
    """A function of a module's input and output: its gates, in the shape of the output, [..., E]."""

    def gate(x, out):
        if out.dim() == 4:  # a convolution: one gate per example
            return pooled(site, scalings, given)[:, None, None, None]
        if out.dim() == 2 and len(out) == len(scalings):
            return pooled(site, scalings, given)[:, None]
        if out.dim() == 2:
            return scalings.flatten(0, 1)[:, None]
        return scalings[:, :, None]

    return gate


def test_a_forward_equals_hooks_around_pefts_modules(family):
    heard = Kept()
    family.model.listeners.append(heard)
    with torch.no_grad():
        got = family.model(**family.inputs).logits
    family.model.listeners.clear()
    gates = {}
    for index, site in enumerate(family.model.sites):
        encoder = site.startswith(("encoder.", "model.encoder.")) and len(heard.scalings) == 2
        scalings = heard.scalings[0 if encoder or reads_encoder(site) else -1]
        gates[site] = gate_of(site, scalings[:, :, index], family.inputs)
    with torch.no_grad(), hooked(family.plain, family.theirs, gates):
        want = family.plain(**family.inputs).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    with torch.no_grad():
        assert (family.plain(**family.inputs).logits - want).abs().max() > 1e-2


def test_the_gates_differ_from_token_to_token_and_layer_to_layer(family):
    with torch.no_grad():
        family.model(**family.inputs)
    scalings = family.model.router.latest.scalings
    assert scalings.shape[2] == len(family.model.sites) > 3
    assert scalings.std(dim=1).max() > 0.05
    assert scalings.std(dim=2).max() > 0.05


def test_the_output_may_be_a_tuple(family):
    with torch.no_grad():
        got, want = family.model(**family.inputs, return_dict=False), family.model(**family.inputs)
    assert isinstance(got, tuple)
    assert torch.equal(got[0], want.logits)


def test_an_expert_alone_equals_peft(family):
    for index, theirs in enumerate(family.theirs):
        with torch.no_grad(), family.model.fixed_routing({f"expert {index}": 1.0}):
            got, want = family.model(**family.inputs).logits, theirs(**family.inputs).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_with_the_experts_off_or_at_weight_0_it_is_the_backbone_bit_for_bit(family):
    with torch.no_grad():
        want = family.plain(**family.inputs).logits
        with family.model.experts_off():
            assert torch.equal(family.model(**family.inputs).logits, want)
        with family.model.fixed_routing({}):
            assert torch.equal(family.model(**family.inputs).logits, want)
            assert torch.equal(family.model.backbone(**family.inputs).logits, want)


def test_the_routing_pass_ends_in_the_last_hidden_state(family):
    router, seen = family.model.router, []
    handle = router.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        asked = family.plain(**family.inputs, output_hidden_states=True)
        family.model(**family.inputs)
    handle.remove()
    if "decoder_hidden_states" in asked:
        want = asked.decoder_hidden_states[-1]
    else:  # ViT lists what comes before its final norm
        want = asked.hidden_states[-1] if family.name != "vit" else family.plain.vit.layernorm(asked.hidden_states[-1])
    assert torch.equal(seen[-1], want)


def test_every_router_parameter_gets_a_gradient_and_nothing_else_does(family):
    family.model.zero_grad()
    family.model(**family.inputs).logits.square().mean().backward()
    for name, parameter in family.model.named_parameters():
        if name.startswith("router."):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_each_expert_is_given_back_bit_for_bit(family):
    for name, now in family.model.adapters().items():
        given = family.adapters[name]
        assert now.modules.keys() == given.modules.keys()
        assert now.tensors().keys() == given.tensors().keys()
        for key, tensor in given.tensors().items():
            assert torch.equal(now.tensors()[key].reshape(tensor.shape), tensor), key
        assert [part.kind for part in now.modules.values()] == [now.modules[path].kind for path in now.modules]


def test_unload_gives_back_the_same_objects(tmp_path):
    for name in ("gpt2", "t5", "vit"):
        one = case(name, tmp_path / name)
        layers = dict(one.model.layers)
        backbone = one.model.unload()
        assert all(backbone.get_submodule(site) is layer.base for site, layer in layers.items())
        with torch.no_grad():
            assert torch.equal(backbone(**one.inputs).logits, one.plain(**one.inputs).logits)
