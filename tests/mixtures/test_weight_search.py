"""LoraHub's search: what it minimises, what it costs, what it keeps; nevergrad where it is installed."""

import random
import sys
import types

import pytest

from mole.mixtures.preparing.weight_search import Nevergrad, Probe, best_of, search

PLANTED = (0.9, -0.4, 0.0)


def quadratic(weights) -> float:
    return 0.3 + sum((w - p) ** 2 for w, p in zip(weights, PLANTED, strict=True))


class Climber:
    """A seeded (1+1) search: a step from the best so far, longer after each gain, shorter after each failure."""

    def __init__(self, num_experts=3, bound=1.5, seed=0):
        self.random, self.bound, self.step = random.Random(seed), bound, 0.5
        self.best, self.value, self.told = (0.0,) * num_experts, float("inf"), []

    def ask(self):
        moved = (w + self.random.gauss(0, self.step) for w in self.best)
        return [max(-self.bound, min(self.bound, w)) for w in moved]

    def tell(self, weights, objective):
        self.told.append((tuple(weights), objective))
        gained = objective < self.value
        self.step *= 1.6 if gained else 0.85
        if gained:
            self.best, self.value = tuple(weights), objective


def probes(budget=200, l1=0.0, seed=0, loss=quadratic, optimizer=None, bound=1.5) -> list[Probe]:
    optimizer = optimizer or Climber(seed=seed)
    return list(search(loss, optimizer, 3, budget=budget, l1=l1, bound=bound))


def test_the_planted_weights_of_a_quadratic_are_found():
    best = best_of(probes())
    assert best.weights == pytest.approx(PLANTED, abs=0.05)
    assert best.loss == pytest.approx(0.3, abs=5e-3)


def test_the_budget_counts_every_call_of_the_loss():
    calls = []
    found = probes(budget=17, loss=lambda w: calls.append(w) or quadratic(w))
    assert len(calls) == len(found) == 17
    assert [probe.number for probe in found] == list(range(1, 18))


def test_the_first_probe_is_the_plain_backbone():
    assert probes(budget=3)[0].weights == (0.0, 0.0, 0.0)


def test_the_objective_charges_the_mean_absolute_weight():
    optimizer = Climber()
    found = probes(budget=30, l1=0.6, optimizer=optimizer)
    for probe in found:
        penalty = 0.6 * sum(abs(w) for w in probe.weights) / 3
        assert probe.objective == pytest.approx(quadratic(probe.weights) + penalty)
    assert [told for _, told in optimizer.told] == [probe.objective for probe in found]


def test_a_price_on_weights_makes_them_smaller():
    dear, free = (best_of(probes(l1=l1)) for l1 in (0.9, 0.0))
    assert sum(map(abs, dear.weights)) < 0.9 * sum(map(abs, free.weights))


def test_a_seeded_run_repeats():
    assert probes(budget=20, seed=3) == probes(budget=20, seed=3)
    assert probes(budget=20, seed=3) != probes(budget=20, seed=4)


def test_the_best_probe_is_the_first_of_the_smallest_and_never_one_without_a_number():
    made = [Probe(n, (0.0,), value, value) for n, value in enumerate([2.0, float("nan"), 1.0, 1.0], start=1)]
    assert best_of(made).number == 3


def test_a_loss_that_is_no_number_is_told_as_the_worst():
    optimizer = Climber()
    found = probes(budget=4, loss=lambda w: float("nan") if any(w) else 1.0, optimizer=optimizer)
    assert [told for _, told in optimizer.told[1:]] == [float("inf")] * 3
    assert best_of(found).number == 1
    with pytest.raises(ValueError, match="not a number"):
        probes(budget=2, loss=lambda w: float("nan"))


def test_an_optimizer_that_leaves_the_bounds_is_stopped():
    with pytest.raises(ValueError, match="within ±0.1"):
        probes(budget=9, bound=0.1)


# ---- nevergrad
def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ValueError, match=r"mole-experts\[lorahub\]"):
        Nevergrad("NGOpt", 3, bound=1.5, budget=10, seed=0)


def test_a_package_that_nevergrad_lacks_is_named(monkeypatch, tmp_path):
    (tmp_path / "nevergrad.py").write_text("import no_such_package\n")
    monkeypatch.delitem(sys.modules, "nevergrad", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"which lacks no_such_package: pip install .* no_such_package$"):
        Nevergrad("NGOpt", 3, bound=1.5, budget=10, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nevergrad_finds_the_planted_weights_and_repeats():
    pytest.importorskip("nevergrad")

    def made(seed, name="NGOpt"):
        return probes(budget=60, optimizer=Nevergrad(name, 3, bound=1.5, budget=60, seed=seed))

    first = made(1)
    assert first == made(1)
    assert made(1, "OnePlusOne") == made(1, "OnePlusOne") != made(2, "OnePlusOne")
    assert len({probe.weights for probe in first}) == 60  # none is tried twice, not even the first
    assert best_of(first).loss < 0.3 + 0.15
    with pytest.raises(ValueError, match="nevergrad has none of that name"):
        Nevergrad("NoSuch", 3, bound=1.5, budget=10, seed=0)


def test_what_nevergrad_fails_with_is_told_with_a_way_out(monkeypatch):
    class Fails:
        def __init__(self, **settings):
            pass

        def ask(self):
            raise TypeError("only 0-dimensional arrays")

    space = types.SimpleNamespace(random_state=types.SimpleNamespace(seed=lambda seed: None))
    stub = types.SimpleNamespace(
        p=types.SimpleNamespace(Array=lambda **bounds: space),
        optimizers=types.SimpleNamespace(registry={"NGOpt": Fails}),
        errors=types.SimpleNamespace(TellNotAskedNotSupportedError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "nevergrad", stub)
    with pytest.raises(ValueError, match=r"TypeError: only 0-dimensional arrays\): .* optimizer=CMA"):
        probes(optimizer=Nevergrad("NGOpt", 3, bound=1.5, budget=10, seed=0))
    with pytest.raises(ValueError, match="nevergrad has none of that name"):
        Nevergrad("NoSuch", 3, bound=1.5, budget=10, seed=0)
