"""Statistics of blocks: they equal naive counts, add up over batches, and change nothing."""

import math

import pytest
import torch
from surgery_cases import MLPS, batch, llama
from torch import nn

from mole.moe import CapacityConfig, MoEBlock, MoEConfig, MoERouterConfig, checkpointing, moefy, record_routing
from mole.routing import Routing


def block(experts=4, **settings):
    torch.manual_seed(0)
    return MoEBlock([nn.Linear(6, 6) for _ in range(experts)], **settings).eval()


def inputs(rows=3, length=7, seed=0):
    return torch.randn(rows, length, 6, generator=torch.Generator().manual_seed(seed))


def mask_of(rows=3, length=7):
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, 4:] = False
    return mask


def test_every_figure_equals_a_naive_count():
    model, x, mask = block(k=2, hole=True), inputs(), mask_of()
    with record_routing(model, keep="weights") as stats:
        model(x, mask)
    found = stats[""]
    ids, weights = found.ids[0], found.weights[0]
    loads, pairs, positions = [0] * 5, [[0] * 5 for _ in range(5)], [[0] * 7 for _ in range(5)]
    entropy, probability = 0.0, torch.zeros(5)
    for row in range(3):
        for place in range(7):
            if not mask[row, place]:
                assert ids[row, place].tolist() == [-1, -1]
                continue
            p = (model.router.weight @ x[row, place]).softmax(-1).detach()
            probability += p
            entropy -= float((p * p.log()).sum())
            best = p.topk(2).indices.tolist()
            assert ids[row, place].tolist() == best
            assert torch.allclose(weights[row, place], p[best])
            for one in best:
                loads[one] += 1
                positions[one][place] += 1
                for other in best:
                    pairs[one][other] += 1
    assert found.names == ["0", "1", "2", "3", "zero"]
    assert found.loads.tolist() == loads
    assert found.loads_at.tolist() == positions
    assert found.co_activation.tolist() == pairs
    assert found.tokens == 18
    assert found.slots == 36 == int(found.loads.sum())
    assert found.entropy == pytest.approx(entropy / 18, rel=1e-5)
    assert torch.allclose(found.probability.float(), probability / 18, atol=1e-6)
    assert found.null_share == loads[4] / 36
    assert found.max_violation == pytest.approx(max(loads[:4]) / (sum(loads[:4]) / 4) - 1)
    assert found.row()["loads"] == dict(zip(["0", "1", "2", "3", "zero"], loads, strict=True))
    assert "MaxVio" in stats.table()


def test_batches_add_up_exactly_whatever_their_length():
    model = block(k=2)
    with record_routing(model) as apart:
        model(inputs(2, 5))
        model(inputs(1, 9, seed=1))
    with record_routing(model) as first:
        model(inputs(2, 5))
    with record_routing(model) as second:
        model(inputs(1, 9, seed=1))
    first[""].add(second[""])
    one, both = apart[""], first[""]
    assert torch.equal(one.loads_at, both.loads_at)
    assert one.loads_at.shape == (4, 9)
    assert torch.equal(one.co_activation, both.co_activation)
    assert torch.equal(one.probability_sum, both.probability_sum)
    assert (
        (one.tokens, one.slots, one.entropy_sum)
        == (both.tokens, both.slots, both.entropy_sum)
        == (
            19,
            38,
            one.entropy_sum,
        )
    )


def test_recording_changes_neither_outputs_nor_gradients_and_leaves_nothing():
    results = []
    for recorded in (False, True):
        model, x = block(k=2).train(), inputs().requires_grad_()
        torch.manual_seed(1)
        if recorded:
            with record_routing(model, keep="weights") as stats:
                y = model(x)
                assert not any(t.requires_grad for t in [*stats[""].weights, stats[""].probability_sum])
        else:
            y = model(x)
        (y.square().sum() + model.aux_loss).backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
        assert not model.observers
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_after_an_error_nobody_listens():
    model = block()
    with pytest.raises(RuntimeError, match="stop"), record_routing(model):
        raise RuntimeError("stop")
    assert not model.observers


def test_labels_give_loads_by_class_of_rows_or_of_tokens():
    model, x = block(), inputs()
    with record_routing(model, labels=["a", "b", "a"]) as by_row:
        model(x)
    with record_routing(model) as each:
        for row in x:
            model(row[None])
    with record_routing(model, keep="ids") as all_of_them:
        model(x)
    ids = all_of_them[""].ids[0]
    wanted = torch.bincount(ids[[0, 2]].flatten(), minlength=4)
    assert torch.equal(by_row[""].by_class["a"], wanted)
    assert torch.equal(by_row[""].by_class["a"] + by_row[""].by_class["b"], each[""].loads)
    tokens = torch.arange(21).reshape(3, 7) % 2
    with record_routing(model, labels=tokens) as by_token:
        model(x)
        by_token.labels = None
        model(x)
    assert torch.equal(by_token[""].by_class[1], torch.bincount(ids[tokens == 1].flatten(), minlength=4))
    assert int(sum(by_token[""].by_class.values()).sum()) == 21
    for labels, told in (([1], "1 for a batch of 3 rows"), ([[1], [2], [3]], "1 for a row of 7 tokens")):
        with pytest.raises(ValueError, match=told), record_routing(model, labels=labels):
            model(x)


def test_loads_drops_and_nulls_are_all_slots():
    config = MoEConfig(k=2, null_experts=("zero",), capacity=CapacityConfig(factor=0.5, minimum=1))
    model = block(config=config)
    with record_routing(model) as stats:
        model(inputs(), mask_of())
    found = stats[""]
    assert found.drops > 0
    assert int(found.loads.sum()) + found.drops == 2 * 18 == found.slots


@pytest.mark.parametrize("name", ["hash", "round_robin"])
def test_loads_and_drops_are_all_slots_where_nothing_is_learned(name):
    capacity = CapacityConfig(factor=0.5, minimum=1)
    model = block(config=MoEConfig(k=2, router=MoERouterConfig(name=name), capacity=capacity))
    with record_routing(model) as stats:
        model(inputs(), mask_of(), **({"token_ids": torch.zeros(3, 7, dtype=torch.long)} if name == "hash" else {}))
    found = stats[""]
    assert found.drops > 0
    assert int(found.loads.sum()) + found.drops == 2 * 18 == found.slots


@pytest.mark.parametrize("name", ["expert_choice", "soft", "depth", "hash", "round_robin"])
def test_every_router_can_be_recorded(name):
    model = block(1 if name == "depth" else 4, config=MoEConfig(router=MoERouterConfig(name=name)))
    extra = {"token_ids": torch.arange(21).reshape(3, 7)} if name == "hash" else {}
    with record_routing(model, keep="weights") as stats:
        model(inputs(), mask_of(), **extra)
    found = stats[""]
    assert found.tokens == 18
    assert (found.ids[0][-1, 4:] == -1).all()
    assert found.drops == 0
    assert 0 < int(found.loads.sum()) == found.slots
    assert math.isfinite(found.entropy)
    assert len(found.weights) == 1


def test_bars_sum_to_the_slots():
    model = block(k=2, hole=True)
    model(inputs())
    assert int(model.experts_load().sum()) == 2 * 21
    assert torch.equal(model.experts_load().sum(1), model.abs_experts_load())
    with record_routing(model) as stats:
        model(inputs())
    assert torch.equal(stats[""].loads_at, model.experts_load())


def test_checkpointing_leaves_statistics_losses_and_gradients_as_they_are():
    found = []
    for checkpointed in (False, True):
        model = llama()
        moefy(model, MLPS, num_experts=3, k=2, noise="gumbel")
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(checkpointing(model))
        model.train()
        torch.manual_seed(3)
        given = batch(padded=4)
        with record_routing(model, keep="ids") as stats:
            output = model(**given, use_cache=False)
            mask = given["attention_mask"].bool()
            output.logits[mask].square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((stats, gradients))
    (plain, gradients), (again, others) = found
    assert list(plain) == list(again) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for name, stats in plain.items():
        assert torch.equal(stats.loads_at, again[name].loads_at)
        assert stats.tokens == again[name].tokens == 29
        assert len(again[name].ids) == 1
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], atol=1e-6), name


def test_a_model_without_blocks_and_an_unknown_keep_are_refused():
    with pytest.raises(ValueError, match="has no MoE block"), record_routing(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="unknown keep 'idss'; did you mean ids"), record_routing(block(), "idss"):
        pass


def test_observers_are_given_the_routing_and_the_mask():
    model, seen = block(k=2), []
    model.observers.append(lambda *given: seen.append(given))
    model(inputs(), mask_of())
    ((who, routing, mask),) = seen
    assert who is model
    assert isinstance(routing, Routing)
    assert not routing.weights.requires_grad
    assert torch.equal(mask, mask_of())
