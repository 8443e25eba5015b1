"""Each router's own mathematics, and what it refuses."""

import pytest
import torch
from pydantic import ValidationError

from mole.routers import (
    MixtureShape,
    TaskConfig,
    TaskRouter,
    TopKConfig,
    TopKRouter,
    UniformConfig,
    UniformRouter,
    XLoraConfig,
    XLoraRouter,
)
from mole.routers.selection import largest
from mole.routing import Frame, RoutingInputs

SHAPE = MixtureShape(("a", "b", "c"), (("one",), ("two", "three"), ("one",)), sites=("x", "y"), hidden_size=32)
DISTINCT = MixtureShape(("a", "b", "c"), (("one",), ("two", "three"), ()), sites=("x", "y"), hidden_size=32)


def tasks(*names):
    return Frame(inputs=RoutingInputs(task_names=names))


# ---- uniform
def test_uniform_gives_each_expert_the_same_and_excluded_ones_nothing():
    assert UniformRouter(UniformConfig(), SHAPE)(None, Frame()).weights.tolist() == [[[pytest.approx(1 / 3)] * 3]]
    assert UniformRouter(UniformConfig(exclude=("b",)), SHAPE)(None, Frame()).weights.tolist() == [[[0.5, 0.0, 0.5]]]


@pytest.mark.parametrize(("exclude", "says"), [(("d",), "unknown expert 'd'"), (("a", "b", "c"), "every expert")])
def test_uniform_refuses_unknown_names_and_an_empty_rest(exclude, says):
    with pytest.raises(ValueError, match=says):
        UniformRouter(UniformConfig(exclude=exclude), SHAPE)


# ---- task
def test_task_sends_each_example_to_the_expert_that_lists_its_task():
    weights = TaskRouter(TaskConfig(), DISTINCT)(None, tasks("three", "one")).weights
    assert weights.tolist() == [[[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]]]


def test_task_names_both_experts_of_an_ambiguous_task():
    with pytest.raises(ValueError, match="experts a, c all list the task 'one'"):
        TaskRouter(TaskConfig(), SHAPE)
    first = TaskRouter(TaskConfig(ambiguous="first"), SHAPE)(None, tasks("one")).weights
    mean = TaskRouter(TaskConfig(ambiguous="mean"), SHAPE)(None, tasks("one")).weights
    assert first.tolist() == [[[1.0, 0.0, 0.0]]]
    assert mean.tolist() == [[[0.5, 0.0, 0.5]]]


@pytest.mark.parametrize(
    ("policy", "row"),
    [
        ({"unknown": "backbone"}, [0.0, 0.0, 0.0]),
        ({"unknown": "uniform"}, [1 / 3] * 3),
        ({"unknown": "default", "default_expert": "c"}, [0.0, 0.0, 1.0]),
    ],
)
def test_task_policies_for_unknown_tasks(policy, row):
    weights = TaskRouter(TaskConfig(**policy), DISTINCT)(None, tasks("four")).weights
    assert weights[0, 0].tolist() == pytest.approx(row)


def test_an_unknown_task_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown task 'thre'; did you mean three\?"):
        TaskRouter(TaskConfig(), DISTINCT)(None, tasks("thre"))
    with pytest.raises(ValidationError, match="go together"):
        TaskConfig(default_expert="a")


# ---- top_k
def test_top_k_keeps_the_largest_probabilities_and_renormalises():
    router = TopKRouter(TopKConfig(top_k=2, temperature=0.5), SHAPE, input_dim=3)
    router.score.weight.data = torch.eye(3)
    routing = router(torch.tensor([[[1.0, 3.0, 2.0]]]), Frame())
    assert routing.expert_ids.tolist() == [[[1, 2]]]
    kept = torch.softmax(torch.tensor([6.0, 4.0]), 0)
    torch.testing.assert_close(routing.weights[0, 0], kept)
    plain = TopKRouter(TopKConfig(top_k=2, norm_topk=False), SHAPE, input_dim=3)
    plain.score.weight.data = torch.eye(3)
    want = torch.softmax(torch.tensor([1.0, 3.0, 2.0]), 0)[[1, 2]]
    torch.testing.assert_close(plain(torch.tensor([[[1.0, 3.0, 2.0]]]), Frame()).weights[0, 0], want)


def test_ties_go_to_the_lower_expert():
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]


def test_top_k_refuses_what_cannot_act():
    with pytest.raises(ValueError, match="router.top_k=4 with 3 experts: lower"):
        TopKRouter(TopKConfig(top_k=4), SHAPE, input_dim=3)
    with pytest.raises(ValidationError, match="no gradient"):
        TopKConfig(top_k=1)


# ---- xlora
def hidden(seed=0):
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def xlora(**options) -> XLoraRouter:
    torch.manual_seed(1)
    return XLoraRouter(XLoraConfig(**options), SHAPE).eval()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"depth": 1}, 33 * 3),
        ({"depth": 2, "size": 16}, 33 * 16 + 17 * 3),
        ({"depth": 3, "size": 16, "layerwise": True}, 33 * 16 + 17 * 16 + 17 * 6),
        ({"depth": 2, "size": 16, "bias": False}, 32 * 16 + 16 * 3),
    ],
)
def test_xlora_classifier_has_the_layers_of_its_depth(options, count):
    assert sum(p.numel() for p in xlora(**options).parameters()) == count


def test_xlora_scalings_are_the_softmax_of_the_prediction_over_the_temperature():
    router, h = xlora(temperature=0.3, layerwise=True), hidden()
    predicted = (h.double() @ router.classifier[0].weight.double().T + router.classifier[0].bias.double()).view(
        2, 5, 2, 3
    )
    want = torch.softmax(predicted / 0.3, -1).float()
    torch.testing.assert_close(router.scalings(h), want, rtol=1e-5, atol=1e-6)  # column l·E + e: layer-major
    routings = router(None, Frame(inputs=RoutingInputs(hidden_states=h)))
    for layer, routing in enumerate(routings):
        torch.testing.assert_close(routing.weights, want[:, :, layer], rtol=1e-5, atol=1e-6)


def test_xlora_top_k_masks_without_renormalising_and_logs_what_was_predicted():
    router, h = xlora(top_k=2, global_scaling_weight=2.0), hidden()
    routing = router(None, Frame(inputs=RoutingInputs(hidden_states=h)))[0]
    scalings = router.scalings(h)[:, :, 0]
    smallest = scalings.argmin(-1, keepdim=True)
    torch.testing.assert_close(routing.dense(3), 2.0 * scalings.scatter(-1, smallest, 0.0))
    torch.testing.assert_close(routing.logged(3), scalings)


def test_xlora_top_k_softmax_is_taken_over_the_selected_experts_of_each_token():
    router, h = xlora(top_k=2, top_k_softmax=True, softmax=False), hidden()
    dense = router(None, Frame(inputs=RoutingInputs(hidden_states=h)))[0].dense(3)
    scalings = router.scalings(h)[:, :, 0]
    masked = scalings.scatter(-1, scalings.argmin(-1, keepdim=True), float("-inf"))
    torch.testing.assert_close(dense, torch.softmax(masked, -1))


def test_xlora_dropout_acts_in_training_only():
    router, frame = xlora(depth=2, size=64, dropout=0.5), Frame(inputs=RoutingInputs(hidden_states=hidden()))
    assert torch.equal(router(None, frame)[0].weights, router(None, frame)[0].weights)
    router.train()
    assert not torch.equal(router(None, frame)[0].weights, router(None, frame)[0].weights)


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({}, None),
        ({"scaling_pass_value": 0.5, "global_scaling_weight": 2.0}, [1.0, 1.0, 1.0]),
        ({"scaling_pass_value": 0.5, "top_k": 2}, [0.5, 0.5, 0.0]),
        ({"scaling_pass_value": 0.3, "top_k": 2, "top_k_softmax": True, "softmax": False}, [0.5, 0.5, 0.0]),
    ],
)
def test_xlora_gates_of_the_routing_pass(options, row):
    weights = xlora(**options).routing_pass_weights()
    assert (weights if weights is None else weights.weights[0, 0].tolist()) == row


def test_xlora_leaves_experts_out_of_whole_examples_in_training_only():
    router, h = xlora(expert_dropout=0.5, layerwise=True, dropout=0.0), torch.randn(200, 3, 32)
    one = Frame(inputs=RoutingInputs(hidden_states=h))
    assert all((routing.weights > 0).all() for routing in router.eval()(None, one))
    gates = torch.stack([routing.weights for routing in router.train()(None, one)], 2)  # [B, T, L, E]
    torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))
    out = gates == 0
    assert 0.2 < float(out.float().mean()) < 0.5
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    with pytest.raises(ValidationError, match=r"router.softmax=true, or router.expert_dropout=0"):
        XLoraConfig(expert_dropout=0.5, softmax=False)


def test_xlora_refuses_contradicting_options():
    with pytest.raises(ValidationError, match="needs router.top_k"):
        XLoraConfig(top_k_softmax=True, softmax=False)
    with pytest.raises(ValidationError, match="set router.softmax=false"):
        XLoraConfig(top_k_softmax=True, top_k=1)
    with pytest.raises(ValueError, match="lower router.top_k"):
        xlora(top_k=4)
