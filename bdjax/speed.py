"""How fast a run goes, from the host's clock alone: step time, tokens/s, MFU; and profiles."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Int

from bdjax.chips import chip_of
from bdjax.config import TrainConfig
from bdjax.flops import documents_of, scored_share, step_flops
from bdjax.step import Model

# Steps that a reading averages over.
_WINDOW = 20


class Speed:
    """Step time, tokens/s and MFU over the last steps whose metrics the host has read.

    A step's metrics can be read once the device is done with it, so the time between readings is
    the time of a step, and nothing ever waits for the clock. Hand in every step's documents before
    its metrics are read, and call it with the metrics (a `metrics.Writer` does); `restart` after
    anything else that took time.
    """

    def __init__(
        self,
        flops: Callable[[list[int], int, int], float] | None,
        peak: float,
        documents: Callable[[np.ndarray], list[int]] = lambda segment: [],
        clock: Callable[[], float] = time.monotonic,
    ):
        """flops: model FLOPs of a step from its documents, trainable tokens and block size; None
        leaves MFU out.

        peak: FLOP/s of all devices.
        """
        self._flops, self._peak, self._documents, self._clock = flops, peak, documents, clock
        self._handed: dict[int, tuple[list[int], int]] = {}
        self._read: deque[tuple[float, float, float]] = deque(maxlen=_WINDOW + 1)

    def hand(
        self, step: int, segment: Int[np.ndarray, "B L"], trainable: Bool[np.ndarray, "B L"]
    ) -> None:
        """`step` runs on this batch."""
        if self._flops is not None:
            self._handed[step] = self._documents(segment), int(trainable.sum())

    def restart(self) -> None:
        """The host did something else: what was read so far says nothing about the next step."""
        self._read.clear()

    def __call__(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """`step_seconds`, `tokens_per_second` and `mfu` now that these metrics have been read.

        Empty for the first reading after a start: the first step also compiles.
        """
        flops = 0.0
        if self._flops is not None:
            documents, labels = self._handed.pop(step, ([], 0))
            flops = self._flops(documents, labels, int(values["block_size"]))
        self._read.append((self._clock(), values["tokens"], flops))
        passed = self._read[-1][0] - self._read[0][0]
        if passed <= 0:
            return {}
        _, tokens, work = np.sum(list(self._read)[1:], axis=0)
        found = {"step_seconds": passed / (len(self._read) - 1)}
        found["tokens_per_second"] = float(tokens) / passed
        if self._flops is not None:
            found["mfu"] = float(work) / passed / self._peak
        return found


def speed_of(
    config: TrainConfig, model: Model, clock: Callable[[], float] = time.monotonic
) -> Speed:
    """The meter of a run on the mesh in force; MFU only where `chips` knows the devices.

    FLOPs are those of the documents in this process's rows, times the number of processes.
    """
    mesh = jax.sharding.get_mesh()
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is None:
        return Speed(None, 0.0, clock=clock)
    objective = config.objective
    share = scored_share(objective, objective.block_size.largest)

    def flops(documents: list[int], labels: int, size: int) -> float:
        found = step_flops(model, objective, documents, block_size=size, share=share, labels=labels)
        return found.total * jax.process_count()

    peak = chip.flops * mesh.size
    return Speed(flops, peak, lambda segment: documents_of(segment, objective), clock)


class Profile:
    """A profiler trace of a few steps. Use as a context manager, and run the steps through `step`.

    window: first and last step of the trace, None for none. The trace goes to `directory`; reading
    it is `xprof --logdir` or TensorBoard's profile plug-in. Ending it waits for the device, once.
    """

    def __init__(self, window: tuple[int, int] | None, directory: Path, say: Callable[[str], None]):
        if window is not None and not 1 <= window[0] <= window[1]:
            raise ValueError(
                f"profile {window[0]}:{window[1]} must be first:last with 1 <= first <= last; "
                "type --profile 20:25"
            )
        self._window, self._directory, self._say = window, directory, say
        self._open = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        self._close()

    def step(self, number: int, function: Callable, *arguments):
        """function(*arguments), traced as step `number` when it lies in the window."""
        if self._window is None or not self._window[0] <= number <= self._window[1]:
            return function(*arguments)
        if not self._open:
            jax.profiler.start_trace(str(self._directory))
            self._open = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = function(*arguments)
        if number == self._window[1]:
            jax.block_until_ready(result)
            self._close()
        return result

    def _close(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            self._say(
                f"profile of steps {self._window[0]} to {self._window[1]} is in {self._directory}; "
                f"xprof --logdir {self._directory} shows it"
            )
