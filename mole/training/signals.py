"""SIGINT and SIGTERM as a wish that the loop reads between steps."""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Inside `with`, the first signal is noted, so that the step can be finished; a second Ctrl-C interrupts at once.

    Outside the main thread, where python takes no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number
