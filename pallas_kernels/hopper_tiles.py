"""Which tiles the Hopper kernels visit, found on the device from the intervals; nothing T x S.

A query tile visits two runs of key tiles, the convex covers of its clean and of its own noisy
intervals, each with a middle part that every query of the tile sees whole. A key tile visits a
list of query tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.intervals import Intervals
from pallas_kernels.quiet import used_keys

_LAST = jnp.iinfo(jnp.int32).max

# Flags of an entry: it is about the own noisy interval; that of some query in the tile is empty;
# some query sees something of the key tile's first half, of its second.
OWN, IDLE, FIRST_HALF, SECOND_HALF = 1, 2, 4, 8
FLAGS = 4


# What a half of a query tile sees is begin << 16 | end, in halves of 64 keys, in a signed number.
MOST_KEYS = 64 << 15


class QueryPlan(NamedTuple):
    """Per query tile, row by row: its row, its number and its two runs of key tiles.

    columns:
        0, 1: row, tile.
        2 to 5, 6 to 9: begin, full begin, full end, end of the clean run, of the own run.
        10: whether the row has unclean tiles.
        11 to 14: what the first half and the second see of the clean run, then of the own one:
            begin << 16 | end in halves of key tiles, 0 for nothing.
        15: nothing; copies are of multiples of 16 bytes.
    used: which keys some query sees.
    unclean: key tiles that hold others.
    order: the places, those with the most key tiles first.
    """

    columns: Int[Array, "P 16"]
    used: Int[Array, "B S"]
    unclean: Int[Array, "B J"]
    order: Int[Array, "P"]


class KeyPlan(NamedTuple):
    """Per key tile, all rows of a batch in turn: which query tiles visit it.

    The first tiles of rows and documents are seen by the most queries, so that the order of the row
    is good enough to start blocks in.

    columns: row, tile, number of entries without a mask, of all. entries: query tile << FLAGS |
    flags; those without a mask come first, those past the number are undefined.
    """

    columns: Int[Array, "P 4"]
    entries: Int[Array, "P n"]


class _Covers(NamedTuple):
    """What groups of queries see: begin and end (0 for nothing) of all of it, the last begin, the
    first end, whether some query sees nothing.
    """

    begin: Int[Array, "2 B I"]
    end: Int[Array, "2 B I"]
    last_begin: Int[Array, "2 B I"]
    first_end: Int[Array, "2 B I"]
    idle: Bool[Array, "2 B I"]


def _covers(bounds: Intervals, size: int) -> _Covers:
    """Of `size` queries each, the clean intervals and the own ones."""
    rows = bounds.a0.shape[0]
    low, high = (jnp.stack(x).reshape(2, rows, -1, size) for x in (bounds[::2], bounds[1::2]))
    some = high > low
    return _Covers(
        jnp.where(some, low, _LAST).min(axis=3),
        jnp.where(some, high, 0).max(axis=3),
        low.max(axis=3),
        high.min(axis=3),
        (~some).any(axis=3),
    )


def query_plan(bounds: Intervals, keys: int, query_tile: int, key_tile: int) -> QueryPlan:
    """The plan of the forward pass and of dQ; T and S = `keys` are multiples of the tiles."""
    halves = _covers(bounds, query_tile // 2)
    half = key_tile // 2
    seen = jnp.where(halves.end > 0, halves.begin // half << 16 | -(-halves.end // half), 0)
    # Of both halves apart: a reduction over an axis of two would be a kernel of its own.
    seen, *pairs = ((x[:, :, 0::2], x[:, :, 1::2]) for x in (seen, *halves[:4]))
    begin, end, last_begin, first_end = (
        function(*pair)
        for function, pair in zip(
            (jnp.minimum, jnp.maximum, jnp.maximum, jnp.minimum), pairs, strict=True
        )
    )
    begin = jnp.where(end > 0, begin // key_tile, 0)
    end = -(-end // key_tile)
    full = jnp.clip(-(-last_begin // key_tile), begin, end)
    full_end = jnp.clip(first_end // key_tile, full, end)
    runs = jnp.stack([begin, full, full_end, end])
    _, _, rows, tiles = runs.shape
    used = used_keys(bounds, keys)
    unclean = ~used.reshape(rows, -1, key_tile).all(axis=2)
    row, tile, some, filler = (
        jnp.broadcast_to(x, (rows, tiles))
        for x in (jnp.arange(rows)[:, None], jnp.arange(tiles), unclean.any(axis=1)[:, None], 0)
    )
    columns = [row, tile, *runs[:, 0], *runs[:, 1], some]
    columns += [part for run in zip(*seen, strict=True) for part in run]
    columns = jnp.stack([*columns, filler], axis=2).reshape(rows * tiles, -1).astype(jnp.int32)
    order = _heavy_first((end - begin).sum(axis=0).reshape(-1))
    return QueryPlan(columns, used.astype(jnp.int32), unclean.astype(jnp.int32), order)


def _heavy_first(work: Int[Array, "P"]) -> Int[Array, "P"]:
    """Their numbers, the most work first, in their order where it is equal.

    By comparing all pairs: for so few one kernel instead of the many of a sort.
    """
    number = jnp.arange(work.shape[0])
    before = work[None] > work[:, None]
    before |= (work[None] == work[:, None]) & (number[None] < number[:, None])
    ranked = before.sum(axis=1)[None] == number[:, None]
    return jnp.where(ranked, number, 0).sum(axis=1)


def shares_of(plan: QueryPlan, heads: int, blocks: int) -> Int[Array, "X R"]:
    """Which items each of `blocks` thread blocks takes: place in the plan * heads + head, in order.

    As many as `rounds_of` says; what follows is undefined. Items are dealt out by work, the most
    first, in rounds that go up and down the blocks: static shares, but even. A block then takes its
    own in the plan's order, so that all of them are near the same keys.
    """
    places = plan.order.shape[0]
    items = places * heads
    blocks = min(blocks, items)
    rounds = -(-items // blocks)
    number, block = jnp.arange(rounds), jnp.arange(blocks)[:, None]
    dealt = number * blocks + jnp.where(number % 2 == 0, block, blocks - 1 - block)
    rank, head = jnp.divmod(dealt, heads)
    item = plan.order[jnp.minimum(rank, places - 1)] * heads + head
    return jnp.sort(jnp.where(dealt < items, item, _LAST), axis=1).astype(jnp.int32)


def rounds_of(block: Array, items: int, blocks: int) -> Array:
    """How many of the items `shares_of` deals to a block: the last round may not reach it."""
    rounds, left = divmod(items, blocks)
    place = block if rounds % 2 == 0 else blocks - 1 - block
    return rounds + (place < left).astype(jnp.int32)


def key_plan(bounds: Intervals, keys: int, query_tile: int, key_tile: int) -> KeyPlan:
    """The plan of dK and dV; T and S = `keys` are multiples of the tiles."""
    rows = bounds.a0.shape[0]
    begin, end, last_begin, first_end, idle = (x[:, :, None] for x in _covers(bounds, query_tile))
    first = (jnp.arange(keys // key_tile) * key_tile)[:, None]
    middle = first + key_tile // 2
    lower = (begin < middle) & (end > first)
    upper = (begin < first + key_tile) & (end > middle)
    live = lower | upper
    full = live & (last_begin <= first) & (first_end >= first + key_tile)
    idle = jnp.broadcast_to(idle, live.shape)
    key_tiles, tiles = live.shape[2:]
    # (2, B, J, I) -> (J * B, 2 * I)
    live, full, lower, upper, idle = (
        x.transpose(2, 1, 0, 3).reshape(key_tiles * rows, 2 * tiles)
        for x in (live, full, lower, upper, idle)
    )
    part, tile = jnp.divmod(jnp.arange(2 * tiles), tiles)
    code = tile << FLAGS | part * OWN | idle * IDLE | lower * FIRST_HALF | upper * SECOND_HALF
    # Those without a mask first, then the others, each in order.
    place = jnp.arange(2 * tiles) + jnp.where(full, 0, jnp.where(live, 2 * tiles, 4 * tiles))
    _, entries = lax.sort((place, code.astype(jnp.int32)), dimension=1, num_keys=1)
    tile, row = jnp.divmod(jnp.arange(rows * key_tiles), rows)
    columns = jnp.stack([row, tile, full.sum(axis=1), live.sum(axis=1)], axis=1)
    return KeyPlan(columns.astype(jnp.int32), entries)
