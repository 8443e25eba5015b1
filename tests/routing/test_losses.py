"""Losses on routings: their anchors, a naive count of them, and what training on them does."""

import math

import pytest
import torch

from mole.routing import Routing
from mole.routing.losses import LOSSES, check_losses, labels_of, routing_losses, tokens_of


def routing(logits: torch.Tensor, k: int | None = None) -> Routing:
    p = torch.softmax(logits, -1)
    if k is None:
        return Routing(p, logits=logits)
    ids = p.topk(k, dim=-1).indices
    return Routing(p.gather(-1, ids), ids, logits=logits)


def value(name: str, made: Routing, mask=None, labels=None) -> float:
    return routing_losses([name], [made], mask, labels)[name].item()


OF_NOISE = {"load_cv2"}  # see test_losses_of_routers.py
EVEN = torch.zeros(2, 6, 4, dtype=torch.float64)
SHARP = torch.full((2, 6, 4), -40.0, dtype=torch.float64).scatter(-1, torch.arange(12).view(2, 6, 1) % 4, 40.0)
ONE = torch.full((2, 6, 4), -40.0, dtype=torch.float64).index_fill(-1, torch.tensor([2]), 40.0)


@pytest.mark.parametrize(
    ("name", "even", "sharp", "one"),
    [
        ("load_balance", 1.0, 1.0, 4.0),
        ("z_loss", math.log(4) ** 2, 1600.0, 1600.0),
        ("importance_cv2", 0.0, 0.0, 3.0),
        ("balance_entropy", 0.0, 0.0, math.log(4)),
        ("token_entropy", math.log(4), 0.0, 0.0),
        ("mutual_information", 0.0, -math.log(4), 0.0),
    ],
)
def test_each_loss_has_its_anchors_at_even_sharp_and_collapsed_routing(name, even, sharp, one):
    found = [value(name, routing(logits, 1)) for logits in (EVEN, SHARP, ONE)]
    assert found == pytest.approx([even, sharp, one], abs=1e-9)


def test_every_loss_is_what_a_loop_over_valid_tokens_counts():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]])
    labels = torch.tensor([2, -100, 0])
    made = routing(logits, 2)
    chosen, probabilities, squares, entropies, right = [0.0] * 4, [0.0] * 4, [], [], []
    for b in range(3):
        for t in range(5):
            if not mask[b, t]:
                continue
            z = logits[b, t].tolist()
            total = sum(math.exp(v) for v in z)
            p = [math.exp(v) / total for v in z]
            squares.append(math.log(total) ** 2)
            entropies.append(-sum(v * math.log(v) for v in p))
            probabilities = [a + v for a, v in zip(probabilities, p, strict=True)]
            for e in made.expert_ids[b, t].tolist():
                chosen[e] += 1
            if labels[b] >= 0:
                right.append(-math.log(p[labels[b]]))
    n = int(mask.sum())
    f, mean = [c / (2 * n) for c in chosen], [p / n for p in probabilities]
    balance = sum(-p * math.log(p) for p in mean)
    want = {
        "load_balance": 4 * sum(a * b for a, b in zip(f, mean, strict=True)),
        "z_loss": sum(squares) / n,
        "importance_cv2": 4 * sum(p * p for p in mean) - 1,
        "balance_entropy": math.log(4) - balance,
        "token_entropy": sum(entropies) / n,
        "mutual_information": sum(entropies) / n - balance,
        "expert_label": sum(right) / len(right),
    }
    assert want.keys() == LOSSES.keys() - OF_NOISE
    found = routing_losses(want, [made], mask, labels)
    for name, expected in want.items():
        assert found[name].item() == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_times_k_is_the_one_of_transformers(k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    theirs = load_balancing_loss_func((logits.view(-1, 4),), 4, k, mask)
    assert k * value("load_balance", routing(logits, k), mask) == pytest.approx(theirs.item(), rel=1e-5)


def test_layers_are_averaged_and_a_shared_routing_counts_once():
    first, second = routing(EVEN, 1), routing(ONE, 1)
    found = routing_losses(["load_balance"], [first, first, first, second], None)["load_balance"].item()
    assert found == pytest.approx(2.5)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"z_loss"} - OF_NOISE))
def test_descent_lowers_each_loss(name):
    torch.manual_seed(0)
    weight = torch.randn(4, 8, requires_grad=True)
    x, labels = torch.randn(6, 10, 8), torch.arange(6) % 4
    optimizer = torch.optim.SGD([weight], lr=0.5)
    seen = []
    for _ in range(60):
        loss = routing_losses([name], [routing(x @ weight.T, 2)], None, labels)[name]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < seen[0] - 1e-3


def test_labels_are_the_only_expert_that_names_the_task():
    tasks = (("add",), ("spell", "add"), ("date",))
    assert labels_of(["date", "add", "spell", "new"], tasks).tolist() == [2, -100, 1, -100]
    assert labels_of(None, tasks) is None


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="load_balanse"):
        check_losses({"load_balanse": 0.1})
    with pytest.raises(ValueError, match="no logits"):
        routing_losses(["z_loss"], [Routing(torch.ones(1, 1, 3))], None)
    with pytest.raises(ValueError, match="needs expert_labels"):
        routing_losses(["expert_label"], [routing(EVEN)], None)


def test_over_sequences_each_row_is_balanced_by_itself():
    """Two rows that each use one expert: balanced together, not apart."""
    logits = torch.tensor([[[9.0, 0.0]] * 4, [[0.0, 9.0]] * 4])
    made = routing(logits)
    together = routing_losses(["load_balance", "mutual_information"], [made], None)
    apart = routing_losses(["load_balance", "mutual_information"], [made], None, over="sequence")
    rows = [routing_losses(["load_balance", "mutual_information"], [routing(row[None])], None) for row in logits]
    assert together["load_balance"].item() == pytest.approx(1.0)
    assert apart["load_balance"].item() == pytest.approx(2.0, abs=1e-3)
    for name, value in apart.items():
        assert value.item() == pytest.approx(sum(row[name].item() for row in rows) / 2)


def test_sequences_weigh_as_many_tokens_as_are_valid_and_means_over_tokens_stay():
    logits, mask = (
        torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1] * 4, [0, 0, 0, 1]]),
    )
    names, made = ["importance_cv2", "z_loss"], routing(logits)
    found = routing_losses(names, [made], mask, over="sequence")
    whole = routing_losses(names, [routing(logits[:1])], None)["importance_cv2"]
    short = routing_losses(names, [routing(logits[1:, 3:])], None)["importance_cv2"]
    assert found["importance_cv2"].item() == pytest.approx((4 * whole.item() + short.item()) / 5)
    assert found["z_loss"].item() == pytest.approx(routing_losses(names, [made], mask)["z_loss"].item())


@pytest.mark.parametrize(("share", "pushes"), [(0.0, True), (0.2, False), (0.9, True)])
def test_free_bits_let_mutual_information_rest(share, pushes):
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    found = routing_losses(["mutual_information"], [routing(logits)], None, free_bits=share)["mutual_information"]
    found.backward()
    assert bool(logits.grad.any()) is pushes
    assert found.item() >= -(share or 1) * math.log(2) - 1e-6


@pytest.mark.parametrize(("on", "columns"), [("valid", [0, 1, 2]), ("prompt", [0, 1]), ("target", [2])])
def test_tokens_that_count_are_all_or_those_of_the_prompt_or_behind_it(on, columns):
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    prompt = torch.tensor([[True, True, False, False]] * 2)
    want = routing_losses(["z_loss"], [routing(logits[:, columns])], None)["z_loss"]
    found = routing_losses(["z_loss"], [routing(logits)], tokens_of(on, mask, prompt))["z_loss"]
    torch.testing.assert_close(found, want)
    if on != "valid":
        with pytest.raises(ValueError, match="pass prompt_mask"):
            tokens_of(on, mask, None)


def test_a_batch_without_a_token_that_counts_adds_nothing():
    made = routing(torch.randn(1, 2, 3))
    found = routing_losses(["z_loss", "load_balance"], [made], torch.zeros(1, 2))
    assert [value.item() for value in found.values()] == [0.0, 0.0]
