"""What a run shows of learned static weights: their log over time, and how far they can get."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mole.routers import MultiAdapterRouter, StaticRouter
from mole.routing.weights_log import WEIGHTS, WeightsLog
from mole.run_folder import RunFolder
from mole.training import summed_factors, total_steps

logger = logging.getLogger(__name__)


@contextmanager
def weights_logged(
    model: Any, config: Any, run: RunFolder, samples: int
) -> Iterator[Callable[[int, float], None] | None]:
    """Inside the body: what keeps the weights of a static router in scalings/weights.jsonl, called after each step.

    None for other routers. A multi-adapter's log is kept every `router.log_every_steps`, null: a thousandth of all. The
    last step is in it where the body ends well.
    """
    router = model.router
    if not isinstance(router, StaticRouter):
        yield None
        return
    total = total_steps(config.training, samples)
    groups, sites = router.groups, list(router.sites)
    if isinstance(router, MultiAdapterRouter):
        shown = router.sub_layers
        place = {site: index for index, site in enumerate(shown)}
        groups = {name: [place[sites[i]] for i in members if sites[i] in place] for name, members in groups.items()}
        sites = shown
    first = router.weights_by_group()
    log = WeightsLog(
        run.scalings / WEIGHTS,
        branches=list(next(iter(first.values()))),
        sites=sites,
        sets=groups,
        mode=router.config.normalise,
        every=getattr(router.config, "log_every_steps", None) or math.ceil(total / 1000),
        resume=config.run.resume == "auto",
    )

    def watch(step: int, epoch: float) -> None:
        log.see(step, epoch, router.weights_by_group())

    yield watch
    log.finish()


def tell_bound(model: Any, config: Any, samples: int) -> None:
    """Prints how large a softmax weight can get in this run, and says so when no branch can get the half."""
    router = model.router
    if not isinstance(router, MultiAdapterRouter):
        return
    rates = router.config.lr or config.training.learning_rate
    total = total_steps(config.training, samples)
    bound = router.highest_weight(rates * summed_factors(config.schedule, total))
    if bound is None:
        return
    print(f"a weight can reach about {bound:.2f} in {total} steps")
    if bound < 0.5:
        logger.warning(
            "no branch can get half of the weight in so few steps: raise router.lr (%g) or training.max_steps, or "
            "lower router.temperature (%g)",
            rates,
            router.config.temperature,
        )
