"""What the user sees while it trains: a live line on a terminal, a plain one now and then elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows steps and evaluations of a run of `total` steps; an inactive one is silent.

    `console`: where to; by default the terminal's error stream, so that standard output stays the results'.
    """

    def __init__(self, total: int, active: bool = True, console: Console | None = None):
        self.total, self.active = total, active
        self.console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._last_line = -SECONDS_BETWEEN_LINES

    def __enter__(self) -> "TrainingProgress":
        if self.active and self.console.is_terminal:
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
            self.console.print(f"step {step}/{self.total}  {facts}", soft_wrap=True)

    def evaluation(self, step: int, metrics: dict[str, Any], best: bool) -> None:
        """After each evaluation."""
        if self.active:
            scores = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.console.print(
                f"step {step}/{self.total}  evaluation: {scores}{'  (best)' if best else ''}", soft_wrap=True
            )

    def say(self, message: str) -> None:
        """One line."""
        if self.active:
            self.console.print(message, soft_wrap=True)
