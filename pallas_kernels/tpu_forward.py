"""Forward attention of training rows on a TPU (Pallas, Mosaic).

The grid is (KV heads, entries of a tile list), its second bound data: entries say which tiles are
copied in, by scalar prefetch, so a tile that nobody sees costs nothing, and the next copy runs
while one pair is computed. Entries of one query tile follow each other; their running maximum, sum
and output stay in VMEM.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.merge import EMPTY
from pallas_kernels.tiles import FIRST, LAST
from pallas_kernels.tpu_grid import (
    LANES,
    LOG2E,
    Sizes,
    Specs,
    Work,
    dot,
    entry,
    interval,
    lane_sums,
    masked_or_not,
    over_tiles,
    sees,
    wide,
)

# Below the running maximum of no keys: a weight of zero, with neither NaN nor a second mask.
_MASKED = 2 * EMPTY


def forward(
    sizes: Sizes,
    work: Work,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
    """Output in q's type and log-sum-exp in float32; S is a multiple of the key tile."""
    group, width = q.shape[2], q.shape[4]
    specs = Specs(sizes, group, width, owner="query")
    stats = pltpu.VMEM((group, sizes.query, LANES), jnp.float32)
    return over_tiles(
        partial(_kernel, width**-0.5 * LOG2E),
        sizes,
        work,
        in_specs=[specs.bounds(), specs.queries(), specs.keys(), specs.keys()],
        out_specs=[specs.queries(), specs.per_query(group)],
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
    )(q, k, v)


def _kernel(scale, pair, row, bounds, q, k, v, out, lse, total_out, top, total, columns):
    flags, key_tile = entry(pair, row, "query")
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
            own = columns[interval(flags)]
            shape = own.shape[0], keys.shape[0]
            seen = sees((own[:, :1], own[:, 1:2]), key_tile * shape[1], shape, 1)
        for g in range(group):
            scores = dot(q[g], keys, 1, 1) * scale
            if masked:
                scores = jnp.where(seen, scores, _MASKED)
            # All lanes of a row hold the same: what stands once per row is never broadcast again.
            before = top[g]
            now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.exp2(scores - wide(now, scores.shape[1]))
            shrink = jnp.exp2(before - now)
            top[g] = now
            total[g] = total[g] * shrink + lane_sums(weights)
            part = dot(weights.astype(values.dtype), values, 1, 0)
            total_out[g] = total_out[g] * wide(shrink, part.shape[1]) + part

    masked_or_not(flags, step)

    @pl.when(flags & LAST != 0)
    def _():
        for g in range(group):
            sums = jnp.broadcast_to(total[g].sum(axis=1, keepdims=True), total.shape[1:])
            some = sums > 0
            safe = jnp.where(some, sums, 1.0)
            out[g] = (total_out[g] / wide(safe, out.shape[2])).astype(out.dtype)
            found = jnp.where(some, (top[g] + jnp.log2(safe)) / LOG2E, EMPTY)
            lse[g : g + 1, :] = found.T[:1]
