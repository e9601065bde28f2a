"""What the TPU kernels share: the grid over a tile list, block specs, masks of one interval.

Layout: heads first, q (B, K, G, T, H) with the G query heads of a KV head together, so that a key
tile is read once for all of them; keys (B, K, S, H). Scores are in base 2.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.tiles import FULL, OWN, TileList

LOG2E = 1.4426950408889634
LANES = 128


class Sizes(NamedTuple):
    """Tiles in tokens; `interpret`: False, or how to run on another machine."""

    query: int
    key: int
    interpret: bool | pltpu.InterpretParams


class Work(NamedTuple):
    """What the grid walks. bounds: first and past-the-last key of the clean (0) and the own noisy
    interval (1) of each query, in rows padded to eight; T is a multiple of the query tile.
    """

    tiles: TileList
    bounds: Int[Array, "B 2 8 T"]


def over_tiles(kernel, sizes: Sizes, work: Work, *, in_specs, out_specs, out_shape, scratch, name):
    """The kernel over (KV heads, entries of the list), to be called with its arrays."""

    def run(q, *others):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(q.shape[1], work.tiles.count),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=sizes.interpret,
            name=name,
        )(work.tiles.pair, work.tiles.row, work.bounds, q, *others)

    return run


def tile_of(pair, is_owner: bool):
    """The tile of an entry's owner or of its guest."""
    return pair >> 16 if is_owner else pair & 0xFFFF


class Specs:
    """Block specs of the arrays of a kernel whose owner is the "query" or the "key" tile."""

    def __init__(self, sizes: Sizes, group: int, width: int, owner: str):
        self._sizes, self._group, self._width = sizes, group, width
        self._by_queries = owner == "query"

    def queries(self) -> pl.BlockSpec:
        """(B, K, G, T, H)."""

        def at(head, i, pair, row):
            return row[i] >> 4, head, 0, tile_of(pair[i], self._by_queries), 0

        return pl.BlockSpec((None, None, self._group, self._sizes.query, self._width), at)

    def keys(self) -> pl.BlockSpec:
        """(B, K, S, H)."""

        def at(head, i, pair, row):
            return row[i] >> 4, head, tile_of(pair[i], not self._by_queries), 0

        return pl.BlockSpec((None, None, self._sizes.key, self._width), at)

    def per_query(self, rows: int) -> pl.BlockSpec:
        """(B, K, rows, T)."""

        def at(head, i, pair, row):
            return row[i] >> 4, head, 0, tile_of(pair[i], self._by_queries)

        return pl.BlockSpec((None, None, rows, self._sizes.query), at)

    def bounds(self) -> pl.BlockSpec:
        """(B, 2, 8, T)."""

        def at(head, i, pair, row):
            return row[i] >> 4, 0, 0, tile_of(pair[i], self._by_queries)

        return pl.BlockSpec((None, 2, 8, self._sizes.query), at)


def entry(pair_ref, row_ref, owner: str):
    """Batch row and flags of this grid point's entry, and the number of its key tile."""
    i = pl.program_id(1)
    return row_ref[i], tile_of(pair_ref[i], owner == "key")


def dot(x, y, x_axis: int, y_axis: int):
    """Product of two matrices over the given axes, in float32."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def interval(flags):
    """Which interval an entry is about: 0 the clean one, 1 the own noisy one."""
    return jnp.where(flags & OWN != 0, 1, 0)


def sees(bounds, first, shape, axis: int):
    """Whether keys `first`, `first` + 1, ... along `axis` lie in the queries' intervals."""
    key = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    low, high = bounds
    return (key >= low) & (key < high)


def masked_or_not(flags, step):
    """Runs `step(masked)` as the entry says: a full pair needs no mask."""

    @pl.when(flags & FULL != 0)
    def _():
        step(False)

    @pl.when(flags & FULL == 0)
    def _():
        step(True)


def wide(x, width: int):
    """(rows, lanes) with all lanes alike as (rows, width)."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def lane_sums(x):
    """(rows, n) -> (rows, lanes) with the same sum in each row."""
    if x.shape[1] % LANES:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))
    return sum(x[:, c : c + LANES] for c in range(0, x.shape[1], LANES))
