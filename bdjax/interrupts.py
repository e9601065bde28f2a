"""Ctrl-C and SIGTERM: the step in flight is finished and saved; a second Ctrl-C ends at once.

What is raised in a callback of the garbage collector, JAX has one, Python prints and forgets: a
Ctrl-C that comes there is raised a moment later.
"""

import _thread
import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
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

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            _interrupt(number, frame)
        else:
            self.asked = number
            self._tell()


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """While this is open, Ctrl-C raises KeyboardInterrupt wherever it comes.

    Nothing changes outside the main thread, nor where it means something else already.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks:
            threading.Timer(_AGAIN, _thread.interrupt_main).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt
