"""LoraHub: static weights of experts found by a black-box search on a few examples; no gradients, no reload.

    minimise  loss(w) + l1 · mean|w|,   |w_e| ≤ bound,   w = 0 first

Huang et al. 2023, arXiv 2307.13269. Its optimiser is NGOpt of nevergrad, an optional extra behind `ask` and `tell`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol


class BlackBox(Protocol):
    """Proposes weights, and is told what they came to."""

    def ask(self) -> Sequence[float]:
        """The weights to try next, one per expert."""
        ...

    def tell(self, weights: Sequence[float], objective: float) -> None:
        """What these weights, which it proposed or not, came to."""
        ...


@dataclass(frozen=True)
class Probe:
    """The `number`-th try, from 1: its weights, their `loss`, and `objective` = loss + penalty."""

    number: int
    weights: tuple[float, ...]
    loss: float
    objective: float


def search(
    loss: Callable[[tuple[float, ...]], float],
    optimizer: BlackBox,
    num_experts: int,
    *,
    budget: int,
    l1: float,
    bound: float,
) -> Iterator[Probe]:
    """Exactly `budget` probes, each a single call of `loss`: first all zeros, then what the optimizer asks for.

    Raises ValueError for weights out of bounds, and for a loss that is no finite number at the start.
    """
    for number in range(1, budget + 1):
        asked = (0.0,) * num_experts if number == 1 else tuple(float(w) for w in optimizer.ask())
        if len(asked) != num_experts or any(abs(w) > bound * (1 + 1e-9) for w in asked):
            raise ValueError(f"the optimizer asked for weights {asked} of {num_experts} experts within ±{bound}")
        found = loss(asked)
        objective = found + l1 * sum(abs(w) for w in asked) / num_experts
        if number == 1 and objective != objective:
            raise ValueError("the loss of the plain backbone on these examples is not a number")
        optimizer.tell(asked, objective if objective == objective else float("inf"))
        yield Probe(number, asked, found, objective)


def best_of(probes: Sequence[Probe]) -> Probe:
    """The probe with the smallest objective; of equal ones the first. A loss that is no number is never the best."""
    return min(probes, key=lambda probe: (probe.objective != probe.objective, probe.objective, probe.number))


class Nevergrad:
    """An optimizer of nevergrad by its name there. Raises ValueError if the package or the name is missing."""

    def __init__(self, name: str, num_experts: int, *, bound: float, budget: int, seed: int):
        try:
            import nevergrad  # type: ignore[import-not-found]
        except ImportError as missing:
            own = (missing.name or "nevergrad").partition(".")[0] == "nevergrad"
            lacking = "" if own else f", which lacks {missing.name}"
            raise ValueError(
                f"mole lorahub searches with the package nevergrad{lacking}: pip install 'mole-experts[lorahub]'"
                + ("" if own else f" {missing.name}")
            ) from None
        if name not in nevergrad.optimizers.registry:
            known = ", ".join(n for n in ("NGOpt", "CMA", "DE", "TwoPointsDE", "OnePlusOne", "PSO", "RandomSearch"))
            raise ValueError(f"optimizer={name}: nevergrad has none of that name (some that it has: {known})")
        space: Any = nevergrad.p.Array(shape=(num_experts,), lower=-bound, upper=bound)
        space.random_state.seed(seed)
        self._optimizer: Any = nevergrad.optimizers.registry[name](parametrization=space, budget=budget)
        self._space, self._not_asked = space, nevergrad.errors.TellNotAskedNotSupportedError
        self._asked: list[Any] = []  # candidates that were asked for and not told of yet

    def ask(self) -> Sequence[float]:
        """Raises ValueError if nevergrad fails, as some of its optimizers do with some versions of numpy."""
        failure = None
        if not self._asked:
            try:
                self._asked.append(self._optimizer.ask())
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        if failure is not None:  # not in the handler: the error would keep the optimizer alive, and with it its thread
            self._optimizer = None
            raise ValueError(f"nevergrad failed ({failure}): choose another optimizer, such as optimizer=CMA")
        return self._asked[-1].value.tolist()

    def tell(self, weights: Sequence[float], objective: float) -> None:
        if self.ask() == list(weights):  # most optimizers ask for the middle first, which is what they are told first
            self._optimizer.tell(self._asked.pop(), objective)
            return
        with suppress(self._not_asked):  # some take no other weights than those that they asked for
            self._optimizer.tell(self._space.spawn_child(new_value=self._array(weights)), objective)

    def _array(self, weights: Sequence[float]) -> Any:
        import numpy

        return numpy.asarray(weights, dtype=float)
