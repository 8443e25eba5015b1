"""T5 and BART: generation with two streams, the states of both passes, and the encoder's own gates."""

import copy

import pytest
import torch
from family_cases import case
from transformers.modeling_outputs import BaseModelOutput

from mole.mixtures import TwoStreamCache
from mole.mixtures.two_pass.encoder_decoder import RoutedEncoderOutput, check_widths, reads_encoder
from mole.routers import TopKConfig, UniformConfig, XLoraConfig

GENERATE = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 0},
}


@pytest.fixture(scope="module", params=["t5", "bart"])
def pair(request, tmp_path_factory):
    return case(request.param, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def prompt(pair):
    return {name: pair.inputs[name] for name in ("input_ids", "attention_mask")}


def tokens(model, prompt, **options):
    torch.manual_seed(3)
    return model.generate(**prompt, max_new_tokens=7, min_new_tokens=7, **options)


@pytest.mark.parametrize("way", GENERATE)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_with_the_caches_equals_recomputation(name, tmp_path, way):
    one = case(name, tmp_path, XLoraConfig(layerwise=True, temperature=0.3, dtype="float64"))
    prompt = {name: one.inputs[name] for name in ("input_ids", "attention_mask")}
    model = one.model.double()
    want = tokens(model, prompt, use_cache=False, **GENERATE[way])
    assert torch.equal(tokens(model, prompt, **GENERATE[way]), want)
    with model.experts_off():
        assert not torch.equal(tokens(model, prompt, **GENERATE[way]), want)


def test_with_the_experts_off_it_generates_what_the_backbone_does(pair, prompt):
    want = tokens(pair.plain, prompt)
    with pair.model.experts_off():
        assert torch.equal(tokens(pair.model, prompt), want)


def test_a_decode_step_is_one_token_through_each_pass_of_the_decoder_and_none_through_the_encoder(pair, prompt):
    lengths = {"encoder": [], "decoder": []}
    handles = [
        part.register_forward_hook(
            lambda m, args, kwargs, out, n=name: lengths[n].append(out[0].shape[1]), with_kwargs=True
        )
        for name, part in (
            ("encoder", pair.model.backbone.get_encoder()),
            ("decoder", pair.model.backbone.get_decoder()),
        )
    ]
    tokens(pair.model, prompt)
    for handle in handles:
        handle.remove()
    assert lengths == {"encoder": [7, 7], "decoder": [1] * 14}


def test_logits_step_by_step_equal_those_of_the_whole(pair):
    with torch.no_grad():
        want = pair.model(**pair.inputs).logits
        encoded = pair.model.get_encoder()(pair.inputs["input_ids"], pair.inputs["attention_mask"])
        cache, got = None, []
        for step in range(5):
            given = pair.inputs | {"decoder_input_ids": pair.inputs["decoder_input_ids"][:, step : step + 1]}
            out = pair.model(**given, encoder_outputs=encoded, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert isinstance(cache, TwoStreamCache)
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_labels_alone_give_the_decoders_inputs_and_the_loss_once(pair, prompt):
    labels = pair.inputs["decoder_input_ids"]
    shifted = pair.plain.prepare_decoder_input_ids_from_labels(labels=labels)
    with torch.no_grad():
        by_labels = pair.model(**prompt, labels=labels)
        by_inputs = pair.model(**prompt, decoder_input_ids=shifted)
    assert torch.equal(by_labels.logits, by_inputs.logits)
    want = torch.nn.functional.cross_entropy(by_inputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(by_labels.loss, want)


def test_the_encoder_gives_both_passes_and_beams_copy_both(pair, prompt):
    with torch.no_grad():
        out = pair.model.get_encoder()(**prompt)
        plain = pair.plain.get_encoder()(**prompt).last_hidden_state
    assert isinstance(out, RoutedEncoderOutput)
    assert torch.equal(out.routing_state, plain)
    assert not torch.allclose(out.last_hidden_state, plain, atol=1e-2)
    _, expanded = pair.model._expand_inputs_for_generation(3, True, None, encoder_outputs=out)
    assert expanded["encoder_outputs"]["routing_state"].shape[0] == 6


def test_an_encoders_output_of_one_pass_is_refused(pair):
    state = BaseModelOutput(last_hidden_state=torch.zeros(2, 7, 16))
    with pytest.raises(ValueError, match="one pass of the encoder"):
        pair.model(**pair.inputs, encoder_outputs=state)


def test_keys_and_values_that_the_decoder_makes_of_the_encoder_spend_the_encoders_gates(pair):
    across = [site for site in pair.model.sites if reads_encoder(site)]
    last = {site.rsplit(".", 1)[-1] for site in across}
    assert last == ({"k", "v"} if pair.name == "t5" else {"k_proj", "v_proj"})
    assert all("ncoder_attn" in site or "EncDec" in site for site in across)


def test_encoder_and_decoder_are_logged_apart_each_with_all_layers(pair, prompt):
    heard = []

    class Heard:
        def record(self, scalings, **facts):
            heard.append((tuple(scalings.shape), facts["phase"], tuple(facts["token_ids"].shape)))

    pair.model.listeners.append(Heard())
    tokens(pair.model, prompt)
    pair.model.listeners.clear()
    layers = len(pair.model.sites)
    assert heard[0] == ((2, 7, layers, 3), "prefill", (2, 7))
    assert heard[1:] == [((2, 1, layers, 3), "decode" if step else "prefill", (2, 1)) for step in range(7)]


@pytest.mark.parametrize("config", [UniformConfig(), XLoraConfig(scaling_pass_value=0.5)], ids=["uniform", "value"])
def test_other_routers_generate_on_it_too(tmp_path, config):
    one = case("bart", tmp_path, config)
    prompt = {name: one.inputs[name] for name in ("input_ids", "attention_mask")}
    want = tokens(one.model, prompt, use_cache=False, **GENERATE["sampling"])
    assert torch.equal(tokens(one.model, prompt, **GENERATE["sampling"]), want)
    assert not torch.equal(tokens(one.plain, prompt, **GENERATE["sampling"]), want)


def test_a_router_of_each_layer_generates_on_it_too(tmp_path):
    one = case("bart", tmp_path, TopKConfig(top_k=2))
    prompt = {name: one.inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(tokens(one.model, prompt), tokens(one.model, prompt, use_cache=False))


def test_gates_reused_while_decoding_are_for_decoders(tmp_path):
    one = case("t5", tmp_path, XLoraConfig(gate_refresh=2))
    with pytest.raises(ValueError, match="without an encoder"):
        one.model(**one.inputs)


def test_unlike_widths_are_refused(pair):
    backbone = copy.deepcopy(pair.plain)
    backbone.config.encoder = type(backbone.config)(d_model=32, vocab_size=51)
    backbone.config.decoder = type(backbone.config)(d_model=16, vocab_size=51)
    with pytest.raises(ValueError, match="unlike widths"):
        check_widths(backbone)


def test_gradients_with_checkpointing_equal_those_without(pair):
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(pair.model).train().double()  # T5 itself rounds otherwise when it is recomputed
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "activation_dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**pair.inputs).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all((grad - found[1][n]).abs().max() <= 1e-5 * grad.abs().max() for n, grad in found[0].items())


def test_a_config_that_asks_for_tuples_is_followed(tmp_path):
    one = case("t5", tmp_path)
    with torch.no_grad():
        want = one.model(**one.inputs).logits
        one.model.config.return_dict = False
        found = one.model(**one.inputs)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], want)
