"""What every method of adapters keeps, over the registry: start, gradients, frozen backbone, files, KV cache."""

import copy

import pytest
import torch

from mole.adapters import attach, attach_weights, detach, extract, files, layers
from mole.experts import Expert, describe, load_expert
from mole.experts.card import BackboneRef
from mole.registry import ADAPTERS

SMALL = {"rank": 2, "size": 6, "tokens": 3}  # fields that make an adapter small enough for small backbones
STARTS_AWAY = {"prefix", "prompt"}  # what they add is seen by attention from the first step on
KINDS = ("llama", "gpt2", "bert", "roberta")
ENCODERS = ("bert", "roberta")
# Prefixes need rotary positions, prompts a decoder, and IA3 finds no places in encoders by itself.
PLACES = {"prefix": ("llama",), "prompt": ("llama", "gpt2"), "ia3": ("llama", "gpt2")}
CASES = [(name, kind) for name in ADAPTERS.names() for kind in PLACES.get(name, KINDS)]


def config_of(name, **options):
    config = ADAPTERS[name].config
    small = {**SMALL, "reduction_factor": None}
    return config(**{key: value for key, value in small.items() if key in config.__pydantic_fields__}, **options)


def moved(model, seed=1):
    """Every trainable number of the adapter somewhere else, so that it acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def name(case):
    return case[0]


@pytest.fixture
def backbone(case, request):
    return request.getfixturevalue(case[1])


@pytest.fixture
def plain(backbone):
    return copy.deepcopy(backbone)


@pytest.fixture
def decoder(case):
    if case[1] in ENCODERS:
        pytest.skip("about models that write text")


@pytest.fixture
def adapted(name, backbone, plain):
    attach(backbone, config_of(name), seed=0)
    return backbone


def test_a_new_adapter_changes_no_logit_unless_attention_sees_it(adapted, plain, tokens, name):
    if name not in STARTS_AWAY:
        torch.testing.assert_close(adapted(tokens).logits, plain(tokens).logits, rtol=0, atol=1e-5)
    moved(adapted)
    assert (adapted(tokens).logits - plain(tokens).logits).abs().max() > 1e-3


def test_gradients_reach_every_trainable_parameter_and_no_other(adapted, tokens):
    moved(adapted)
    adapted(tokens, labels=tokens).loss.backward()
    mine = {id(p) for layer in layers(adapted).values() for p in layer.parameters(recurse=False)}
    for parameter in adapted.parameters():
        assert parameter.requires_grad == (id(parameter) in mine)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in mine)


def test_the_loss_of_labels_is_that_of_the_logits_it_gives(adapted, tokens, case):
    output = moved(adapted)(tokens, labels=tokens)
    assert output.logits.shape[:2] == tokens.shape
    shift = int(case[1] not in ENCODERS)
    logits = output.logits[:, : tokens.shape[1] - shift]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, shift:].flatten())
    torch.testing.assert_close(output.loss, want)


def test_training_changes_the_adapter_alone_and_lowers_the_loss(adapted, plain, tokens):
    before = adapted(tokens, labels=tokens).loss.item()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert adapted(tokens, labels=tokens).loss.item() < before - 1e-3
    detach(adapted)
    assert all(torch.equal(p, q) for p, q in zip(adapted.parameters(), plain.parameters(), strict=True))
    assert [path for path, _ in adapted.named_modules()] == [path for path, _ in plain.named_modules()]
    assert torch.equal(adapted(tokens).logits, plain(tokens).logits)


def test_first_weights_depend_on_seed_and_path_only(name, backbone, plain):
    other = copy.deepcopy(plain)
    attach(backbone, config_of(name), seed=3)
    torch.manual_seed(99)
    attach(plain, config_of(name), seed=3)
    attach(other, config_of(name), seed=4)
    mine, same, unlike = (extract(model).tensors() for model in (backbone, plain, other))
    assert all(torch.equal(tensor, same[key]) for key, tensor in mine.items())
    if name not in ("ia3", "pissa"):  # which start from nothing random
        assert any(not torch.equal(tensor, unlike[key]) for key, tensor in mine.items())


def test_an_adapter_read_from_its_files_gives_equal_logits_and_equal_bytes(adapted, plain, tokens):
    adapter = extract(moved(adapted))
    written = files.dump(adapter, "user/model")
    read = files.parse(written, "here").adapter
    assert files.dump(read, "user/model") == written
    attach_weights(plain, read)
    torch.testing.assert_close(plain(tokens).logits, adapted(tokens).logits, rtol=0, atol=1e-5)


def test_an_expert_saved_and_loaded_is_the_same_expert(adapted, plain, tokens, tmp_path):
    adapter = extract(moved(adapted))
    expert = Expert(describe(adapter, BackboneRef("user/model"), tasks=["add"]), adapter)
    expert.save(tmp_path / "expert")
    loaded = load_expert(tmp_path / "expert")
    assert loaded.card == expert.card
    attach_weights(plain, loaded.adapter)
    torch.testing.assert_close(plain(tokens).logits, adapted(tokens).logits, rtol=0, atol=1e-5)


def test_training_goes_on_from_weights_that_were_read(adapted, plain, tokens):
    attach_weights(plain, files.parse(files.dump(extract(moved(adapted)), None), "here").adapter)
    plain(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in plain.parameters() if p.requires_grad)


def test_generating_with_the_cache_equals_recomputation(decoder, adapted, tokens):
    moved(adapted).double()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # padding on the left
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    for more in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}):
        cached = adapted.generate(tokens, **options, **more)
        assert torch.equal(cached, adapted.generate(tokens, use_cache=False, **options, **more))


def test_padding_changes_nothing_for_the_tokens_of_the_text(adapted, tokens):
    moved(adapted)
    alone = adapted(tokens[:1, :4]).logits
    padded = adapted(tokens[:1], attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0, 0]])).logits[:, :4]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_later_tokens_change_nothing_before_them(decoder, adapted, tokens):
    moved(adapted)
    torch.testing.assert_close(adapted(tokens[:, :4]).logits, adapted(tokens).logits[:, :4], rtol=0, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(adapted, tokens, case):
    moved(adapted).train()
    more = {} if case[1] in ENCODERS else {"use_cache": False}
    found = []
    for on in (False, True):
        adapted.zero_grad()
        if on:
            enable = getattr(adapted, "activation_checkpointing_enable", None) or adapted.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        for module in adapted.modules():  # dropout of the backbone would draw anew
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        adapted(tokens, labels=tokens, **more).loss.backward()
        found.append([p.grad.clone() for p in adapted.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_copy_of_an_adapted_model_is_independent(adapted, tokens):
    moved(adapted)
    want = adapted(tokens).logits
    moved(copy.deepcopy(adapted), seed=2)
    assert torch.equal(adapted(tokens).logits, want)
    assert torch.equal(copy.deepcopy(adapted)(tokens).logits, want)
