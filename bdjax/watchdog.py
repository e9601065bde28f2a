"""A step that never ends: what every thread was doing is written down, and the run may be ended."""

import faulthandler
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# The longest a compilation may take before silence counts as a stall.
_COMPILING = 1800.0


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """After `seconds` without a finished step (0: never) the stacks of all threads are written to
    stderr and RUN/stall-<time>.txt; `abort_after` seconds (0: never) end the process with code 1.

    Compiling, at the first step and at evaluations, gets half an hour. Raises ValueError for
    negative times, and for an abort before the stacks are written.
    """

    seconds: float = 600.0
    abort_after: float = 0.0

    def __post_init__(self):
        for name in ("seconds", "abort_after"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"watchdog.{name}={getattr(self, name)} must not be negative; type "
                    f"watchdog.{name}=0 for never"
                )
        if self.abort_after and not 0 < self.seconds <= self.abort_after:
            raise ValueError(
                f"watchdog.abort_after={self.abort_after} comes before watchdog.seconds="
                f"{self.seconds}; type watchdog.abort_after={max(self.seconds, 1.0)}"
            )


class Watchdog:
    """Watches the time between calls of `alive`. Use as a context manager."""

    def __init__(self, config: WatchdogConfig, directory: str | Path):
        self._config = config
        self._directory = Path(directory)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="bdjax-watchdog")
        self._last, self._step = time.monotonic() + _COMPILING, 0
        self._said = False

    def __enter__(self) -> "Watchdog":
        if self._config.seconds:
            self._last = time.monotonic() + _COMPILING
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()
        if self._config.seconds:
            self._thread.join()

    def alive(self, step: int, compiling: bool = False) -> None:
        """Step `step` is done; `compiling`: what comes next may have to be compiled first."""
        self._step, self._said = step, False
        # One assignment: the thread may look at any moment.
        self._last = time.monotonic() + (_COMPILING if compiling else 0.0)

    def _watch(self) -> None:
        seconds, abort = self._config.seconds, self._config.abort_after
        while not self._over.wait(min(1.0, seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > seconds and not self._said:
                self._said = True
                self._report(silent)
            if abort and silent > abort:
                text = f"bdjax: no step has ended for {silent:.0f} s: the run is ended"
                print(f"{text}; --resume goes on from the newest checkpoint", file=sys.stderr)
                os._exit(1)

    def _report(self, silent: float) -> None:
        text = f"no step has ended for {silent:.0f} s since step {self._step}"
        file = self._directory / f"stall-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            with file.open("w", encoding="utf-8") as opened:
                print(f"{text}; what every thread does:", file=opened, flush=True)
                faulthandler.dump_traceback(opened, all_threads=True)
        except OSError as error:
            file = f"no file ({error})"
        print(f"bdjax: {text}; the stacks below are in {file}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
