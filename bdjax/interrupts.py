"""Ctrl-C and SIGTERM: the step in flight is finished and saved; a second Ctrl-C ends at once.

What is raised in a callback of the garbage collector, of which JAX has one, or of a weak reference,
or in a `__del__`, Python prints and forgets: a Ctrl-C that came there is raised a moment later.
"""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Seconds until a Ctrl-C that would be lost comes again.
_AGAIN = 0.05


class Interrupts:
    """While this is open, `asked` is the signal that asked the run to end, 0 before.

    tell: called when it comes. A second Ctrl-C raises KeyboardInterrupt. Handlers are put back on
    leaving; outside the main thread nothing is caught.
    """

    def __init__(self, tell: Callable[[], None] = lambda: None):
        self.asked = 0
        self._tell = tell
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
        self._tell()


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """While this is open, a Ctrl-C that Python forgets comes again."""
    before = sys.unraisablehook

    def forgotten(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(_AGAIN, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(unraisable)

    sys.unraisablehook = forgotten
    try:
        yield
    finally:
        sys.unraisablehook = before
