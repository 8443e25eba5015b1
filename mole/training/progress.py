"""What the user sees while it trains: a live line on a terminal, a plain line of the log now and then elsewhere."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows steps and evaluations of a run of `total` steps; an inactive one is silent.

    `console`: where the live line goes if it is a terminal; by default the error stream, so that standard output
    stays the results'. Everything but the live line is in the log too.
    """

    def __init__(self, total: int, active: bool = True, console: Console | None = None):
        self.total, self.active = total, active
        self.console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._last_line = -SECONDS_BETWEEN_LINES

    def __enter__(self) -> "TrainingProgress":
        if self.active and self.console.is_terminal and not self.console.is_dumb_terminal and not _is_quiet():
            bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = bar.add_task("", total=self.total, facts="")
            bar.start()
            self._bar = bar
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float, memory: int) -> None:
        """After each optimizer step. `memory`: peak bytes."""
        if not self.active:
            return
        facts = (
            f"loss {loss:.4f}  rate {learning_rate:.2e}  {tokens_per_second:,.0f} tokens/s  {memory / 2**30:.1f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info("step %d/%d  %s", step, self.total, facts)

    def evaluation(self, step: int, metrics: dict[str, Any], best: bool) -> None:
        """After each evaluation."""
        scores = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}/{self.total}  evaluation: {scores}{'  (best)' if best else ''}")

    def say(self, message: str) -> None:
        """One line."""
        if not self.active:
            return
        if self._bar is None:
            log.info(message)
        else:
            self.console.print(message, soft_wrap=True, markup=False)
            log.debug(message)  # to the file alone: the screen has it


def _is_quiet() -> bool:
    """Whether the log's own screen, if it has one, shows warnings only: then no live line either."""
    handlers = logging.getLogger("mole").handlers
    screens = [h for h in handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]
    return bool(screens) and all(handler.level > logging.INFO for handler in screens)
