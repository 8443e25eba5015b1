"""Statistics of routings: their values by the plain formula, what counts, what they warn of."""

import logging
import math

import pytest
import torch

from mole.routing import Frame, Routing, RoutingInputs
from mole.routing.statistics import TASKS, RoutingStatistics, measured

NAMES = ("a", "b", "c", "d")


def random_weights(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def naive(dense, mask, names, chosen):
    """One token after another, in float64."""
    rows = [dense[b, t].double() for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]
    p = [row / row.sum() for row in rows]
    entropies = [-sum(float(v) * math.log(float(v)) for v in one if v > 0) for one in p]
    importance = sum(p) / len(p)
    counts = torch.zeros(len(names), dtype=torch.float64)
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                for expert in chosen(b, t):
                    counts[expert] += 1
    load = counts / counts.sum()
    average = -sum(float(v) * math.log(float(v)) for v in importance if v > 0)
    best = [one.sort(descending=True).values for one in p]
    return {
        "entropy": sum(entropies) / len(p),
        "normalised_entropy": sum(entropies) / len(p) / math.log(len(names)),
        "entropy_average": average,
        "mutual_information": average - sum(entropies) / len(p),
        "max_violation": len(names) * float(load.max()) - 1,
        "usage": float((load > 0).double().mean()),
        "effective_experts": math.exp(average),
        "weight_sum": float(sum(row.sum() for row in rows)) / len(p),
        "margin": float(sum(one[0] - one[1] for one in best)) / len(p),
        "load": dict(zip(names, load.tolist(), strict=True)),
        "importance": dict(zip(names, importance.tolist(), strict=True)),
    }


def together(mask, names, chosen):
    """`one + other` → share of the valid tokens that chose both."""
    valid = [chosen(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]
    pairs = [(one, other) for one in range(len(names)) for other in range(one + 1, len(names))]
    shares = {pair: sum(set(pair) <= set(found) for found in valid) / len(valid) for pair in pairs}
    return {f"{names[one]} + {names[other]}": share for (one, other), share in shares.items() if share}


@pytest.mark.parametrize("sparse", [False, True])
def test_every_statistic_is_its_formula_over_the_valid_tokens(sparse):
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    if sparse:
        weights = 0.7 * random_weights(2, 4, 2)
        ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(8)])
        routing = Routing(weights, ids.view(2, 4, 2))
        chosen = lambda b, t: ids.view(2, 4, 2)[b, t].tolist()  # noqa: E731
    else:
        routing = Routing(random_weights(2, 4, 4))
        chosen = lambda b, t: [int(routing.weights[b, t].argmax())]  # noqa: E731
    found = measured(routing, 4, mask, None).values(NAMES)
    want = naive(routing.dense(4), mask, NAMES, chosen)
    if sparse:
        want["co_activation"] = together(mask, NAMES, chosen)
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_routing_for_whole_examples_counts_each_of_their_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    per_example = Routing(torch.tensor([[[1.0, 0, 0, 0]], [[0, 0, 0, 1.0]]]))
    found = measured(per_example, 4, mask, None).values(NAMES)
    assert found["load"] == pytest.approx({"a": 0.8, "b": 0, "c": 0, "d": 0.2})
    static = measured(Routing(torch.full((1, 1, 4), 0.25)), 4, mask, None).values(NAMES)
    assert static["entropy"] == pytest.approx(math.log(4))
    assert static["mutual_information"] == pytest.approx(0, abs=1e-6)


def test_pairs_of_layers_are_averaged_also_where_one_layer_lacks_a_pair():
    first = Routing(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0, 1]]]))
    second = Routing(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[2, 3]]]))
    statistics = RoutingStatistics(("x", "y"), NAMES)
    statistics.observe(frame_of(x=first, y=second), "train")
    assert statistics.read()["router/co_activation"] == {"a + b": 0.5, "c + d": 0.5}


def test_angles_are_the_cosines_with_the_prototypes_over_the_valid_tokens():
    mask = torch.tensor([[1, 1, 0]])
    angles = torch.tensor([[[0.5, -0.2], [0.1, 0.3], [1.0, 1.0]]])
    found = measured(Routing(torch.full((1, 3, 2), 0.5), angles=angles), 2, mask, None).values(("a", "b"))
    assert found["angle"] == pytest.approx((0.5 + 0.3) / 2)
    assert found["angles"] == pytest.approx({"a": 0.3, "b": 0.05})


def test_the_norm_of_the_scores_is_their_mean_over_the_valid_tokens_without_absent_experts():
    mask = torch.tensor([[1, 1, 0]])
    logits = torch.tensor([[[3.0, 4.0, -1e30], [0.0, 1.0, float("-inf")], [9.0, 9.0, 9.0]]])
    found = measured(Routing(torch.full((1, 3, 3), 1 / 3), logits=logits), 3, mask, None).values(("a", "b", "c"))
    assert found["score_norm"] == pytest.approx((5 + 1) / 2)


def test_several_tasks_are_told_of_apart_and_no_more_than_the_first_ones():
    statistics = RoutingStatistics(("x", "y"), NAMES)
    first = Routing(torch.eye(4)[[0, 1, 1]][:, None])  # examples of t0, t1, t1
    even = Routing(torch.full((1, 1, 4), 0.25))
    seen = {"x": first, "y": even}
    inputs = RoutingInputs(task_names=("t0", "t1", "t1"), attention_mask=torch.tensor([[1, 1], [1, 1], [1, 0]]))
    statistics.observe(Frame(inputs=inputs, seen=seen), "train")
    found = statistics.read()
    assert found["router/t0/load"] == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}  # of ties the lower index
    assert found["router/t1/load"] == {"a": 0.5, "b": 0.5, "c": 0.0, "d": 0.0}
    assert found["router/t1/entropy"] == pytest.approx(math.log(4) / 2)
    assert found["router/t1/usage"] == 0.25
    many = tuple(f"task {i}" for i in range(40))
    many_rows = Routing(torch.full((40, 1, 4), 0.25))
    one = RoutingStatistics(("x",), NAMES)
    one.observe(Frame(inputs=RoutingInputs(task_names=many), seen={"x": many_rows}), "train")
    told = {key.split("/")[1] for key in one.read() if key.startswith("router/task")}
    assert told == set(many[:TASKS])
    alone = RoutingStatistics(("x",), NAMES)
    alone.observe(Frame(inputs=RoutingInputs(task_names=("t",)), seen={"x": even}), "train")
    assert not [key for key in alone.read() if key.startswith("router/t/")]


def test_evaluation_counts_where_it_is_asked_for():
    statistics = RoutingStatistics(("x",), NAMES, phases=("eval",))
    statistics.observe(frame_of(x=Routing(torch.eye(4)[0].view(1, 1, 4))), "train")
    assert statistics.read() == {}
    statistics.observe(frame_of(x=Routing(torch.eye(4)[1].view(1, 1, 4))), "eval")
    assert statistics.read()["router/load"]["b"] == 1.0


def test_many_routers_that_collapse_are_told_of_in_one_line(caplog):
    sites = tuple(f"layer {i}" for i in range(8))
    statistics = RoutingStatistics(sites, NAMES)
    with caplog.at_level(logging.WARNING):
        for upto in (5, 8):
            rows = [torch.eye(4)[i % 2].view(1, 1, 4) for i in range(upto)]
            rows += [torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])] * (8 - upto)
            statistics.observe(frame_of(**{site: Routing(row) for site, row in zip(sites, rows, strict=True)}), "train")
            statistics.read()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "each of 5 routers of 8 (layer 0, layer 1, layer 2 and 2 more) gives at least 100 % of its weight to one "
        "expert (a, b): it may have collapsed; a loss such as losses={load_balance: 0.01} spreads it",
        "each of 3 routers of 8 (layer 5, layer 6, layer 7) gives nearly nothing to c, d",
    ]


def test_known_tasks_tell_how_often_the_router_is_right():
    routing = Routing(torch.tensor([[[0.7, 0.1, 0.1, 0.1]], [[0.6, 0.2, 0.1, 0.1]], [[0.1, 0.1, 0.7, 0.1]]]))
    labels = torch.tensor([0, 1, -100])
    found = measured(routing, 4, torch.ones(3, 2), labels).values(NAMES)
    assert found["p_correct"] == pytest.approx((0.7 + 0.2) / 2)
    assert found["accuracy"] == pytest.approx(0.5)


def frame_of(**routings):
    return Frame(inputs=RoutingInputs(attention_mask=torch.ones(2, 3)), seen=routings)


def test_modules_with_one_routing_count_once_and_a_window_ends_with_its_reading():
    routing, other = Routing(random_weights(2, 3, 4)), Routing(random_weights(2, 3, 4, seed=1))
    shared = RoutingStatistics(("x", "y"), NAMES)
    shared.observe(frame_of(x=routing, y=routing), "train")
    assert not [key for key in shared.read() if key.startswith("router/x/")]
    assert shared.read() == {}
    apart = RoutingStatistics(("x", "y"), NAMES)
    apart.observe(frame_of(x=routing, y=other), "train")
    apart.observe(frame_of(x=routing, y=other), "eval")
    values = apart.read()
    assert values["router/entropy"] == pytest.approx((values["router/x/entropy"] + values["router/y/entropy"]) / 2)
    assert set(values["router/x/load"]) == set(NAMES)


def test_only_every_nth_training_forward_counts():
    statistics = RoutingStatistics(("x",), NAMES, every=3)
    for expert in (0, 1, 2, 3):
        statistics.observe(frame_of(x=Routing(torch.eye(4)[expert].view(1, 1, 4))), "train")
    assert statistics.read()["router/load"] == {"a": 0.5, "b": 0.0, "c": 0.0, "d": 0.5}


def test_a_collapsed_router_and_dead_experts_are_named_once(caplog):
    collapsed = RoutingStatistics(("x",), NAMES)
    dead = RoutingStatistics(("x", "y"), NAMES)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            collapsed.observe(frame_of(x=Routing(torch.tensor([[[0.99, 0.004, 0.003, 0.003]]]))), "train")
            collapsed.read()
            two = Routing(torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]))
            dead.observe(frame_of(x=two, y=Routing(torch.full((1, 1, 4), 0.25))), "train")
            dead.read()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "99 % of its weight to a" in messages[0]
    assert "load_balance" in messages[0]
    assert messages[1] == "the router at x gives nearly nothing to c, d"


def test_no_warning_where_one_expert_for_all_is_what_is_looked_for(caplog):
    statistics = RoutingStatistics(("x",), NAMES, warns=False)
    with caplog.at_level(logging.WARNING):
        statistics.observe(frame_of(x=Routing(torch.tensor([[[0.99, 0.004, 0.003, 0.003]]]))), "train")
        assert statistics.read()["router/importance"]["a"] == pytest.approx(0.99)
    assert not caplog.records
