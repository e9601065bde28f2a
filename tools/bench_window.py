"""A window over a long cache on one GPU: checked against dense attention, then timed.

    python tools/bench_window.py
    python tools/bench_window.py --head-dim 64 --slots 8192

Each iteration reads the next layer of a stacked cache, so nothing stays in L2; the iterations of
a sample are one program. GB/s count keys and values read once; the copy's count what it reads and
what it writes. cuDNN gets the same keys, laid out as it wants them.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from arguments import positive  # noqa: E402
from jax import lax  # noqa: E402

from pallas_kernels import Blockwise, Dense, Intervals  # noqa: E402
from pallas_kernels.gpu_window import WindowSizes, window_attention  # noqa: E402

LAYERS, KV_HEADS = 3, 8
# (query heads, queries): one block, and a finished block with the next canvas under more heads.
SHAPES = ((16, 32), (32, 64))
TUNINGS = (
    WindowSizes(),
    WindowSizes(key_tile=64),
)


def normals(seed: int, *shape: int) -> jax.Array:
    """bfloat16 of mean zero and unit variance, drawn without a float32 array of that size."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))()


def seconds(run, *arguments, iterations: int, samples: int = 5) -> float:
    """Median time of one of the `iterations` inside `run`."""
    jax.block_until_ready(run(*arguments))
    found = []
    for _ in range(samples):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        found.append(time.perf_counter() - start)
    return statistics.median(found) / iterations


def bounds(lengths, queries: int, first: int = 0) -> Intervals:
    """The first half of the queries sees five keys less."""
    ends = jnp.repeat(jnp.asarray(lengths, jnp.int32)[:, None], queries, axis=1)
    ends = jnp.where(jnp.arange(queries) < queries // 2, jnp.maximum(ends - 5, 0), ends)
    starts = jnp.minimum(first, ends)
    return Intervals(starts, ends, ends * 0, ends * 0)


def check(sizes: WindowSizes, heads: int, queries: int, width: int) -> str:
    """Ragged rows of a short cache with NaN where nobody looks: errors by norms."""
    lengths, slots = (2048, 0, 1, 777, 1280, 64, 2043, 130), 2048
    shape = (2, len(lengths), KV_HEADS, slots, width)
    q, k, v = (
        normals(0, len(lengths), queries, heads, width),
        normals(1, *shape),
        normals(2, *shape),
    )
    seen = bounds(lengths, queries, first=3)
    unseen = ~seen.mask(slots).any(axis=1)[None, :, None, :, None]
    held = [jnp.where(unseen, jnp.nan, x) for x in (k, v)]
    layer = jnp.int32(1)
    run = jax.jit(partial(window_attention, sizes=sizes))
    out, lse = run(q, *held, layer, seen)
    again, _ = run(q, *held, layer, seen)
    wide = [jnp.where(unseen, 0, x).astype(jnp.float32) for x in (k, v)]
    with jax.default_matmul_precision("highest"):
        want, want_lse = Dense().prefix_attention(q.astype(jnp.float32), *wide, layer, seen)
    error = jnp.linalg.norm(out.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    some = want_lse > -1e29
    lse_error = jnp.abs(jnp.where(some, lse - want_lse, 0)).max()
    same = bool((out == again).all())
    empty = bool(jnp.where(some, True, lse == want_lse).all())
    assert error < 1e-2 and lse_error < 2e-2 and same and empty, (error, lse_error, same, empty)
    return f"error {error:.1e}, lse {lse_error:.1e}"


def ours(attention, iterations: int):
    """`iterations` windows, each over the next layer and with the last one's output as queries."""

    @jax.jit
    def run(q, k, v, seen):
        return lax.fori_loop(
            0, iterations, lambda i, q: attention(q, k, v, jnp.int32(i % LAYERS), seen)[0], q
        )

    return run


def cudnn(iterations: int):
    """The same by cuDNN over lists of layers (B, S, K, H)."""

    @jax.jit
    def run(q, keys, values, lengths):
        def sweep(_, q):
            for k, v in zip(keys, values, strict=True):
                q = jax.nn.dot_product_attention(
                    q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
                )
            return q

        return lax.fori_loop(0, iterations // LAYERS, sweep, q)

    return run


def attempt(what: str, measure, bytes_moved: int, copy: float | None) -> float | None:
    """Prints one line; a failure is a line too."""
    try:
        took, note = measure()
    except Exception as error:  # One contestant's failure is not the others'.
        print(f"{what:58s} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None
    rate = bytes_moved / took / 1e9
    share = f"{100 * rate / copy:5.1f} % of the copy" if copy else ""
    print(f"{what:58s} {took * 1e3:8.4f} ms {rate:7.0f} GB/s {share} {note}", flush=True)
    return rate


def main() -> None:
    """Checks, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=positive, default=32768)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--quick", action="store_true", help="first tunings, and Blockwise")
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    slots, width = args.slots, args.head_dim

    checked = {}
    for heads, queries in SHAPES:
        for sizes in TUNINGS[:1] if args.quick else TUNINGS:
            try:
                checked[heads, sizes] = check(sizes, heads, queries, width)
            except Exception as error:
                print(f"{heads} heads, {sizes}: {type(error).__name__}: {str(error)[:600]}")

    moved = normals(3, 1 << 28)
    add = jax.jit(lambda x: lax.fori_loop(0, 20, lambda _, x: x + 1, x))
    copy = attempt("copy", lambda: (seconds(add, moved, iterations=20), ""), 4 * moved.size, None)
    del moved
    for batch in (8, 1):
        shape = LAYERS, batch, KV_HEADS, slots, width
        k, v = normals(1, *shape), normals(2, *shape)
        size = 4 * k.size // LAYERS
        iterations = LAYERS * (10 if batch > 1 else 40)
        theirs = [[x[i].swapaxes(1, 2) for i in range(LAYERS)] for x in (k, v)]
        theirs = jax.block_until_ready(jax.jit(lambda x: x)(theirs))
        for heads, queries in SHAPES:
            title = f"{batch} rows, {heads} heads, {queries} queries"
            q = normals(0, batch, queries, heads, width)
            seen = bounds([slots] * batch, queries)
            for sizes in TUNINGS:
                if (heads, sizes) in checked:
                    run = ours(partial(window_attention, sizes=sizes), iterations)
                    took = partial(seconds, run, q, k, v, seen, iterations=iterations)
                    name = f"{title}: tile {sizes.key_tile or 128}, stages {sizes.stages}, "
                    name += f"{sizes.warpgroups} warpgroups, {sizes.blocks} blocks"
                    note = checked[heads, sizes]
                    attempt(name, lambda took=took, note=note: (took(), note), size, copy)
            lengths = jnp.full((batch,), slots, jnp.int32)
            run = cudnn(iterations)
            took = partial(seconds, run, q, *theirs, lengths, iterations=iterations)
            attempt(f"{title}: cuDNN", lambda took=took: (took(), ""), size, copy)
            if not args.quick:
                continue
            run = ours(Blockwise(key_tile=4096).prefix_attention, LAYERS)
            took = partial(seconds, run, q, k, v, seen, iterations=LAYERS)
            attempt(f"{title}: Blockwise", lambda took=took: (took(), ""), size, copy)


if __name__ == "__main__":
    main()
