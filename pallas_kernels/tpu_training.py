"""Two-stream attention for TPUs (Pallas, Mosaic): forward, dQ, and dK with dV, over live tiles.

Each kernel is a grid (KV heads, entries of a tile list) whose second bound is data: the entries say
which tiles are copied in, by scalar prefetch, so a tile that nobody sees costs nothing and the next
copy runs while one pair is computed. Entries of one owner follow each other and add up in VMEM; no
two grid points write the same tile unless they do so in order, so results repeat bit by bit.

Layout: heads first, q (B, K, G, T, H) with the G query heads of a KV head together, so that a key
tile is read once for all of them. T and S are multiples of the tiles. Scores are in base 2.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.merge import EMPTY
from pallas_kernels.tiles import FIRST, FULL, LAST, OWN, TileList

_LOG2E = 1.4426950408889634
# Below the running maximum of no keys: a weight of zero, with neither NaN nor a second mask.
_MASKED = 2 * EMPTY
_LANES = 128


class Sizes(NamedTuple):
    """Tiles in tokens; `interpret`: False, or how to run on another machine."""

    query: int
    key: int
    interpret: bool | pltpu.InterpretParams
    vmem: int | None = None


def forward(
    sizes: Sizes,
    tiles: TileList,
    bounds: Int[Array, "B 2 8 T"],
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
    """Output in q's type and log-sum-exp in float32; `bounds`: first and past-the-last
    key of the clean (0) and the own noisy interval (1), in rows padded to eight.
    """
    _, _, group, _, width = q.shape
    of_query, of_key, of_rows, of_bounds = _specs(sizes, group, width, owner="query")
    stats = pltpu.VMEM((group, sizes.query, _LANES), jnp.float32)
    return _call(
        partial(_forward_kernel, width**-0.5 * _LOG2E),
        sizes,
        tiles,
        in_specs=[of_bounds, of_query, of_key, of_key],
        out_specs=[of_query, of_rows],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:4], jnp.float32),
        ],
        scratch=[
            pltpu.VMEM((group, sizes.query, width), jnp.float32),
            stats,
            stats,
            pltpu.VMEM((2, sizes.query, 8), jnp.int32),
        ],
        name="two_stream_forward",
    )(bounds, q, k, v)


def backward_queries(
    sizes: Sizes,
    tiles: TileList,
    bounds: Int[Array, "B 2 8 T"],
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    d_out: Float[Array, "B K G T H"],
    stats: Float[Array, "B K R T"],
) -> Float[Array, "B K G T H"]:
    """dQ. `stats`: rows lse of each head, then delta of each head, then padding to eights."""
    _, _, group, _, width = q.shape
    of_query, of_key, _, of_bounds = _specs(sizes, group, width, owner="query")
    rows = stats.shape[2]
    of_stats = _rows_spec(sizes, rows, owner="query")
    (d_q,) = _call(
        partial(_query_kernel, width**-0.5),
        sizes,
        tiles,
        in_specs=[of_bounds, of_query, of_key, of_key, of_query, of_stats],
        out_specs=[of_query],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[
            pltpu.VMEM((group, sizes.query, width), jnp.float32),
            pltpu.VMEM((2, sizes.query, 8), jnp.int32),
            pltpu.VMEM((sizes.query, rows), jnp.float32),
        ],
        name="two_stream_backward_queries",
    )(bounds, q, k, v, d_out, stats)
    return d_q


def backward_keys(
    sizes: Sizes,
    tiles: TileList,
    bounds: Int[Array, "B 2 8 T"],
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    d_out: Float[Array, "B K G T H"],
    stats: Float[Array, "B K R T"],
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """dK and dV; `tiles` are owned by key tiles."""
    _, _, group, _, width = q.shape
    of_query, of_key, _, of_bounds = _specs(sizes, group, width, owner="key")
    of_stats = _rows_spec(sizes, stats.shape[2], owner="key")
    total = pltpu.VMEM((sizes.key, width), jnp.float32)
    d_k, d_v = _call(
        partial(_key_kernel, width**-0.5),
        sizes,
        tiles,
        in_specs=[of_bounds, of_query, of_key, of_key, of_query, of_stats],
        out_specs=[of_key, of_key],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch=[total, total],
        name="two_stream_backward_keys",
    )(bounds, q, k, v, d_out, stats)
    return d_k, d_v


def _call(kernel, sizes: Sizes, tiles: TileList, *, in_specs, out_specs, out_shape, scratch, name):
    """The kernel over (KV heads, entries), called with everything but the tile list."""

    def run(bounds, q, *others):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(q.shape[1], tiles.count),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem
            ),
            interpret=sizes.interpret,
            name=name,
        )(tiles.pair, tiles.row, bounds, q, *others)

    return run


def _specs(sizes: Sizes, group: int, width: int, owner: str):
    """Block specs of queries, keys, per-query rows and bounds."""

    def query(head, i, pair, row):
        return row[i] >> 4, head, 0, _tile(pair[i], owner == "query"), 0

    def key(head, i, pair, row):
        return row[i] >> 4, head, _tile(pair[i], owner == "key"), 0

    def bounds(head, i, pair, row):
        return row[i] >> 4, 0, 0, _tile(pair[i], owner == "query")

    return (
        pl.BlockSpec((None, None, group, sizes.query, width), query),
        pl.BlockSpec((None, None, sizes.key, width), key),
        _rows_spec(sizes, group, owner),
        pl.BlockSpec((None, 2, 8, sizes.query), bounds),
    )


def _rows_spec(sizes: Sizes, rows: int, owner: str):
    def per_query(head, i, pair, row):
        return row[i] >> 4, head, 0, _tile(pair[i], owner == "query")

    return pl.BlockSpec((None, None, rows, sizes.query), per_query)


def _tile(pair, is_owner: bool):
    return pair >> 16 if is_owner else pair & 0xFFFF


def _entry(pair_ref, row_ref, owner: str):
    """Flags of this entry and the number of its key tile."""
    i = pl.program_id(1)
    return row_ref[i], _tile(pair_ref[i], owner == "key")


def _dot(x, y, x_axis: int, y_axis: int):
    """Product of two matrices over the given axes, in float32."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _interval(flags):
    """Which interval an entry is about: 0 the clean one, 1 the own noisy one."""
    return jnp.where(flags & OWN != 0, 1, 0)


def _sees(bounds, first, shape, axis: int):
    """Whether keys `first`, `first` + 1, ... along `axis` lie in the queries' intervals."""
    key = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    low, high = bounds
    return (key >= low) & (key < high)


def _masked_or_not(flags, step):
    """Runs `step(masked)` as the entry says: a full pair needs no mask."""

    @pl.when(flags & FULL != 0)
    def _():
        step(False)

    @pl.when(flags & FULL == 0)
    def _():
        step(True)


def _wide(x, width: int):
    """(rows, lanes) with all lanes alike as (rows, width)."""
    return jnp.concatenate([x] * -(-width // _LANES), axis=1)[:, :width]


def _lane_sums(x):
    """(rows, n) -> (rows, lanes) with the same sum in each row."""
    if x.shape[1] % _LANES:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _LANES)))
    return sum(x[:, c : c + _LANES] for c in range(0, x.shape[1], _LANES))


def _forward_kernel(scale, pair, row, bounds, q, k, v, out, lse, total_out, top, total, columns):
    flags, key_tile = _entry(pair, row, "query")
    group = q.shape[0]

    @pl.when(flags & FIRST != 0)
    def _():
        total_out[...] = jnp.zeros_like(total_out)
        top[...] = jnp.full_like(top, EMPTY)
        total[...] = jnp.zeros_like(total)
        for part in range(2):
            columns[part] = bounds[part].T

    def step(masked: bool):
        keys, values = k[...], v[...]
        if masked:
            own = columns[_interval(flags)]
            shape = own.shape[0], keys.shape[0]
            seen = _sees((own[:, :1], own[:, 1:2]), key_tile * shape[1], shape, 1)
        for g in range(group):
            scores = _dot(q[g], keys, 1, 1) * scale
            if masked:
                scores = jnp.where(seen, scores, _MASKED)
            # All lanes of a row hold the same: what stands once per row is never broadcast again.
            before = top[g]
            now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.exp2(scores - _wide(now, scores.shape[1]))
            shrink = jnp.exp2(before - now)
            top[g] = now
            total[g] = total[g] * shrink + _lane_sums(weights)
            part = _dot(weights.astype(values.dtype), values, 1, 0)
            total_out[g] = total_out[g] * _wide(shrink, part.shape[1]) + part

    _masked_or_not(flags, step)

    @pl.when(flags & LAST != 0)
    def _():
        for g in range(group):
            sums = jnp.broadcast_to(total[g].sum(axis=1, keepdims=True), total.shape[1:])
            some = sums > 0
            safe = jnp.where(some, sums, 1.0)
            out[g] = (total_out[g] / _wide(safe, out.shape[2])).astype(out.dtype)
            found = jnp.where(some, (top[g] + jnp.log2(safe)) / _LOG2E, EMPTY)
            lse[g : g + 1, :] = found.T[:1]


def _query_kernel(scale, pair, row, bounds, q, k, v, d_out, stats, d_q, total, columns, per_query):
    flags, key_tile = _entry(pair, row, "query")
    group = q.shape[0]

    @pl.when(flags & FIRST != 0)
    def _():
        total[...] = jnp.zeros_like(total)
        for part in range(2):
            columns[part] = bounds[part].T
        per_query[...] = stats[...].T

    def step(masked: bool):
        keys, values = k[...], v[...]
        if masked:
            own = columns[_interval(flags)]
            shape = own.shape[0], keys.shape[0]
            seen = _sees((own[:, :1], own[:, 1:2]), key_tile * shape[1], shape, 1)
        for g in range(group):
            lse = per_query[:, g : g + 1] * _LOG2E
            delta = per_query[:, group + g : group + g + 1]
            weights = jnp.exp2(_dot(q[g], keys, 1, 1) * (scale * _LOG2E) - lse)
            if masked:
                weights = jnp.where(seen, weights, 0.0)
            d_scores = weights * (_dot(d_out[g], values, 1, 1) - delta)
            total[g] += _dot(d_scores.astype(keys.dtype), keys, 1, 0)

    _masked_or_not(flags, step)

    @pl.when(flags & LAST != 0)
    def _():
        d_q[...] = (total[...] * scale).astype(d_q.dtype)


def _key_kernel(scale, pair, row, bounds, q, k, v, d_out, stats, d_k, d_v, total_k, total_v):
    """Scores stand transposed here, keys by queries: what belongs to a query is a row."""
    flags, key_tile = _entry(pair, row, "key")
    group = q.shape[0]

    @pl.when(flags & FIRST != 0)
    def _():
        total_k[...] = jnp.zeros_like(total_k)
        total_v[...] = jnp.zeros_like(total_v)

    def step(masked: bool):
        keys, values = k[...], v[...]
        if masked:
            own = bounds[_interval(flags)]
            shape = keys.shape[0], own.shape[1]
            seen = _sees((own[:1], own[1:2]), key_tile * shape[0], shape, 0)
        for g in range(group):
            lse = stats[g : g + 1, :] * _LOG2E
            delta = stats[group + g : group + g + 1, :]
            weights = jnp.exp2(_dot(keys, q[g], 1, 1) * (scale * _LOG2E) - lse)
            if masked:
                weights = jnp.where(seen, weights, 0.0)
            d_outs = d_out[g]
            total_v[...] += _dot(weights.astype(d_outs.dtype), d_outs, 1, 0)
            d_scores = weights * (_dot(values, d_outs, 1, 1) - delta)
            total_k[...] += _dot(d_scores.astype(keys.dtype), q[g], 1, 0)

    _masked_or_not(flags, step)

    @pl.when(flags & LAST != 0)
    def _():
        d_k[...] = (total_k[...] * scale).astype(d_k.dtype)
        d_v[...] = total_v[...].astype(d_v.dtype)
