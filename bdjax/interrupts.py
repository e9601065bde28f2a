"""Ctrl-C and SIGTERM: the step in flight is finished and saved; a second Ctrl-C ends at once."""

import signal
import threading
from typing import Any


class Interrupts:
    """While this is open, `asked` is the signal that asked the run to end, 0 before.

    A second Ctrl-C raises KeyboardInterrupt. Handlers are put back on leaving; outside the main
    thread nothing is caught.
    """

    def __init__(self):
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            # None: the handler was not Python's, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
