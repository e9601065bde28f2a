"""TPU kernels without a TPU: the interpreter with race detection, two cores sharing parallel grids.

jax keeps the detector's verdicts in a private module, one per kernel call; only this file knows
where.
"""

from contextlib import contextmanager
from importlib import import_module

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def _interpreter():
    try:
        found = import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
        return found, found.races, found.RaceDetectionState
    except (ImportError, AttributeError) as moved:
        pytest.skip(f"jax keeps the race detector elsewhere: {moved}")


def assert_no_races() -> None:
    """No race in the last interpreted kernel; skips where jax keeps its verdict elsewhere."""
    _, state, _ = _interpreter()
    assert state is not None, "no kernel ran under the race detector"
    assert not state.races_found


@contextmanager
def watched(kernels: int):
    """`kernels` calls of kernels run inside, and no race in any of them."""
    module, _, detector = _interpreter()
    states = []

    def made(*arguments, **named):
        states.append(detector(*arguments, **named))
        return states[-1]

    module.RaceDetectionState = made
    try:
        yield
        jax.effects_barrier()
    finally:
        module.RaceDetectionState = detector
    assert len(states) == kernels, f"{len(states)} kernels ran under the race detector"
    assert not any(state.races_found for state in states)
