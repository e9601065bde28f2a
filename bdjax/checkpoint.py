"""Checkpoints: every Orbax call, saving beside the run, and restoring what is whole.

    RUN/checkpoints/<step>/arrays/         the state, by Orbax: `params`, `ema`, and the `rest`
                           config.json     the resolved config (`overrides.to_json`)
                           data/<process>  the data iterator's state, JSON
                           bdjax.json      format, leaves, size and CRC-32 of every file above

`bdjax.json` is written last (`manifest.py`), so a folder without it is a save that never finished.
Nothing in a checkpoint is executed.
"""

import contextlib
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from bdjax import manifest
from bdjax.distributed import gather
from bdjax.manifest import CheckpointError, Condition, TornCheckpointError, condition
from bdjax.state_tree import as_dicts, by_path, halves_of, in_structure, on_devices

# What Orbax and the system call a disk, a quota or a file limit that is used up.
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")

# Of Orbax's log: what we raise as one sentence, and what is as it should be.
_UNSAID = ("_SignalingThread", "Skipping merge of OCDBT checkpoints")

# Seconds between two looks at whether a second Ctrl-C has come.
_LOOK = 0.5

# A shard is written in pieces of at most so many bytes, each compressed in memory.
_PIECE = 32 * 2**20


class NoSpaceError(CheckpointError):
    """A save that failed because the disk is full: the older checkpoints are as they were."""


class Checkpoints:
    """The checkpoints of one run, in `directory/checkpoints`.

    The newest `keep` whole ones stay, and every one whose step is a multiple of `keep_every`
    (0: none beyond them). Saves go on beside the caller, one at a time. Use as a context manager:
    leaving it waits for the save in flight. Every process of a run does the same calls.
    Raises ValueError for keep below 1.
    """

    def __init__(self, directory: str | Path, keep: int = 2, keep_every: int = 0):
        if keep < 1:
            raise ValueError(f"keep={keep} would delete every checkpoint; type keep=1 or more")
        self._run = Path(directory).absolute()
        self._keep = keep
        self._keep_every = keep_every
        self._thread: threading.Thread | None = None
        self._failed: CheckpointError | None = None
        self._damaged: list[Path] = []
        self._calls = 0
        self._quiet = contextlib.ExitStack()

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(_one_sentence())
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            # A second Ctrl-C waits for nothing; the save in flight stays unfinished.
            if not isinstance(error, KeyboardInterrupt):
                self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            warnings.warn(str(failed), stacklevel=2)
        finally:
            self._quiet.close()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, rising."""
        return [int(path.name) for path in self._whole()]

    def check_readable(self) -> None:
        """Raises CheckpointError when saves were finished here and none of them can be read."""
        folders = manifest.numbered(self._run / "checkpoints")
        finished = [path for path in folders if (path / "bdjax.json").exists()]
        if finished and not self._whole():
            manifest.read(finished[-1])

    def save(self, step: int, state: Any, config_json: str, data_state: dict | None = None) -> None:
        """Starts to write the arrays of `state`, a dict or NamedTuple with `params`.

        They are copied before this returns, so `state` may be donated; the bytes are written
        meanwhile. `data_state`: JSON, one per process. Older checkpoints go only when this one is
        whole. Raises CheckpointError when there is a whole one of this step, and whatever became of
        the save before, as `wait`.
        """
        halves = halves_of(state)
        self.wait()
        path = self._run / "checkpoints" / str(step)
        call = self._call(f"save/{step}")
        refused = gather(f"{call}/begin", self._clear(path))[0]
        if refused:
            raise CheckpointError(refused)
        self._damaged = [other for other in self._damaged if other != path]
        try:
            with _in_pieces():
                response = ocp.save_checkpointables_async(path / "arrays", halves)
        except (ValueError, OSError) as error:
            response = _Failed(error)
        leaves = {name: [list(v.shape), str(v.dtype)] for name, v in by_path(state).items()}
        bytes_ = sum(leaf.nbytes for leaf in by_path(state).values())

        def finish():
            try:
                self._finish(path, call, response, leaves, config_json, data_state)
            except Exception as error:
                self._failed = self._failure(step, bytes_, error)

        self._thread = threading.Thread(target=finish, daemon=True, name=f"bdjax-save-{step}")
        self._thread.start()

    def check(self) -> None:
        """Raises NoSpaceError or CheckpointError when the last save has failed; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in flight is whole.

        Raises NoSpaceError when the disk is full and CheckpointError for any other failure, once.
        """
        if self._thread is not None:
            # In pieces: a signal that another thread receives is handled in between.
            while self._thread.is_alive():
                self._thread.join(_LOOK)
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, list[Any]]:
        """(step, state, data states) of the newest whole checkpoint, or of `step`.

        `abstract_state` gives structure, shapes and shardings (`jax.eval_shape` of the
        initialiser under the mesh in force), which may differ from those at the save. There is one
        data state per process that saved. A torn newest checkpoint is passed over with a warning
        if another is whole, and goes when the next one is.

        Raises CheckpointError: nothing there, torn, foreign, a future format, other shapes.
        """

        def load(path: Path, found: dict):
            _check_leaves(path, found["leaves"], abstract_state, everything=True)
            names = sorted(found["files"])
            share = names[jax.process_index() :: jax.process_count()]
            self._together("verify", lambda: manifest.verify(path, found, share))
            halves = halves_of(jax.tree.map(on_devices, abstract_state))
            loaded = self._together("load", lambda: _load(path, halves))
            nested = loaded.pop("rest", {}) | loaded
            data = [
                json.loads((path / "data" / f"{process}.json").read_text())
                for process in range(sum(name.startswith("data/") for name in names))
            ]
            return found["step"], in_structure(abstract_state, nested), data

        return _newest(self._run, step, load, self._damaged.append)

    def _together(self, name: str, work: Callable[[], Any]) -> Any:
        """`work()`, or TornCheckpointError in all processes when it is raised in any."""
        result, torn = None, ""
        try:
            result = work()
        except TornCheckpointError as error:
            torn = str(error)
        answers = gather(self._call(name), torn)
        for answer in answers:
            if answer:
                raise TornCheckpointError(answer)
        return result

    def _call(self, name: str) -> str:
        self._calls += 1
        return f"checkpoint/{self._calls}/{name}"

    def _clear(self, path: Path) -> str:
        """Removes an unfinished checkpoint of this step; why it must stay if it must."""
        if jax.process_index() == 0 and path.exists():
            try:
                manifest.read(path)
            except TornCheckpointError:
                manifest.remove(path)
            except CheckpointError as error:
                return str(error)
            else:
                if path not in self._damaged:
                    return (
                        f"{path} is already a whole checkpoint; resume the run or choose another "
                        "folder"
                    )
                manifest.remove(path)
        return ""

    def _finish(self, path, call, response, leaves, config_json, data_state) -> None:
        """The part of a save that runs beside the caller, in a thread of each process."""
        first = jax.process_index() == 0

        def arrays():
            response.result()
            (path / "data").mkdir(exist_ok=True)
            own = path / "data" / f"{jax.process_index()}.json"
            own.write_text(json.dumps(data_state))
            if first:
                (path / "config.json").write_text(config_json)

        def settle():
            names = manifest.list_files(path)
            share = names[jax.process_index() :: jax.process_count()]
            return json.dumps(manifest.settle(path, share))

        def whole(files):
            if first:
                manifest.write(path, int(path.name), leaves, files)
                self._prune(path)

        try:
            self._agreed(f"{call}/written", arrays)
            shares = self._agreed(f"{call}/settled", settle)
            files = {name: size for share in shares for name, size in json.loads(share).items()}
            self._agreed(f"{call}/whole", lambda: whole(files))
        except Exception:
            # What fails after the manifest is in place, pruning say, leaves a whole checkpoint.
            if first and condition(path) is not Condition.WHOLE:
                _remove_for_good(path)
            raise

    def _agreed(self, name: str, work: Callable[[], str | None]) -> list[str]:
        """The answers of all processes; OSError in all of them when one fails."""
        answer, failure = "", ""
        try:
            answer = work() or ""
        except Exception as error:
            failure = str(error).strip() or type(error).__name__
        found = [json.loads(text) for text in gather(name, json.dumps([answer, failure]))]
        for _, failure in found:
            if failure:
                raise OSError(failure)
        return [answer for answer, _ in found]

    def _failure(self, step: int, size: int, error: Exception) -> CheckpointError:
        full = [text for text in _FULL if text in str(error)]
        if full:
            return NoSpaceError(
                f"{self._run} has no room for the checkpoint of step {step} ({full[0]}); the older "
                f"ones are as they were. While one is written there are {self._keep + 1} of "
                f"{size / 1e6:.3g} MB: free some space, or type a smaller keep_checkpoints"
            )
        reason = str(error).strip().splitlines()[0]
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._run}: {reason}"
        )

    def _prune(self, newest: Path) -> None:
        """Deletes what is not to be kept, now that `newest` is whole."""
        older = [p for p in manifest.numbered(newest.parent) if int(p.name) < int(newest.name)]
        torn = [p for p in older if p in self._damaged or condition(p) is Condition.TORN]
        whole = [p for p in older if p not in torn and condition(p) is Condition.WHOLE]
        every = self._keep_every
        kept = whole[max(0, len(whole) - self._keep + 1) :]
        kept += [p for p in whole if every and int(p.name) % every == 0]
        for path in torn + [p for p in whole if p not in kept]:
            manifest.remove(path)

    def _whole(self) -> list[Path]:
        return [
            path
            for path in manifest.numbered(self._run / "checkpoints")
            if condition(path) is Condition.WHOLE
        ]


def _in_pieces() -> ocp.Context:
    """Each piece is a file as soon as it is compressed.

    Orbax's own choice, one database of all arrays (OCDBT), keeps the whole checkpoint in memory a
    second time until it is complete.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.storage_options.chunk_byte_size = _PIECE
    return context


class _Failed:
    """A save that Orbax refused at once, in the form of one that fails later."""

    def __init__(self, error: Exception):
        self._error = error

    def result(self):
        raise self._error


def _remove_for_good(path: Path) -> None:
    """Until it stays away: where one of Orbax's writers fails, others may still be at it."""
    for _ in range(20):
        manifest.remove(path)
        time.sleep(0.1)
        if not path.exists():
            return


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Of a failed save Orbax and TensorStore log pages; we raise what they say as one sentence."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _UNSAID)

    def other(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.addFilter(keep)
    sys.unraisablehook = other
    try:
        yield
    finally:
        logger.removeFilter(keep)
        sys.unraisablehook = hook


def restore_params(
    directory: str | Path,
    abstract_params: Any,
    step: int | None = None,
    stored_dtype: bool = False,
) -> tuple[int, Any]:
    """(step, parameters) alone, in the dtype and sharding of `abstract_params`.

    stored_dtype: in the dtype they were saved in instead.

    They are the moving average where the run kept one. `directory` is a run, its `checkpoints` or
    one checkpoint. Raises as `Checkpoints.restore`.
    """

    def load(path: Path, found: dict):
        half = "ema" if any(name.startswith("ema/") for name in found["leaves"]) else "params"
        _check_leaves(path, found["leaves"], {half: abstract_params}, everything=False)
        others = [f"arrays/{other}/" for other in ("params", "ema", "rest") if other != half]
        names = [n for n in found["files"] if not n.startswith((*others, "data/"))]
        manifest.verify(path, found, names)
        wanted = {half: as_dicts(jax.tree.map(on_devices, abstract_params))}
        if stored_dtype:
            kinds = {name: jnp.dtype(dtype) for name, (_, dtype) in found["leaves"].items()}
            wanted = as_dicts({n: x.update(dtype=kinds[n]) for n, x in by_path(wanted).items()})
        return found["step"], in_structure(abstract_params, _load(path, wanted)[half])

    return _newest(directory, step, load)


def read_config(directory: str | Path, step: int | None = None) -> str:
    """The config's JSON, as saved. `directory` and errors as for `restore_params`."""

    def load(path: Path, found: dict) -> str:
        manifest.verify(path, found, ["config.json"])
        return (path / "config.json").read_text()

    return _newest(directory, step, load)


def _newest(directory: str | Path, step: int | None, load, passed_over=lambda path: None):
    """`load(path, manifest)` of the newest checkpoint that is not torn, or of `step`."""
    paths = manifest.find(Path(directory).absolute(), step)
    for path, before in zip(paths, [*paths[1:], None], strict=True):
        try:
            return load(path, manifest.read(path))
        except TornCheckpointError as error:
            if before is None:
                raise
            passed_over(path)
            warnings.warn(f"{error}; reading {before} instead", stacklevel=3)
    raise AssertionError("find returns at least one path")


def _check_leaves(path: Path, saved: dict, abstract, everything: bool) -> None:
    wanted = {name: list(leaf.shape) for name, leaf in by_path(abstract).items()}
    there = {name: shape for name, (shape, _) in saved.items()}
    if not everything:
        halves = {name.split("/")[0] for name in wanted}
        there = {name: shape for name, shape in there.items() if name.split("/")[0] in halves}
    wrong = [
        f"{name} is {there.get(name, 'absent')} in it and {wanted.get(name, 'absent')} here"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{path} does not fit this config: {wrong[0]}{more}; "
            f"use the config it was saved with, {path / 'config.json'}"
        )


def _load(path: Path, abstract: dict) -> dict:
    try:
        return ocp.load_checkpointables(path / "arrays", abstract)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TornCheckpointError(f"{path} is damaged: Orbax answers {reason}") from error
