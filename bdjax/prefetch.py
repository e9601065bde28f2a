"""Batches made ahead in a thread, so that the step does not wait while rows are packed."""

import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Resumable(Protocol):
    """An iterator that can say where it stands."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any:
        """Where it stands; later steps do not change the answer."""


class Prefetched(Iterator[Any]):
    """The items of `source`, up to `depth` of them made before they are asked for.

    `get_state` is the source's after the last item delivered, whatever was made ahead. What the
    source raises comes where its item would. Use as a context manager: leaving it ends the thread,
    which from the first `next` on is the only one to touch the source.

    Raises ValueError for a depth below 1.
    """

    def __init__(self, source: Resumable, depth: int):
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1; type depth=2")
        self._source = source
        self._state = source.get_state()
        self._made: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="bdjax-prefetch")

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        item, state, error = self._made.get()
        if error is not None:
            self.close()
            raise error
        self._room.release()
        self._state = state
        return item

    def get_state(self) -> Any:
        """Where the source stood when it had made the last item delivered."""
        return self._state

    def close(self) -> None:
        """Ends the thread, after the item it is making."""
        self._closed.set()
        self._room.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._closed.is_set():
                return
            try:
                item = next(self._source)
                self._made.put((item, self._source.get_state(), None))
            except BaseException as error:
                self._made.put((None, None, error))
                return
