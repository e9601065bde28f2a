"""The track of tools/bench_attention.py: the case, the check against float32, the timing.

A contestant is a `Runner`. Contestants are checked one by one and then take turns, so that a chip
that slows down slows all of them.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import CleanMode, Dense, Intervals, Meta, intervals, visible
from pallas_kernels.hopper_tiles import query_plan
from pallas_kernels.padding import pad

WRONG = 2e-2
# Pairs of query and key, visible or not, up to which all rows and heads are compared with float32:
# 2 rows of 2 x 4096 tokens, 16 heads. Four times as many took an H100 and its host over 75 s.
_COMPARED = 2**31


@dataclass(frozen=True, kw_only=True)
class Case:
    """Packed training rows: `length` clean tokens and one noisy view of them per row."""

    rows: int = 2
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    length: int = 4096
    block: int = 32
    documents: int | None = None
    clean: CleanMode = CleanMode.TOKEN
    dtype: str = "bfloat16"

    def places(self, index) -> Meta:
        """The mask's integers of the tokens at `index` of a row; operators alone."""
        at, size = index % self.length, self.documents or self.length
        return Meta(index // self.length, at // size + 1, at % size // self.block, at % size)

    def visible(self, q, k):
        """Whether token q of a row sees token k: numpy, jax or torch integers."""
        return visible(self.places(q), self.places(k), self.clean)

    def intervals(self) -> Intervals:
        """The mask of all rows as the kernels take it."""
        places = self.places(np.tile(np.arange(2 * self.length, dtype=np.int32), (self.rows, 1)))
        places = jax.tree.map(jnp.asarray, places)
        return jax.jit(intervals, static_argnums=2)(places, places, self.clean)

    def compared(self) -> np.ndarray:
        """Units (`units_of`) to compare with float32: all, of long rows the first and the last."""
        units = np.arange(self.rows * self.kv_heads)
        few = self.rows * self.heads * (2 * self.length) ** 2 <= _COMPARED
        return units if few else np.unique(units[[0, -1]])

    def inputs(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random q, k, v and gradient of the output: (B, T, N or K, H)."""
        wide = self.rows, 2 * self.length, self.heads, self.head_dim
        narrow = self.rows, 2 * self.length, self.kv_heads, self.head_dim
        return normals(seed, self.dtype, wide, narrow, narrow, wide)


def normals(seed: int, dtype: str, *shapes) -> tuple[jax.Array, ...]:
    """Normal noise of these shapes, drawn on the device."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


def pairs(seen: Intervals) -> int:
    """Visible query-key pairs over all rows, of one head."""
    a0, a1, b0, b1 = (np.asarray(x, np.int64) for x in seen)
    return int((a1 - a0 + b1 - b0).sum())


def only(platform: str) -> None:
    """Raises NotImplementedError elsewhere."""
    if jax.default_backend() != platform:
        raise NotImplementedError(f"needs a {platform.upper()}, this is {jax.default_backend()}")


def causal(case: Case) -> Intervals:
    """Plain causal attention over rows of the same length: for the anchors."""
    end = jnp.tile(jnp.arange(1, 2 * case.length + 1, dtype=jnp.int32), (case.rows, 1))
    return Intervals(end * 0, end, end * 0, end * 0)


def tile_counts(seen: Intervals, query_tile: int, key_tile: int, keys: int) -> tuple[int, int]:
    """Pairs of tiles that a kernel visits, and those of them that are visible as a whole.

    A query tile visits the key tiles that cover its clean intervals, then those of its noisy ones.
    """
    visited, full = 0, 0
    for low, high in ((seen.a0, seen.a1), (seen.b0, seen.b1)):
        low, high = np.asarray(low, np.int64), np.asarray(high, np.int64)
        low, high = np.where(high > low, (low, high), [[[keys]], [[0]]])
        for start in range(0, low.shape[1], query_tile):
            part = slice(start, start + query_tile)
            first = low[:, part].min(axis=1) // key_tile
            last = -(-high[:, part].max(axis=1) // key_tile)
            visited += int(np.maximum(last - first, 0).sum())
            inner = high[:, part].min(axis=1) // key_tile - -(-low[:, part].max(axis=1) // key_tile)
            full += int(np.maximum(inner, 0).sum())
    return visited, full


def tiled_pairs(seen: Intervals, query_tile: int, key_tile: int, keys: int) -> int:
    """Query-key pairs in the visited tiles."""
    return tile_counts(seen, query_tile, key_tile, keys)[0] * query_tile * key_tile


def hopper_pairs(seen: Intervals, keys: int) -> int:
    """Pairs that the Hopper kernels compute forward: of masked tiles only the halves seen."""
    tile, half = 128, 64
    found, padded = 0, [pad(x, 1, tile) for x in seen]
    plan = query_plan(Intervals(*padded), -(-keys // tile) * tile, tile, tile)
    for _, _, *runs, _, clean0, clean1, own0, own1, _ in np.asarray(plan.columns):
        parts = (runs[:4], (clean0, clean1)), (runs[4:], (own0, own1))
        for (begin, full, full_end, end), covers in parts:
            found += (full_end - full) * tile * tile
            masked = np.r_[begin:full, full_end:end]
            for cover in covers:
                both = (cover >> 16 <= 2 * masked) & (cover & 0xFFFF >= 2 * masked + 2)
                found += int(np.where(both, tile, half).sum()) * half
    return int(found)


class Runner(NamedTuple):
    """A contestant, ready to run.

    program: pass -> (dispatch, calls); dispatch() starts `calls` calls and returns something that
    wait() waits for. results: that something -> out (B, T, N, H), then dq, dk, dv, of one call;
    None where there is nothing to compare.
    """

    program: Callable[[str, int], Callable[[], Any]]
    results: Callable[[Any], tuple] | None
    wait: Callable[[Any], Any]
    seen: Intervals
    visited: float | None = None
    bundles: bool = True


def jax_runner(
    call, inputs, seen, extra=None, visited=None, enter=lambda *x: x, leave=lambda *x: x
) -> Runner:
    """A runner of call(q, k, v, extra) -> out; enter and leave change layouts, untimed."""
    q, k, v, d_out = enter(*inputs)
    extra = seen if extra is None else extra

    def one(which, q, k, v, d_out, extra):
        if which == "forward":
            return (call(q, k, v, extra),)
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, extra), q, k, v)
        return (out, *pull(d_out))

    def program(which, calls):
        # Other queries in each call, or XLA would run it once.
        queries = [jnp.roll(q, i, axis=-1) for i in range(calls)]
        many = jax.jit(lambda queries, *rest: [one(which, q, *rest) for q in queries])
        return lambda: many(queries, k, v, d_out, extra)

    return Runner(program, lambda found: leave(*found[0]), jax.block_until_ready, seen, visited)


def units_of(x, kv_heads: int, units):
    """(B, T, K G, H) -> (U, T, G, H): a unit, row * K + KV head, with the heads of its group."""
    grouped = x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1])
    return grouped[units // kv_heads, :, units % kv_heads]


@functools.partial(jax.jit, static_argnames="backward")
def _reference(q, k, v, d_out, seen, units, backward):
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    wide = [units_of(x, kv_heads, units) for x in (q, d_out)]
    narrow = [units_of(x, kv_heads, units) for x in (k, v)]

    def one(place):
        unit, head = place
        q, d_out = (x[unit, :, head][None, :, None].astype(jnp.float32) for x in wide)
        k, v = (x[unit][None].astype(jnp.float32) for x in narrow)
        own = jax.tree.map(lambda x: x[units[unit] // kv_heads][None], seen)
        out, pull = jax.vjp(lambda q, k, v: Dense().attention(q, k, v, own)[0], q, k, v)
        return jax.tree.map(lambda x: x[0, :, 0], (out, *(pull(d_out) if backward else ())))

    places = jnp.divmod(jnp.arange(units.size * group), group)
    found = [x.reshape(-1, group, *x.shape[1:]).swapaxes(1, 2) for x in jax.lax.map(one, places)]
    return (*found[:2], *(x.sum(axis=2, keepdims=True) for x in found[2:]))


class Truth(NamedTuple):
    """What float32 says of some units: output, dq, dk and dv, (U, T or S, G or 1, H) each."""

    units: np.ndarray
    kv_heads: int
    arrays: tuple[np.ndarray, ...]


def reference(inputs, seen: Intervals, backward: bool = True, units=None) -> Truth:
    """Output and gradients in float32, one row and query head after the other; None: all units."""
    rows, kv_heads = inputs[0].shape[0], inputs[1].shape[2]
    units = np.arange(rows * kv_heads) if units is None else units
    with jax.default_matmul_precision("highest"):
        found = _reference(*inputs, seen, units, backward)
    return Truth(units, kv_heads, tuple(np.asarray(x) for x in found))


def error_of(found, truth: Truth) -> float:
    """The largest relative error by norms over the output and the gradients."""
    errors = []
    for x, y in zip(found, truth.arrays, strict=False):
        # Picked on the device: the whole may be gigabytes.
        x = np.asarray(units_of(x, truth.kv_heads, truth.units), np.float32)
        errors.append(float(np.linalg.norm((x - y).ravel()) / np.linalg.norm(y.ravel())))
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def sample(dispatch, wait, count: int) -> float:
    """Seconds per dispatch over `count` of them, back to back with one wait."""
    start = time.perf_counter()
    for _ in range(count):
        handle = dispatch()
    wait(handle)
    return (time.perf_counter() - start) / count


@dataclass(kw_only=True)
class Timed:
    """One pass of one contestant on the track."""

    dispatch: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int
    count: int
    samples: list[float]

    def lap(self) -> None:
        """One sample more: seconds per call."""
        self.samples.append(sample(self.dispatch, self.wait, self.count) / self.calls)

    def summary(self) -> dict:
        """Median seconds per call, spread and difference of the halves, both over the median."""
        middle = statistics.median(self.samples)
        half = len(self.samples) // 2 or 1
        apart = statistics.median(self.samples[:half]) - statistics.median(self.samples[-half:])
        return {
            "seconds": middle,
            "spread": (max(self.samples) - min(self.samples)) / middle,
            "again": abs(apart) / middle,
            "samples": self.samples,
            "calls_per_dispatch": self.calls,
            "dispatches_per_sample": self.count,
        }


def on_track(runner: Runner, which: str, dispatch, at_least: float) -> Timed:
    """Chooses how many calls make a sample; `dispatch` has run once already.

    Host work of a dispatch hides behind the device's where that takes a millisecond.
    """
    calls, seconds = 1, sample(dispatch, runner.wait, 3)
    if runner.bundles and seconds < 1e-3 and jax.default_backend() != "cpu":
        calls = min(16, math.ceil(1e-3 / seconds))
        dispatch = runner.program(which, calls)
        runner.wait(dispatch())
        seconds = sample(dispatch, runner.wait, 3)
    count = max(1, math.ceil(at_least / seconds))
    return Timed(dispatch=dispatch, wait=runner.wait, calls=calls, count=count, samples=[])


def race(
    contestants: dict[str, Callable[[], Runner]],
    passes: tuple[str, ...],
    expected: Callable[[Intervals], Truth],
    *,
    repeats: int,
    at_least: float,
) -> list[dict]:
    """Checks every contestant, then lets them take turns. One that fails says why.

    expected: out and gradients under the intervals. at_least: seconds of work in one sample.
    """
    found, track = [], []
    for name, build in contestants.items():
        entry = {"name": name, "status": "ok", "reason": "", "passes": {}}
        found.append(entry)
        print(f"... {name}", file=sys.stderr, flush=True)
        try:
            runner = build()
            entry["visible_pairs"] = visible_pairs = pairs(runner.seen)
            if runner.visited is not None:
                entry["visited_over_visible"] = float(runner.visited) / visible_pairs
            ready = []
            for which in passes:
                dispatch = runner.program(which, 1)
                handle = dispatch()
                runner.wait(handle)
                if runner.results is not None:
                    error = error_of(runner.results(handle), expected(runner.seen))
                    entry["error"] = max(error, entry.get("error", 0.0))
                    if not error <= WRONG:
                        raise ArithmeticError(f"relative error {error:.1e} in the {which} pass")
                del handle
                ready.append((which, on_track(runner, which, dispatch, at_least)))
            track += [(entry, which, timed) for which, timed in ready]
        except Exception as error:
            _failed(entry, error)
    for _ in range(repeats):
        for entry, which, timed in track:
            if entry["status"] == "ok":
                try:
                    timed.lap()
                    entry["passes"][which] = timed.summary()
                except Exception as error:
                    _failed(entry, error)
    return found


def _failed(entry: dict, error: Exception) -> None:
    said = str(error).strip().splitlines() or [""]
    entry["status"] = "wrong" if isinstance(error, ArithmeticError) else "failed"
    entry["reason"] = f"{type(error).__name__}: {said[0][:200]}"
    entry["passes"] = {}
