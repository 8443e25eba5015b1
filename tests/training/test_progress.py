"""What is seen while it trains, on a terminal and elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from mole.training import progress
from mole.training.progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def elsewhere() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=120)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False, _environ={"TERM": "xterm"})


def test_elsewhere_steps_are_plain_lines_ten_seconds_apart(clock, caplog):
    console = elsewhere()
    with caplog.at_level(logging.INFO), TrainingProgress(100, console=console) as shown:
        for step in range(1, 101):
            shown.step(step, 1.5, 1e-3, 2000.0, 2**30)
            clock[0] += 0.3
    assert [record.message.split()[1] for record in caplog.records] == ["1/100", "35/100", "69/100"]
    assert caplog.records[0].message == "step 1/100  loss 1.5000  rate 1.00e-03  2,000 tokens/s  1.0 GiB"
    assert console.file.getvalue() == ""


def test_every_evaluation_is_a_line(clock, caplog):
    with caplog.at_level(logging.INFO), TrainingProgress(9, console=elsewhere()) as shown:
        shown.evaluation(3, {"validation_loss": 1.25, "other": 2.0}, best=True)
        shown.evaluation(6, {"validation_loss": 1.5}, best=False)
    assert caplog.messages == [
        "step 3/9  evaluation: validation_loss 1.2500  other 2.0000  (best)",
        "step 6/9  evaluation: validation_loss 1.5000",
    ]


def test_a_terminal_has_one_live_line_and_the_log_has_the_evaluations(caplog):
    console = terminal()
    with caplog.at_level(logging.DEBUG), TrainingProgress(9, console=console) as shown:
        shown.step(3, 1.5, 1e-3, 2000.0, 2**30)
        shown.evaluation(3, {"validation_loss": 1.25}, best=True)
    seen = console.file.getvalue()
    for part in ("3/9", "loss 1.5000", "rate 1.00e-03", "2,000 tokens/s", "1.0 GiB", "validation_loss 1.2500"):
        assert part in seen
    assert [(record.levelno, record.message[:8]) for record in caplog.records] == [(logging.DEBUG, "step 3/9")]


def test_other_processes_are_silent(caplog):
    console = terminal()
    with caplog.at_level(logging.DEBUG), TrainingProgress(9, active=False, console=console) as shown:
        shown.step(3, 1.5, 1e-3, 2000.0, 2**30)
        shown.evaluation(3, {"validation_loss": 1.25}, best=True)
    assert (console.file.getvalue(), caplog.messages) == ("", [])


def test_a_quiet_screen_has_no_live_line():
    screen, console = logging.StreamHandler(io.StringIO()), terminal()
    screen.setLevel(logging.WARNING)
    logging.getLogger("mole").addHandler(screen)
    try:
        with TrainingProgress(9, console=console) as shown:
            shown.step(3, 1.5, 1e-3, 2000.0, 2**30)
    finally:
        logging.getLogger("mole").removeHandler(screen)
    assert console.file.getvalue() == ""
