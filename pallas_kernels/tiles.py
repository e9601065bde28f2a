"""Which pairs of query and key tiles a kernel visits: computed on the device from the intervals.

A query tile visits the convex cover of its queries' clean intervals and that of their noisy ones.
The lists that kernels walk hold one entry per visited pair, so a grid over them is as long as the
work. Nothing here is larger than the number of pairs of tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.intervals import Intervals

_LAST = jnp.iinfo(jnp.int32).max


class TileMap(NamedTuple):
    """The maps of query tiles by key tiles: of clean intervals (0) and of own noisy ones (1).

    live: some pair in it may be visible by that interval. full: all are, and no mask is needed.
    """

    live: Bool[Array, "2 B I J"]
    full: Bool[Array, "2 B I J"]


class TileList(NamedTuple):
    """The pairs of tiles to visit, one after the other; entries past `count` are undefined.

    Sorted by row, owner, guest. The owner is the tile whose result a kernel accumulates: the query
    tile in the forward pass and for dQ, the key tile for dK and dV. Every owner appears at least
    once, so every result is written. A pair that both intervals touch stands there twice: an entry
    is about one interval. pair: owner << 16 | guest. row: batch row << 4 | flags.
    """

    pair: Int[Array, "n"]
    row: Int[Array, "n"]
    count: Int[Array, ""]


# Flags of an entry: all of it is visible; the owner's first, its last; by the own noisy interval.
FULL, FIRST, LAST, OWN = 1, 2, 4, 8


def tile_map(bounds: Intervals, keys: int, query_tile: int, key_tile: int) -> TileMap:
    """The tile maps of queries `bounds` (B, T) over `keys` keys; T is a multiple of `query_tile`.

    The keys past the end of the last key tile count as not visible.
    """
    low, high = (
        jnp.stack(ends).reshape(2, bounds.a0.shape[0], -1, query_tile)
        for ends in ((bounds.a0, bounds.b0), (bounds.a1, bounds.b1))
    )
    first = jnp.arange(-(-keys // key_tile)) * key_tile
    some = high > low
    begin = jnp.where(some, low, _LAST).min(axis=3)[..., None]
    end = jnp.where(some, high, 0).max(axis=3)[..., None]
    live = (begin < first + key_tile) & (end > first)
    full = low.max(axis=3)[..., None] <= first
    full &= high.min(axis=3)[..., None] >= first + key_tile
    return TileMap(live, full)


def tile_list(tiles: TileMap, by_keys: bool = False) -> TileList:
    """The visited pairs of a map, owned by query tiles or, `by_keys`, by key tiles.

    Raises NotImplementedError where the numbers of tiles do not fit their fields.
    """
    order = (1, 3, 2, 0) if by_keys else (1, 2, 3, 0)
    live, full = (x.transpose(order) for x in tiles)
    rows, owners, guests, parts = live.shape
    if max(owners, guests) >= 1 << 15 or rows * owners * guests >= 1 << 28:
        raise NotImplementedError(
            f"{rows} rows of {owners} x {guests} tiles are too many for a tile list; "
            "type larger tiles"
        )
    entry = jnp.arange(rows * owners * guests * parts).reshape(live.shape)
    idle = ~live.any(axis=(2, 3), keepdims=True)
    visited = live | (idle & (entry % (guests * parts) == 0))
    # Compaction by one sort: accelerators scatter element by element.
    code = lax.sort(jnp.where(visited, 2 * entry + full, _LAST).reshape(-1))
    full, part, place = code % 2, code // 2 % parts, code // (2 * parts)
    owner, guest = place // guests, place % guests
    edge = jnp.array([-1])
    begins = owner != jnp.concatenate([edge, owner[:-1]])
    ends = owner != jnp.concatenate([owner[1:], edge])
    flags = full * FULL + begins * FIRST + ends * LAST + part * OWN
    pair = ((owner % owners) << 16) | guest
    return TileList(pair, (owner // owners) << 4 | flags, visited.sum())


def pairs(bounds: Intervals) -> Float[Array, ""]:
    """Visible pairs of a query and a key; float32, since long rows overflow an int32."""
    return (bounds.a1 - bounds.a0 + bounds.b1 - bounds.b0).astype(jnp.float32).sum()
