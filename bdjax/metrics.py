"""Numbers of a run: TensorBoard, metrics.jsonl and a progress line, one step late.

The host never waits for the step in flight: what a step measured is read when the next step has
been handed over, by which time the device has it ready.
"""

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tensorboardX import SummaryWriter

Scalars = Mapping[str, Float[Array, "*n"] | Float[np.ndarray, "*n"] | float | int]
Derive = Callable[[int, Mapping[str, float]], Mapping[str, float]]


LOG = "metrics.jsonl"


def cut_log(directory: str | Path, step: int) -> None:
    """Drops the lines of steps after `step`, and an unfinished last line: they will come again."""
    file = Path(directory) / LOG
    if jax.process_index() or not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        every = list(lines)
    kept = [line for line in every if _step_of(line) <= step]
    if len(kept) == len(every):
        return
    part = file.with_suffix(".part")
    with part.open("w", encoding="utf-8") as opened:
        opened.writelines(kept)
        opened.flush()
        os.fsync(opened.fileno())
    part.rename(file)


def _step_of(line: str) -> int | float:
    """The step of a whole line; later than any for another."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Writer:
    """Writes scalars to `directory` (TensorBoard events and metrics.jsonl) and to `history`.

    Sums by noise level (`bdjax.loss.NOISE_LEVELS`) become curves: lists in metrics.jsonl, null
    where a step had no such block, and bars in TensorBoard. `derive` makes further numbers of a
    step, from the clock say: they go to TensorBoard and are returned, but what differs from run to
    run is in neither history nor metrics.jsonl. Without a directory, and on every process but the
    first, only the history is kept. Use as a context manager: leaving it writes the last step.
    """

    def __init__(self, directory: str | Path | None = None, derive: Derive = lambda *_: {}):
        self._derive = derive
        self.history: list[tuple[int, dict[str, float]]] = []
        self._held: tuple[int, Scalars] | None = None
        self._events = self._lines = None
        if directory is not None and jax.process_index() == 0:
            directory = Path(directory)
            directory.mkdir(parents=True, exist_ok=True)
            # tensorboardX names files by the second and overwrites: a quick restart lost events.
            self._events = SummaryWriter(str(directory), filename_suffix=f".{time.time_ns()}")
            # Its own thread would die of a full disk and leave us waiting for its queue.
            events = self._events.file_writer.event_writer
            events.add_event = events._ev_writer.write_event
            self._lines = (directory / LOG).open("a", encoding="utf-8")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        try:
            self.flush()
            if self._events is not None:
                self._events.close()
                self._lines.close()
        except OSError:
            # tensorboardX would try once more at the end of the process, and say so in ten lines.
            self._events.file_writer.event_writer.close = lambda: None
            raise

    def write(self, step: int, scalars: Scalars) -> tuple[int, dict[str, float]] | None:
        """Holds `scalars` as they are on the device, and writes the step held before.

        Returns the step and values just written, None at the first call.
        """
        written = self._write_held()
        self._held = (step, scalars)
        return written

    def add(self, scalars: Scalars) -> None:
        """Adds to the step that is held, what an evaluation after it found say."""
        if self._held is not None:
            step, held = self._held
            self._held = (step, {**held, **scalars})

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Writes the step still held, waiting for it, and returns it; None when none is held."""
        written = self._write_held()
        if self._events is not None:
            self._events.flush()
            self._lines.flush()
            os.fsync(self._lines.fileno())
        return written

    def write_text(self, step: int, name: str, text: str) -> None:
        """Adds a text, a sample say, to TensorBoard at once."""
        if self._events is not None:
            # TensorBoard reads Markdown: four spaces keep the text as it is.
            quoted = "\n".join("    " + line for line in text.split("\n"))
            self._events.add_text(name, quoted, step)

    def _write_held(self) -> tuple[int, dict[str, float]] | None:
        if self._held is None:
            return None
        step, scalars = self._held
        self._held = None
        found = jax.device_get(dict(scalars))
        values = {name: float(value) for name, value in found.items() if np.ndim(value) == 0}
        self.history.append((step, values))
        shown = values | self._derive(step, values)
        if self._events is not None:
            curves = noise_curves(found)
            for name, value in shown.items():
                self._events.add_scalar(name, value, step)
            for name, curve in curves.items():
                self._add_bars(name, curve, step)
            self._lines.write(json.dumps({"step": step} | values | curves) + "\n")
        return step, shown

    def _add_bars(self, name: str, curve: list[float | None], step: int) -> None:
        """A histogram whose bars are as high as the curve, on (0, 1]."""
        heights = [0.0 if y is None or not math.isfinite(y) else y for y in curve]
        edges = [(i + 1) / len(curve) for i in range(len(curve))]
        area = sum(heights)
        moments = [sum(h * e**n for h, e in zip(heights, edges, strict=True)) for n in (1, 2)]
        self._events.add_histogram_raw(
            name, 0.0, 1.0, area, *moments, edges, heights, global_step=step
        )


def noise_curves(found: Mapping) -> dict[str, list[float | None]]:
    """Nats, weighted nats per scored token and scored tokens per counted one, by noise level.

    From the sums that `bdjax.loss` makes; None where no token was scored. Empty without them.
    """
    names = [f"loss_by_noise_{name}" for name in ("tokens", "nll", "bound")]
    if names[0] not in found:
        return {}
    tokens, nll, bound = (np.asarray(found[name], np.float64).tolist() for name in names)

    def mean(sums):
        return [x / n if n > 0 else None for x, n in zip(sums, tokens, strict=True)]

    return {
        "nll_by_noise_level": mean(nll),
        "bound_by_noise_level": mean(bound),
        "tokens_by_noise_level": tokens,
    }


class Progress:
    """Where a run of `total_steps` is: loss, tokens per second, time left.

    A bar on a terminal; elsewhere a plain line for every tenth of the run, and at most
    `seconds` apart. Use as a context manager.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        file: io.TextIOBase | None = None,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total_steps
        self._file = sys.stderr if file is None else file
        self._seconds = seconds
        self._clock = clock
        self._start = self._said = clock()
        self._first: int | None = None
        self._tenth = 0
        self._tokens = 0
        self._bar = None
        console = Console(file=self._file)
        if console.is_terminal:
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("", total=total_steps, said="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, tokens: int, mfu: float | None = None) -> None:
        """`step` steps are done, the last with this loss (nats per token) and this many tokens.

        Speed and time left count from the first call on: the first step also compiles.
        """
        now = self._clock()
        if self._first is None:
            self._first, self._start = step, now
        else:
            self._tokens += tokens
        passed = now - self._start
        speed = self._tokens / passed if passed > 0 else 0.0
        said = f"loss {loss:.4f}  {_short(speed)} tokens/s"
        said += "" if mfu is None else f"  {mfu:.1%} MFU"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, said=said)
            return
        tenth = 10 * step // self._total
        if tenth > self._tenth or now - self._said >= self._seconds or step == self._total:
            self._tenth, self._said = tenth, now
            done = step - self._first
            left = _duration(passed / done * (self._total - step)) if done else "unknown"
            print(f"step {step}/{self._total}  {said}  {left} left", file=self._file, flush=True)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
