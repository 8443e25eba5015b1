"""Losses on what only some routers have: noise in their choice, blocks of features."""

import math

import pytest
import torch

from mole.routers import MixtureShape, PolyConfig, PolyRouter, TopKConfig, TopKRouter
from mole.routing import Frame, Routing, RoutingInputs
from mole.routing.losses import LOSSES, routing_losses

SHAPE = MixtureShape(tuple("abcde"), (("t",),) * 5, sites=("s",), hidden_size=6)


def noisy(**options) -> TopKRouter:
    torch.manual_seed(0)
    config = TopKConfig(**{"noise": "learned", "top_k": 2, "init_std": 1.0, **options})
    return TopKRouter(config, SHAPE, input_dim=6, sites=("s",)).train()


def test_chances_are_how_often_an_expert_is_chosen_when_its_own_noise_is_drawn_anew():
    router, x = noisy(), torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    routing = router(x, Frame(recording=True))
    clean, drawn = router.scores(x)[0, 0].detach(), routing.logits[0, 0].detach()
    size = torch.nn.functional.softplus(router.noise(x))[0, 0].detach()
    for expert in range(5):
        again = drawn.repeat(40000, 1)
        again[:, expert] = clean[expert] + torch.randn(40000) * size[expert]
        often = (again.topk(2).indices == expert).any(-1).float().mean()
        assert float(routing.chances[0, 0, expert].detach()) == pytest.approx(float(often), abs=0.01)


def test_load_cv2_goes_from_zero_to_experts_over_k_less_one():
    def loss(chances):
        routing = Routing(torch.ones(1, 3, 5), logits=torch.zeros(1, 3, 5), chances=chances.expand(1, 3, 5))
        return float(routing_losses(["load_cv2"], [routing], None)["load_cv2"])

    assert loss(torch.full((5,), 0.4)) == pytest.approx(0.0, abs=1e-6)
    assert loss(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])) == pytest.approx(5 / 2 - 1)
    assert loss(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])) == pytest.approx(4.0)


def test_descent_on_load_cv2_balances_the_choice():
    router, x = noisy(noise="normal"), torch.randn(4, 64, 6, generator=torch.Generator().manual_seed(1)) + 1.0

    def violation():
        ids = router.eval()(x, Frame()).expert_ids
        router.train()
        return 5 * float(torch.bincount(ids.flatten(), minlength=5).max()) / ids.numel() - 1

    before, optimizer = violation(), torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        routing_losses(["load_cv2"], [router(x, Frame(recording=True))], None)["load_cv2"].backward()
        optimizer.step()
    assert violation() < 0.5 * before


def test_a_router_without_noise_cannot_have_it():
    for options in ({"noise": None}, {"noise": "jitter"}, {"top_k": None}):
        routing = noisy(**options)(torch.randn(1, 2, 6), Frame(recording=True))
        with pytest.raises(ValueError, match=r"load_cv2 needs .* router.noise=normal"):
            routing_losses(["load_cv2"], [routing], None)


def test_padding_takes_no_part_in_chances():
    chances = torch.tensor([[[0.4] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]]])
    routing = Routing(torch.ones(1, 2, 5), logits=torch.zeros(1, 2, 5), chances=chances)
    found = routing_losses(["load_cv2"], [routing], torch.tensor([[1, 0]]))["load_cv2"]
    assert float(found) == pytest.approx(0.0, abs=1e-6)


def test_blocks_of_features_count_like_tokens():
    torch.manual_seed(0)
    router = PolyRouter(PolyConfig(num_splits=3, init=2.0), SHAPE, input_dim=6, sites=("s",)).eval()
    blocked = router(None, Frame(inputs=RoutingInputs(task_names=("t", "t"))))
    flat = Routing(blocked.weights.flatten(1, 2), logits=blocked.logits.flatten(1, 2))
    names = [name for name in LOSSES if name not in ("load_cv2", "expert_label")]
    labels, mask = torch.tensor([1, 3]), torch.ones(2, 7)
    for name in [*names, "expert_label"]:
        got = routing_losses([name], [blocked], mask, labels)[name]
        torch.testing.assert_close(got, routing_losses([name], [flat], None, labels)[name])
    shares = torch.softmax(blocked.logits.detach(), -1).mean((0, 1, 2))
    want = math.log(5) + float(torch.xlogy(shares, shares).sum())
    found = routing_losses(["balance_entropy"], [blocked], mask)["balance_entropy"].item()
    assert found == pytest.approx(want, rel=1e-4)  # little is left of log 5 less almost as much
