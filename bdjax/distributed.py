"""Several processes of one run: start, agreement with a time limit, and a peer that dies.

Everything here goes through JAX's coordination service, which answers even when a device waits for
a peer that is gone. With one process every function is the trivial case of itself.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# How long processes wait for each other where no work is in between: start, save, end.
PATIENCE = 300.0
# A heartbeat is sent this often per timeout, and at least every _SLOWEST seconds.
_BEATS = 10
_SLOWEST = 2.0


class PeerError(Exception):
    """Another process of the run is gone or did not answer in time."""


def start_processes(
    *,
    process_id: int | None = None,
    process_count: int | None = None,
    coordinator: str | None = None,
    heartbeat_seconds: float = 100.0,
) -> None:
    """Makes this process one of several; call it before anything else asks JAX for devices.

    coordinator: HOST:PORT of process 0. On TPU pods, Slurm and Kubernetes all three may be left
    out. Raises ValueError when only some are given, PeerError when the others do not come.
    """
    given = (process_id, process_count, coordinator)
    if None in given and given != (None, None, None):
        raise ValueError(
            "process id, process count and coordinator belong together; type for example "
            "--process-id 0 --process-count 2 --coordinator localhost:7777, or none of them on a "
            "pod that knows them"
        )
    if process_count is not None and not 0 <= process_id < process_count:
        raise ValueError(
            f"--process-id {process_id} must be from 0 to {process_count - 1} "
            f"(--process-count {process_count})"
        )
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            # Our own heartbeats notice first and say which process it was; this is the net below.
            heartbeat_timeout_seconds=round(2 * heartbeat_seconds + 10),
            shutdown_timeout_seconds=round(heartbeat_seconds),
        )
    except (RuntimeError, ValueError) as error:
        raise PeerError(f"the processes of the run did not find each other: {error}") from error


def gather(name: str, text: str, seconds: float = PATIENCE) -> list[str]:
    """The texts of all processes, in their order. Every process calls it with the same new `name`.

    Raises PeerError when one of them does not come in time.
    """
    count = jax.process_count()
    if count == 1:
        return [text]
    client, limit = _client(), round(1000 * seconds)
    own = f"bdjax/{name}/{jax.process_index()}"
    try:
        client.key_value_set(own, text)
        client.wait_at_barrier(f"bdjax/{name}", limit)
        found = [client.blocking_key_value_get(f"bdjax/{name}/{p}", limit) for p in range(count)]
        client.wait_at_barrier(f"bdjax/{name}/read", limit)
        client.key_value_delete(own)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PeerError(
            f"the processes did not meet at {name} in {seconds:g} s: {reason}"
        ) from error
    return found


class Agreement:
    """The largest number that any process holds, in all of them at the same step, one step late.

    Each call adds a small program after the step just handed over and reads the one before, so the
    host waits for no step in flight.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._held: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """With one process `number` itself; else the largest of the call before, 0 at first."""
        if jax.process_count() == 1:
            return number
        before, self._held = self._held, self._largest(number)
        return 0 if before is None else int(before)

    def _largest(self, number: int) -> jax.Array:
        mesh = self._mesh
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

        def part(index):
            return np.full(len(range(*index[0].indices(mesh.size))), number, np.int32)

        return jax.numpy.max(jax.make_array_from_callback((mesh.size,), sharding, part))


class Peers:
    """While this is open, a peer that dies or fails ends this process with one sentence.

    `advice` says what to type next. Each process sends heartbeats; process 0 counts them. A thread
    ends the process even while the main one waits for a device. Use as a context manager, in all
    processes at the same places.
    """

    def __init__(self, heartbeat_seconds: float, advice: str):
        self._seconds = heartbeat_seconds
        self._advice = advice
        self._pause = min(_SLOWEST, heartbeat_seconds / _BEATS)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="bdjax-peers")

    def __enter__(self) -> "Peers":
        if jax.process_count() > 1:
            gather("begin", "")
            self._restore_abort = _on_abort(
                "JAX ended this process, most likely because process 0, which coordinates the "
                f"run, is gone; {self._advice}"
            )
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if jax.process_count() == 1:
            return
        if error is None:
            gather("end", "")
        else:
            if _from_a_device(error):
                # A peer's death looks like this in a collective; the watch finds out whose.
                self._over.wait(1.5 * self._seconds + 2 * self._pause)
            # From here on this process speaks for itself.
            self._over.set()
            self._tell(jax.process_index(), f"ended with: {error or kind.__name__}")
            if jax.process_index() == 0:
                # It takes the service with it: the others must have read this.
                time.sleep(3 * self._pause)
        self._over.set()
        self._thread.join()
        self._restore_abort()

    def _tell(self, process: int, what: str) -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            _client().key_value_set(f"bdjax/ended/{process}", what, allow_overwrite=True)

    def _watch(self) -> None:
        own = jax.process_index()
        heard = {p: (None, time.monotonic()) for p in range(jax.process_count())}
        beat, answered = 0, time.monotonic()
        while not self._over.wait(self._pause):
            beat += 1
            now = time.monotonic()
            try:
                _client().key_value_set(f"bdjax/alive/{own}", str(beat), allow_overwrite=True)
                ended = _client().key_value_dir_get("bdjax/ended/")
                beats = dict(_client().key_value_dir_get("bdjax/alive/")) if own == 0 else {}
                answered = now
            except (RuntimeError, ValueError):
                if now - answered > self._seconds:
                    self._leave(0, f"has not answered for {now - answered:.0f} s")
                continue
            for key, what in ended:
                process = int(key.rsplit("/", 1)[1])
                if process != own:
                    self._leave(process, what)
            for key, value in beats.items():
                process = int(key.rsplit("/", 1)[1])
                if value != heard[process][0]:
                    heard[process] = value, now
            for process, (_, when) in heard.items():
                if own == 0 and process != 0 and now - when > self._seconds:
                    what = f"has not answered for {now - when:.0f} s"
                    self._tell(process, what)
                    time.sleep(3 * self._pause)
                    self._leave(process, what)

    def _leave(self, process: int, what: str) -> None:
        if not self._over.is_set():
            text = f"process {process} of the run {what}; {self._advice}"
            print(f"bdjax: {text}", file=sys.stderr, flush=True)
            os._exit(1)


def _client():
    # JAX has no public name for it; Orbax takes it from the same place.
    from jax._src import distributed

    return distributed.global_state.client


def _from_a_device(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _on_abort(text: str):
    """Says `text` and exits with 1 when C++ code calls abort(); returns what undoes it.

    JAX does so at once when its coordinator is gone, and takes no callback from Python.
    """
    message = f"bdjax: {text}\n".encode()

    def handler(number):
        os.write(2, message)
        os._exit(1)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    keep = kind(handler)
    before = library.signal(signal.SIGABRT, ctypes.cast(keep, ctypes.c_void_p))

    def undo(keep=keep):
        library.signal(signal.SIGABRT, before)

    return undo
