"""Which tiles of a long cache each thread block reads: data, made from the window's intervals."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.intervals import Intervals

_LAST = jnp.iinfo(jnp.int32).max


class Chunks(NamedTuple):
    """What each thread block does; fields are (C,) but for those of a row of the batch, (B,).

    row: of the batch. begin, count: its key tiles. full, full_count: those among them that every
    query with any key sees in whole. some_low, some_high: the longest clean interval of the row,
    whose keys therefore are seen. others: how many queries to ask whether they see more, 0 where
    none does. start, chunks: the first chunk of a row and how many it has.
    """

    row: Int[Array, "C"]
    begin: Int[Array, "C"]
    count: Int[Array, "C"]
    full: Int[Array, "C"]
    full_count: Int[Array, "C"]
    some_low: Int[Array, "C"]
    some_high: Int[Array, "C"]
    others: Int[Array, "C"]
    start: Int[Array, "B"]
    chunks: Int[Array, "B"]


def chunk_counts(batch: int, per_chunk: int, key_tiles: int, blocks: int) -> tuple[int, int]:
    """How many chunks there are in all, and at most a row, where a chunk takes `per_chunk` blocks.

    As few as leave less than a tenth of the chip idle in its last wave where rows are equally long.
    """

    def idle(wave: int) -> float:
        share = blocks * wave // per_chunk // batch
        used = batch * share * per_chunk
        return 1 - used / (blocks * -(-used // blocks)) if share else 1.0

    first = max(1, -(-batch * per_chunk // blocks))
    waves = range(first, first + 4)
    wave = next((w for w in waves if idle(w) < 0.1), min(waves, key=idle))
    total = min(max(batch, blocks * wave // per_chunk), batch * key_tiles)
    return total, min(total - batch + 1, 4 * -(-total // batch), key_tiles)


def cut(bounds: Intervals, key_tile: int, total: int, most: int, key_tiles: int) -> Chunks:
    """Chunks of the convex cover of each row's intervals, as equal as `total` of them allow."""
    batch = bounds.a0.shape[0]
    low = jnp.concatenate([bounds.a0, bounds.b0], axis=1)
    high = jnp.concatenate([bounds.a1, bounds.b1], axis=1)
    some = high > low
    high = jnp.where(some, high, 0).max(axis=1)
    low = jnp.minimum(jnp.where(some, low, _LAST).min(axis=1), high)
    first, past = low // key_tile, -(-high // key_tile)
    # Queries that see nothing at all need no mask: they get their zeros in the end.
    some = some[:, : some.shape[1] // 2] | some[:, some.shape[1] // 2 :]
    full = -(-jnp.where(some, bounds.a0, 0).max(axis=1) // key_tile)
    full_past = jnp.where(some, bounds.a1, _LAST).min(axis=1) // key_tile
    widest = jnp.argmax(bounds.a1 - bounds.a0, axis=1)[:, None]
    some_low, some_high = (
        jnp.take_along_axis(x, widest, axis=1)[:, 0] for x in (bounds.a0, bounds.a1)
    )
    more = (low < some_low) | (high > some_high)
    tiles = past - first
    size = jnp.maximum(-(-tiles.max() // most), 1)
    if total > most:
        sizes = jnp.arange(1, key_tiles + 1)
        needed = (-(-tiles // sizes[:, None])).sum(axis=1)
        size = jnp.maximum(size, 1 + (needed > total).sum())
    chunks = -(-tiles // size)
    ends = jnp.cumsum(chunks)
    chunk = jnp.arange(total)
    row = jnp.minimum((chunk[:, None] >= ends).sum(axis=1), batch - 1)
    begin = first[row] + (chunk - (ends - chunks)[row]) * size
    end = jnp.clip(begin + size, begin, jnp.maximum(past[row], begin))
    full_begin = jnp.clip(full[row], begin, end)
    return Chunks(
        row,
        begin,
        end - begin,
        full_begin,
        jnp.clip(full_past[row], full_begin, end) - full_begin,
        some_low[row],
        some_high[row],
        jnp.where(more, bounds.a0.shape[1], 0)[row],
        ends - chunks,
        chunks,
    )
