"""Learning rates: at step 0, at the end of the warm-up and at the last step, for each schedule."""

import math

import pytest
import torch

from mole.registry import SCHEDULES
from mole.training import schedules
from mole.training.schedules import build_schedule

TOTAL = 100
# config, then the factor that steps 0, 10 (the end of the warm-up) and 99 (the last one) take
CASES = {
    "constant": (schedules.ConstantConfig(), 1.0, 1.0, 1.0),
    "constant_with_warmup": (schedules.ConstantWithWarmupConfig(warmup=10), 0.0, 1.0, 1.0),
    "linear": (schedules.LinearConfig(warmup=10), 0.0, 1.0, 1 / 90),
    "cosine": (schedules.CosineConfig(warmup=10), 0.0, 1.0, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
    "warmup_stable_decay": (schedules.WarmupStableDecayConfig(warmup=10), 0.0, 1.0, 1 / 20),
    "inverse_sqrt": (schedules.InverseSqrtConfig(warmup=10), 0.0, 1.0, math.sqrt(10 / 99)),
}


def rates(config, total: int = TOTAL) -> list[float]:
    """The rate that each step takes, at a peak of 2."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(config, optimizer, total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_every_schedule_has_a_case():
    assert set(CASES) == set(SCHEDULES.names())


@pytest.mark.parametrize("name", CASES)
def test_rates_at_step_0_at_the_end_of_the_warmup_and_at_the_last_step(name):
    config, first, peak, last = CASES[name]
    found = rates(config)
    assert [found[0], found[10], found[99]] == pytest.approx([2 * first, 2 * peak, 2 * last])
    assert max(found) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["cosine", "warmup_stable_decay"])
def test_a_floor_is_where_the_rate_ends(name):
    config = SCHEDULES[name].config(warmup=10, floor=0.25)
    found = rates(config)
    assert found[10] == pytest.approx(2.0)
    assert found[-1] == pytest.approx(0.5, rel=0.2)
    assert min(found[10:]) >= 0.5


@pytest.mark.parametrize("name", [name for name in CASES if name != "constant"])
def test_a_warmup_is_a_number_of_steps_or_a_share_of_the_run(name):
    config = SCHEDULES[name].config
    assert rates(config(warmup=25)) == rates(config(warmup=0.25))


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match=r"schedule\.warmup=100 leaves nothing of a run of 100 steps"):
        rates(schedules.LinearConfig(warmup=100))


def test_warmup_and_decay_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="90 steps of warm-up and 20 of decay do not fit a run of 100"):
        rates(schedules.WarmupStableDecayConfig(warmup=90))


def test_inverse_sqrt_without_a_warmup_is_refused():
    with pytest.raises(ValueError, match="inverse_sqrt needs a warm-up"):
        rates(schedules.InverseSqrtConfig(warmup=0))


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_fits_a_run_of_one_step_by_default(name):
    if name == "inverse_sqrt":
        pytest.skip("it has no pace without a warm-up")
    assert rates(SCHEDULES[name].config(), total=1)[0] == 2.0
