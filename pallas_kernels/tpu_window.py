"""Attention of a short window over one layer of a stacked cache on a TPU (Pallas, Mosaic).

A row of the batch visits the key tiles of one convex cover, that of all its queries' intervals, so
the work is a list of (row, tile) made by a cumulative sum: no sort, no map of tiles. The grid is
(groups of KV heads, entries), its second bound data. A step reads its tile of several heads at
once: reading the cache is what a window costs, and short copies would not hide a step's overhead.

XLA lays an array out with the least padding, and copies it whole where a kernel wants it otherwise.
On a TPU a cache (L, B, K, S, H) lies row by row if H is a multiple of 128 and S of 8. For other H
slots come last: the kernel then takes tiles (H, slots), and nothing moves. For other S heads come
before head_dim, which no tile of one head can follow: give a cache slots in eights.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.intervals import Intervals
from pallas_kernels.merge import EMPTY
from pallas_kernels.padding import pad
from pallas_kernels.quiet import nothing
from pallas_kernels.tpu_grid import LANES, LOG2E, dot, lane_sums, wide

_QUERIES = 256
# A 16-bit tile of the chip: queries of padding see nothing.
_SUBLANES = 16
# Queries times heads of a group times bytes of a number, at head_dim 128.
_ROW_BYTES = 4096
_LAST = jnp.iinfo(jnp.int32).max

# Below the running maximum of no keys: a weight of zero, with neither NaN nor a second mask.
_MASKED = 2 * EMPTY

# Bytes of keys that one step copies, and rows of queries whose scores live at once.
_COPY = 1 << 20
_ROWS = 256


class Cover(NamedTuple):
    """Per row of the batch, what its queries see in common and together; all fields are (B,).

    first, past: key tiles to visit, one at least. low, high: first and past-the-last key that any
    query sees. every_low, every_high: keys that each query sees by its clean interval.
    """

    first: Int[Array, "B"]
    past: Int[Array, "B"]
    low: Int[Array, "B"]
    high: Int[Array, "B"]
    every_low: Int[Array, "B"]
    every_high: Int[Array, "B"]


def cover(bounds: Intervals, key_tile: int) -> Cover:
    """The convex cover of each row's intervals, in keys and in key tiles."""
    low = jnp.concatenate([bounds.a0, bounds.b0], axis=1)
    high = jnp.concatenate([bounds.a1, bounds.b1], axis=1)
    some = high > low
    high = jnp.where(some, high, 0).max(axis=1)
    low = jnp.minimum(jnp.where(some, low, _LAST).min(axis=1), high)
    first = low // key_tile
    past = jnp.maximum(-(-high // key_tile), first + 1)
    return Cover(first, past, low, high, bounds.a0.max(axis=1), bounds.a1.min(axis=1))


def window_attention(
    q: Float[Array, "B T N H"],
    cache_k: Float[Array, "L B K S H"],
    cache_v: Float[Array, "L B K S H"],
    layer: Int[Array, ""],
    intervals: Intervals,
    *,
    key_tile: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`Dense.prefix_attention` for a window of up to 256 queries, forward only.

    key_tile: slots read per step, a multiple of 128 (of 8 if interpreted). Tiles outside of the
    cover of a row's intervals are not read, and what lies there, NaN even, has no influence; no
    layer of the cache is ever copied. Raises NotImplementedError for more queries and for float16.
    """
    batch, length, heads, width = q.shape
    kv_heads, slots = cache_k.shape[2:4]
    if length > _QUERIES:
        raise NotImplementedError(
            f"the TPU window kernel holds all queries at once: up to {_QUERIES}, not {length}; "
            "use Blockwise()"
        )
    if jnp.float16 in (q.dtype, cache_k.dtype, cache_v.dtype):
        raise NotImplementedError("TPUs have no float16; use bfloat16, or Blockwise()")
    step = 8 if interpret else LANES
    if key_tile < 1 or key_tile % step:
        raise ValueError(f"key_tile={key_tile} must be a multiple of {step}; type key_tile=512")
    if 0 in q.shape or slots == 0:
        return nothing(q)
    group, tile = heads // kv_heads, min(key_tile, slots)
    if group * length * q.dtype.itemsize > _ROW_BYTES:
        raise NotImplementedError(
            f"the TPU window kernel holds all queries at once: {length} of {group} heads a group "
            f"are too many in {q.dtype}; use Blockwise()"
        )
    # The heads of a group stand side by side as queries.
    folded = pad(q.swapaxes(1, 2).reshape(batch, kv_heads, group * length, width), 2, _SUBLANES)
    columns = pad(jnp.tile(jnp.stack(intervals, axis=2), (1, group, 1)), 1, _SUBLANES)
    found = cover(intervals, tile)
    out, lse = _call(folded, columns, cache_k, cache_v, layer, found, interpret, tile)

    def unfold(x):
        x = x[:, :, : group * length].reshape(batch, heads, length, *x.shape[3:])
        return x.swapaxes(1, 2)

    return unfold(out), unfold(lse)


def _heads_per_step(kv_heads: int, rows: int, head_bytes: int) -> int:
    """As many heads as copies and VMEM should hold, in two groups at least: a v5p has two cores."""
    most = max(1, min(kv_heads // 2, _COPY // head_bytes, 4 * _ROWS // rows))
    return max(n for n in range(1, most + 1) if kv_heads % n == 0)


def _entries(found: Cover, tiles: int) -> tuple[Int[Array, "n"], Int[Array, ""]]:
    """row << 16 | key tile of each visit, rows ascending, and how many visits there are.

    Entries past those name the last row and any tile of it.
    """
    batch = found.first.shape[0]
    if tiles >= 1 << 16 or batch >= 1 << 15:
        raise NotImplementedError(
            f"{batch} rows of {tiles} key tiles do not fit the list's integers; type a larger "
            "key_tile"
        )
    ends = jnp.cumsum(found.past - found.first)
    entry = jnp.arange(batch * tiles)
    row = jnp.minimum((entry[:, None] >= ends).sum(axis=1), batch - 1)
    tile = jnp.minimum(entry + (found.past - ends)[row], tiles - 1)
    return row << 16 | tile, ends[-1]


def _call(q, columns, cache_k, cache_v, layer, found: Cover, interpret, tile: int):
    batch, kv_heads, rows, width = q.shape
    slots = cache_k.shape[3]
    heads = _heads_per_step(kv_heads, rows, tile * width * cache_k.dtype.itemsize)
    entries, count = _entries(found, -(-slots // tile))

    def own(*block):
        """A block of these sizes of the entry's row, its heads chosen by the first grid axis."""

        def at(part, i, entries, scalars):
            return entries[i] >> 16, part, *[0] * (len(block) - 1)

        return pl.BlockSpec((None, *block), at)

    def keys(part, i, entries, scalars):
        place = entries[i] & 0xFFFF, 0
        return scalars[0], entries[i] >> 16, part, *(place[::-1] if turned else place)

    turned = width % LANES != 0
    if turned:
        cache_k, cache_v = cache_k.swapaxes(3, 4), cache_v.swapaxes(3, 4)
        stacked = pl.BlockSpec((None, None, heads, width, tile), keys)
    else:
        stacked = pl.BlockSpec((None, None, heads, tile, width), keys)
    bounds = pl.BlockSpec((None, rows, 4), lambda _, i, entries, __: (entries[i] >> 16, 0, 0))
    statistic = pltpu.VMEM((heads, rows, LANES), jnp.float32)
    out, lse = pl.pallas_call(
        partial(_kernel, width**-0.5 * LOG2E, batch, int(turned)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(kv_heads // heads, count),
            in_specs=[bounds, own(heads, rows, width), stacked, stacked],
            out_specs=[own(heads, rows, width), own(heads, 1, rows)],
            scratch_shapes=[
                pltpu.VMEM((heads, rows, width), jnp.float32),
                statistic,
                statistic,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="window_attention",
    )(entries, jnp.concatenate([layer.reshape(1), *found]), columns, q, cache_k, cache_v)
    return out, lse[:, :, 0]


def _kernel(scale, batch, turned, entries, scalars, bounds, q, k, v, out, lse, sum_out, top, total):
    """One tile of keys of some heads under all queries of a row; slots lie along axis `turned`."""
    entry = entries[pl.program_id(1)]
    row, key_tile = entry >> 16, entry & 0xFFFF
    found = Cover(*(scalars[1 + field * batch + row] for field in range(len(Cover._fields))))
    heads, rows, width = q.shape
    size = k.shape[1 + turned]
    begin = key_tile * size
    chunks = [
        (head, slice(at, min(at + _ROWS, rows)))
        for head in range(heads)
        for at in range(0, rows, _ROWS)
    ]

    @pl.when(key_tile == found.first)
    def _():
        sum_out[...] = jnp.zeros_like(sum_out)
        top[...] = jnp.full_like(top, EMPTY)
        total[...] = jnp.zeros_like(total)

    def step(masked: bool):
        for head, some in chunks:
            keys, values = k[head], v[head]
            scores = dot(q[head, some], keys, 1, 1 - turned) * scale
            if masked:
                key = begin + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                a0, a1, b0, b1 = (bounds[some, n : n + 1] for n in range(4))
                seen = ((key >= a0) & (key < a1)) | ((key >= b0) & (key < b1))
                scores = jnp.where(seen, scores, _MASKED)
                # A weight of zero does not silence what an unfilled slot may hold.
                slot = begin + lax.broadcasted_iota(jnp.int32, values.shape, turned)
                values = jnp.where((slot >= found.low) & (slot < found.high), values, 0)
            # All lanes of a statistic hold the same: it is never broadcast again.
            before = top[head, some]
            now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.exp2(scores - wide(now, size))
            shrink = jnp.exp2(before - now)
            top[head, some] = now
            total[head, some] = total[head, some] * shrink + lane_sums(weights)
            part = dot(weights.astype(values.dtype), values, 1, turned)
            sum_out[head, some] = sum_out[head, some] * wide(shrink, width) + part

    full = (begin >= found.every_low) & (begin + size <= found.every_high)
    pl.when(full)(lambda: step(False))
    pl.when(jnp.logical_not(full))(lambda: step(True))

    @pl.when(key_tile == found.past - 1)
    def _():
        for head, some in chunks:
            sums = jnp.broadcast_to(
                total[head, some].sum(axis=1, keepdims=True), (some.stop - some.start, LANES)
            )
            none = sums == 0
            safe = jnp.where(none, 1.0, sums)
            out[head, some] = (sum_out[head, some] / wide(safe, width)).astype(out.dtype)
            log = jnp.where(none, EMPTY, (top[head, some] + jnp.log2(safe)) / LOG2E)
            lse[head, :, some] = log.T[:1]
