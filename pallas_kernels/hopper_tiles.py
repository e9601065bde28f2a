"""Which tiles the Hopper kernels visit, found on the device from the intervals; nothing T x S.

A query tile visits two runs of key tiles, the convex covers of its clean and of its own noisy
intervals, each with a middle part that every query of the tile sees whole. A key tile visits a
list of query tiles. Both come sorted, the most work first: thread blocks start in that order, and
a long one that starts last would leave the chip waiting.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.intervals import Intervals
from pallas_kernels.quiet import used_keys

_LAST = jnp.iinfo(jnp.int32).max

# Flags of an entry: it is about the own noisy interval; that of some query in the tile is empty;
# some query sees something of the key tile's first half, of its second.
OWN, IDLE, FIRST_HALF, SECOND_HALF = 1, 2, 4, 8
FLAGS = 4


class QueryPlan(NamedTuple):
    """Per query tile, sorted: its row, its number and its two runs of key tiles.

    columns: row, tile, then begin, full begin, full end, end of the clean run and of the own run,
    then whether the row has unclean tiles, then `halves_seen` of its first half and its second, of
    the clean run and of the own one. used: which keys some query sees. unclean: key tiles that hold
    others.
    """

    columns: Int[Array, "P 16"]
    used: Int[Array, "B S"]
    unclean: Int[Array, "B J"]


class KeyPlan(NamedTuple):
    """Per key tile, sorted: which query tiles visit it.

    columns: row, tile, number of entries without a mask, of all. entries: query tile << FLAGS |
    flags; those without a mask come first, those past the number are undefined.
    """

    columns: Int[Array, "P 4"]
    entries: Int[Array, "P n"]


def query_plan(bounds: Intervals, keys: int, query_tile: int, key_tile: int) -> QueryPlan:
    """The plan of the forward pass and of dQ; T and S = `keys` are multiples of the tiles."""
    rows = bounds.a0.shape[0]
    runs, halves = [], []
    for low, high in ((bounds.a0, bounds.a1), (bounds.b0, bounds.b1)):
        low, high = (x.reshape(rows, -1, query_tile) for x in (low, high))
        halves += halves_seen(low, high, key_tile // 2)
        some = high > low
        begin = jnp.where(some, low, _LAST).min(axis=2)
        end = jnp.where(some, high, 0).max(axis=2)
        empty = end == 0
        begin = jnp.where(empty, 0, begin // key_tile)
        end = jnp.where(empty, 0, -(-end // key_tile))
        full = jnp.clip(-(-low.max(axis=2) // key_tile), begin, end)
        full_end = jnp.clip(high.min(axis=2) // key_tile, full, end)
        runs += [begin, full, full_end, end]
    tiles = runs[0].shape[1]
    row, tile = (
        jnp.broadcast_to(x, (rows, tiles))
        for x in (jnp.arange(rows)[:, None], jnp.arange(tiles)[None])
    )
    used = used_keys(bounds, keys)
    unclean = ~used.reshape(rows, -1, key_tile).all(axis=2)
    some = jnp.broadcast_to(unclean.any(axis=1)[:, None], (rows, tiles))
    columns = jnp.stack([row, tile, *runs, some, *halves, jnp.zeros_like(row)], axis=2)
    columns = columns.reshape(rows * tiles, columns.shape[2]).astype(jnp.int32)
    work = runs[3] - runs[0] + runs[7] - runs[4]
    return QueryPlan(
        _heavy_first(work.reshape(-1), columns), used.astype(jnp.int32), unclean.astype(jnp.int32)
    )


def halves_seen(
    low: Int[Array, "B I t"], high: Int[Array, "B I t"], half: int
) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """Of the first and the second half of each query tile: begin << 16 | end of what it sees, in
    halves of key tiles; 0 for nothing.
    """
    low, high = (x.reshape(*x.shape[:2], 2, -1) for x in (low, high))
    some = high > low
    begin = jnp.where(some, low, _LAST).min(axis=3) // half
    end = -(-jnp.where(some, high, 0).max(axis=3) // half)
    found = jnp.where(end > 0, begin << 16 | end, 0)
    return found[:, :, 0], found[:, :, 1]


def key_plan(bounds: Intervals, keys: int, query_tile: int, key_tile: int) -> KeyPlan:
    """The plan of dK and dV; T and S = `keys` are multiples of the tiles."""
    rows = bounds.a0.shape[0]
    low, high = (
        jnp.stack(ends).reshape(2, rows, -1, query_tile)
        for ends in ((bounds.a0, bounds.b0), (bounds.a1, bounds.b1))
    )
    some = high > low
    begin = jnp.where(some, low, _LAST).min(axis=3)[:, :, None]
    end = jnp.where(some, high, 0).max(axis=3)[:, :, None]
    first = (jnp.arange(keys // key_tile) * key_tile)[:, None]
    middle = first + key_tile // 2
    lower = (begin < middle) & (end > first)
    upper = (begin < first + key_tile) & (end > middle)
    live = lower | upper
    full = live & (low.max(axis=3)[:, :, None] <= first)
    full &= high.min(axis=3)[:, :, None] >= first + key_tile
    # (2, B, J, I) -> (B * J, 2 * I)
    live, full, lower, upper = (
        jnp.moveaxis(x, 0, 2).reshape(rows * x.shape[2], 2 * x.shape[3])
        for x in (live, full, lower, upper)
    )
    key_tiles, tiles = keys // key_tile, live.shape[1] // 2
    masked = live & ~full
    fulls = full.sum(axis=1, keepdims=True)
    # Where an entry goes: entries without a mask first, then the others, each in order.
    outside = live.shape[1] + jnp.arange(live.shape[1])
    place = jnp.where(masked, fulls + jnp.cumsum(masked, axis=1) - 1, outside)
    place = jnp.where(full, jnp.cumsum(full, axis=1) - 1, place)
    part, tile = jnp.divmod(jnp.arange(2 * tiles), tiles)
    # (2, B, I) -> (B * J, 2 * I)
    idle = jnp.moveaxis((~some).any(axis=3), 0, 1).reshape(rows, 1, 2 * tiles)
    idle = jnp.broadcast_to(idle, (rows, key_tiles, 2 * tiles)).reshape(live.shape)
    code = tile << FLAGS | part * OWN | idle * IDLE | lower * FIRST_HALF | upper * SECOND_HALF
    entries = jnp.zeros(live.shape, jnp.int32)
    owner = jnp.arange(live.shape[0])[:, None]
    entries = entries.at[owner, place].set(code.astype(jnp.int32), mode="drop", unique_indices=True)
    row, tile = jnp.divmod(jnp.arange(rows * key_tiles), key_tiles)
    count = live.sum(axis=1)
    columns = jnp.stack([row, tile, fulls[:, 0], count], axis=1).astype(jnp.int32)
    return KeyPlan(_heavy_first(count, columns), _heavy_first(count, entries))


def _heavy_first(work: Int[Array, "P"], table: Int[Array, "P n"]) -> Int[Array, "P n"]:
    """The rows of the table, the most work first, in their order where it is equal.

    By comparing all pairs: for so few rows one kernel instead of the many of a sort.
    """
    number = jnp.arange(work.shape[0])
    before = work[None] > work[:, None]
    before |= (work[None] == work[:, None]) & (number[None] < number[:, None])
    place = before.sum(axis=1)
    return jnp.zeros_like(table).at[place].set(table, unique_indices=True)
