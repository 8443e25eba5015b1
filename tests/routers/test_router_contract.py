"""What every registered router promises, without a line for any single one."""

import copy
import dataclasses
import pickle

import pytest
import torch

import mole.routers  # noqa: F401  fills the registry
from mole.adapters import LoraWeights
from mole.registry import ROUTERS
from mole.routers import MixtureShape
from mole.routing import Frame, Routing, RoutingInputs

TASKS = (("one",), ("two", "three"), ("four",))
SHAPE = MixtureShape(("a", "b", "c"), TASKS, sites=("w", "x", "y", "z"), hidden_size=8)
DIM, BATCH, LENGTH = 8, 2, 5
GIVEN = {field.name for field in dataclasses.fields(RoutingInputs)}  # needs that a forward is given
VARIANTS = [pytest.param(variant, id=variant.name) for variant in ROUTERS]


# Fields that a config requires, by name; what a router has to be given before it routes, by need.
REQUIRED = {"expert": "a"}


def lora(seed) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, DIM, generator=generator), torch.randn(DIM, 2, generator=generator)
    return LoraWeights(A=a, B=b, alpha=3.0)


def take_data(router) -> None:
    """What the router makes of data: a prototype of each expert, or texts of each task."""
    if hasattr(router, "take_prototypes"):
        router.take_prototypes(dict(enumerate(torch.randn(3, DIM, generator=torch.Generator().manual_seed(5)))))
        return
    router.learn_frequencies(["a sum", "a word", "a date"])
    router.take_examples({task: router.embedded([f"a {task} word"]) for task in router.tasks})


READY = {"experts": lambda router: router.take_experts([{e: lora(e) for e in range(3)}]), "prototypes": take_data}


def config_of(variant):
    fields = variant.config.__pydantic_fields__
    return variant.config(**{name: REQUIRED[name] for name, field in fields.items() if field.is_required()})


def build(variant, seed=0):
    """The router over three experts, with all that it needs before its first forward."""
    router = unprepared(variant, seed)
    for need in sorted(router.needs & READY.keys()):
        READY[need](router)
    return router


def unprepared(variant, seed=0):
    torch.manual_seed(seed)
    scope = variant.implementation.scope
    options = {"input_dim": DIM, "sites": SHAPE.sites[:1]} if scope == "layer" else {}
    if "outputs" in variant.implementation.needs:
        options["output_dim"] = DIM
    return variant.implementation(config_of(variant), SHAPE, **options).eval()


def inputs_for(x) -> RoutingInputs:
    """Everything that a router may be given; the prompt is the first two tokens."""
    rows, length = x.shape[:2]
    return RoutingInputs(
        task_names=("one", "four")[:rows],
        texts=("a sum", "a word")[:rows],
        input_ids=100 * torch.arange(rows)[:, None] + torch.arange(length),
        attention_mask=torch.ones(rows, length, dtype=torch.int64),
        prompt_mask=(torch.arange(length) < 2).expand(rows, length),
        hidden_states=x,
        embeddings=x,
    )


def asked(x) -> dict:
    """What a router that weighs outputs is called with beside: a module W_0 and experts W_e, at the inputs `x`."""
    generator = torch.Generator().manual_seed(11)
    base, *experts = torch.randn(1 + SHAPE.num_experts, DIM, DIM, generator=generator)
    made = torch.stack([x @ expert.T for expert in experts], dim=-2)
    inner = lambda direction: (made * direction[..., None, :]).sum(-1)  # noqa: E731
    return {"outputs": x @ base.T, "inner": inner, "present": range(SHAPE.num_experts)}


def route(router, x, inputs=None) -> list[Routing]:
    """The routings of all sites for module inputs (or hidden states) `x` [B, T, 8]."""
    frame = Frame(inputs=inputs or inputs_for(x))
    beside = asked(x) if "outputs" in router.needs else {}
    routed = router(x if router.scope == "layer" else None, frame, **beside)
    return list(routed) if isinstance(routed, tuple) else [routed]


def hidden(seed=3):
    return torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_finite_float32_and_broadcast(variant):
    routings = route(build(variant), hidden())
    assert len(routings) in (1, SHAPE.num_sites)
    for routing in routings:
        dense = routing.dense(SHAPE.num_experts)
        assert routing.weights.dtype == torch.float32
        assert dense.isfinite().all()
        assert dense.expand(BATCH, LENGTH, SHAPE.num_experts).shape == (BATCH, LENGTH, SHAPE.num_experts)
        if routing.expert_ids is not None:
            assert int(routing.expert_ids.max()) < SHAPE.num_experts


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    router = build(variant)
    parameters = list(router.parameters())
    if not parameters:
        return
    loss = sum((r.dense(SHAPE.num_experts) ** 2).sum() for r in route(router, hidden()))
    if "outputs" in router.needs:
        loss = loss + router.value(hidden()).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_is_deterministic(variant):
    router, x = build(variant), hidden()
    for first, second in zip(route(router, x), route(router, x), strict=True):
        assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_input_is_an_error_that_names_it(variant):
    router = build(variant)
    for need in router.needs & GIVEN:
        with pytest.raises(ValueError, match=need):
            route(router, hidden(), RoutingInputs())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_router_made_from_data_says_so_before_it_has_seen_any(variant):
    router = unprepared(variant)
    if "prototypes" in router.needs:
        with pytest.raises(ValueError, match=f"mole build-moe router={variant.name} dataset="):
            route(router, hidden())


@pytest.mark.parametrize("variant", VARIANTS)
def test_routing_depends_on_no_later_token_and_no_other_row(variant):
    router, x = build(variant), hidden()
    full = [r.dense(3).expand(BATCH, LENGTH, 3) for r in route(router, x)]
    prefix = [r.dense(3).expand(BATCH, 3, 3) for r in route(router, x[:, :3])]
    row = [r.dense(3).expand(1, LENGTH, 3) for r in route(router, x[:1])]
    for whole, part, single in zip(full, prefix, row, strict=True):
        torch.testing.assert_close(whole[:, :3], part, rtol=0, atol=1e-6)
        torch.testing.assert_close(whole[:1], single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_loads_into_a_fresh_router(variant):
    router, other, x = build(variant, seed=0), build(variant, seed=1), hidden()
    other.load_state_dict(router.state_dict())
    for first, second in zip(route(router, x), route(other, x), strict=True):
        assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_pickles_after_a_forward(variant):
    router, x = build(variant), hidden()
    before = route(router, x)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        for first, second in zip(before, route(twin, x), strict=True):
            assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fingerprint_changes_with_parameters_only(variant):
    router = build(variant)
    before = router.fingerprint()
    route(router, hidden())
    assert router.fingerprint() == before
    for parameter in router.parameters():
        parameter.data.add_(1.0)
        with torch.no_grad():
            parameter.add_(1.0)
    if list(router.parameters()):
        assert router.fingerprint() != before
