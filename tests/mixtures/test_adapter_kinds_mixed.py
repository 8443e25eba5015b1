"""Experts of every method of adapters in mixtures: one-hot weights are the expert alone, all kinds in one model."""

import copy

import pytest
import torch
from mixture_cases import llama

from mole.adapters import attach, attach_weights, extract, layers
from mole.mixtures import MultiExpertModel
from mole.registry import ADAPTERS
from mole.routers import TaskConfig, TopKConfig, UniformConfig
from mole.routing import Routing

SMALL = {"rank": 2, "size": 3, "tokens": 3}
OPTIONS = {
    "houlsby larger": {"activation": "silu", "size": 4, "train_norms": "none"},
    "parallel smaller": {"size": 2, "scale": "learned"},
    "prefix longer": {"tokens": 5},
    "prompt longer": {"tokens": 5},
}
ALL = sorted([*ADAPTERS.names(), *OPTIONS])
KINDS = [kind for kind in ALL if kind not in ("rslora", "pissa")]  # which are LoRA, once they are experts
SUMMED = [kind for kind in KINDS if kind.split()[0] not in ("prefix", "prompt")]  # y = base + Σ w δ


def made(kind, seed=0, dtype=torch.float32):
    """An adapter of that kind for the small Llama, whose numbers are not those of its start."""
    name = kind.split()[0]
    config = ADAPTERS[name].config
    fields = {key: value for key, value in SMALL.items() if key in config.__pydantic_fields__}
    if "reduction_factor" in config.__pydantic_fields__:
        fields["reduction_factor"] = None
    model = llama(dtype)
    attach(model, config(**{**fields, **OPTIONS.get(kind, {})}), seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return extract(model)


def alone(adapter, dtype=torch.float32):
    """The backbone with that adapter on it, which is the oracle."""
    model = llama(dtype)
    attach_weights(model, adapter)
    for layer in layers(model).values():
        layer.to(dtype)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 101, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    return torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7])


@pytest.mark.parametrize("kind", ALL)
def test_one_hot_weights_are_the_expert_alone(kind, ids, mask):
    adapters = {"one": made(kind, 1), "two": made(kind, 2)}
    model = MultiExpertModel(llama(), adapters, UniformConfig()).eval()
    plain = llama()(ids, attention_mask=mask).logits
    for name, adapter in adapters.items():
        want = alone(adapter)(ids, attention_mask=mask).logits
        with torch.no_grad(), model.fixed_routing({name: 1.0}):
            got = model(ids, attention_mask=mask).logits
        assert (got - want)[mask.bool()].abs().max() <= 1e-5 * want.abs().max()
        assert (plain - want).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_the_backbone_and_experts_off_is_it_bit_for_bit(kind, ids):
    model = MultiExpertModel(llama(), {"one": made(kind, 1), "two": made(kind, 2)}, UniformConfig()).eval()
    want = llama()(ids).logits
    with model.experts_off():
        assert torch.equal(model(ids).logits, want)
    with model.fixed_routing({}):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=2e-5)
    assert torch.equal(model.unload()(ids).logits, want)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_expert_whose_weights_sum_to_one_are_that_expert(kind, ids):
    adapter = made(kind, 1)
    model = MultiExpertModel(llama(), {"a": adapter, "b": adapter, "c": adapter}, UniformConfig()).eval()
    want = alone(adapter)(ids).logits
    with torch.no_grad(), model.fixed_routing({"a": 0.2, "b": 0.5, "c": 0.3}):
        got = model(ids).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_a_batch_of_unlike_kinds_is_each_example_with_its_own_expert(ids, mask):
    kinds = KINDS
    adapters = {kind: made(kind, place) for place, kind in enumerate(kinds)}
    tasks = {kind: (kind,) for kind in kinds}
    model = MultiExpertModel(llama(), adapters, TaskConfig(), tasks=tasks).eval()
    for start in range(len(kinds) - 2):
        chosen = kinds[start : start + 3]
        with torch.no_grad():
            got = model(ids, attention_mask=mask, task_names=chosen).logits
        for row, kind in enumerate(chosen):
            real = int(mask[row].sum())
            want = alone(adapters[kind])(ids[row : row + 1, :real]).logits[0]
            assert (got[row, :real] - want).abs().max() <= 1e-5 * want.abs().max(), kind


def test_weights_add_up_over_kinds_at_one_module(ids):
    adapters = {kind: made(kind, place, torch.float64) for place, kind in enumerate(SUMMED)}
    model = MultiExpertModel(llama(torch.float64), adapters, UniformConfig()).eval()
    oracles = {kind: alone(adapter, torch.float64) for kind, adapter in adapters.items()}
    seen, bases = {}, {}
    for site, layer in model.layers.items():
        layer.register_forward_hook(lambda m, args, out, site=site: seen.update({site: (args[0], out)}))
        layer.base.register_forward_hook(lambda m, args, out, site=site: bases.update({site: bases.get(site, out)}))
    weights = {kind: 0.1 * (place + 1) for place, kind in enumerate(SUMMED)}
    with torch.no_grad(), model.fixed_routing(Routing(torch.tensor([[[*weights.values()]]], dtype=torch.float64))):
        model(ids)
    shared = 0
    for site, (x, out) in seen.items():
        want = bases[site].clone()
        here = [kind for kind in SUMMED if site in layers(oracles[kind])]
        shared += len(here) > 3
        for kind in here:
            layer = layers(oracles[kind])[site]
            with torch.no_grad():
                plain = layer.base(x)
                want += weights[kind] * (layer(x) - plain)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-9)
    assert shared


@pytest.mark.parametrize("kind", [k for k in KINDS if k.split()[0] != "prompt"])
def test_routers_of_every_token_route_all_kinds_but_prompts_and_get_gradients(kind, ids):
    model = MultiExpertModel(
        llama(), {"one": made(kind, 1), "two": made(kind, 2)}, TopKConfig(top_k=None), train="both"
    )
    model(ids).logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


@pytest.mark.parametrize("kind", [k for k in KINDS if k.split()[0] != "prompt"])
def test_weights_for_every_token_give_each_token_its_own_mixture(kind, ids):
    """Earlier tokens are the same for all: a change of a token's weights shows from that token on."""
    model = MultiExpertModel(llama(), {"one": made(kind, 1), "two": made(kind, 2)}, UniformConfig()).eval()
    weights = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(2))
    changed = weights.clone()
    changed[:, 4] = 1 - changed[:, 4]
    with torch.no_grad():
        with model.fixed_routing(Routing(weights)):
            one = model(ids).logits
        with model.fixed_routing(Routing(changed)):
            other = model(ids).logits
    torch.testing.assert_close(one[:, :4], other[:, :4], rtol=0, atol=1e-5)
    assert (one[:, 4] - other[:, 4]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_the_cache_equals_recomputation(kind, ids):
    adapters = {"one": made(kind, 1), "two": made(kind, 2)}
    model = MultiExpertModel(llama(), adapters, TaskConfig(), tasks={"one": ("a",), "two": ("b",)}).eval().double()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "task_names": ["a", "b", "a"], "max_new_tokens": 5, "min_new_tokens": 5}
    for more in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}):
        want = model.generate(ids, use_cache=False, **options, **more)
        assert torch.equal(model.generate(ids, **options, **more), want)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_given_back_as_they_were(kind):
    adapters = {"one": made(kind, 1), "two": made(kind, 2)}
    model = MultiExpertModel(llama(), adapters, UniformConfig())
    for name, adapter in model.adapters().items():
        given, now = adapters[name].tensors(), adapter.tensors()
        assert now.keys() == given.keys()
        assert all(torch.equal(tensor, given[key]) for key, tensor in now.items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind, ids):
    adapters = {"one": made(kind, 1), "two": made(kind, 2)}
    model = MultiExpertModel(llama(), adapters, UniformConfig(), train="experts").train()
    found = []
    for on in (False, True):
        model.zero_grad()
        if on:
            model.gradient_checkpointing_enable()
        model(ids, use_cache=False).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_mixture_is_independent(kind, ids):
    model = MultiExpertModel(llama(), {"one": made(kind, 1)}, UniformConfig()).eval()
    want = model(ids).logits
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(model(ids).logits, want)
