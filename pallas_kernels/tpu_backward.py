"""Backward attention on a TPU (Pallas, Mosaic): dQ over query tiles, dK and dV over key tiles.

Both walk tile lists as the forward pass does and compute the weights again from the log-sum-exp. No
two grid points write the same tile unless one after the other, so results repeat bit by bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tiles import FIRST, LAST
from pallas_kernels.tpu_grid import (
    LOG2E,
    Sizes,
    Specs,
    Work,
    dot,
    entry,
    interval,
    masked_or_not,
    over_tiles,
    sees,
)


def backward_queries(
    sizes: Sizes,
    work: Work,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    d_out: Float[Array, "B K G T H"],
    stats: Float[Array, "B K R T"],
) -> Float[Array, "B K G T H"]:
    """dQ. `stats`: rows lse of each head, then delta of each head, then padding to eights."""
    _, _, group, _, width = q.shape
    specs = Specs(sizes, group, width, owner="query")
    rows = stats.shape[2]
    (d_q,) = over_tiles(
        partial(_query_kernel, width**-0.5),
        sizes,
        work,
        in_specs=_inputs(specs, stats),
        out_specs=[specs.queries()],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[
            pltpu.VMEM((group, sizes.query, width), jnp.float32),
            pltpu.VMEM((2, sizes.query, 8), jnp.int32),
            pltpu.VMEM((sizes.query, rows), jnp.float32),
        ],
        name="two_stream_backward_queries",
    )(q, k, v, d_out, stats)
    return d_q


def backward_keys(
    sizes: Sizes,
    work: Work,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    d_out: Float[Array, "B K G T H"],
    stats: Float[Array, "B K R T"],
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """dK and dV; the list is owned by key tiles."""
    _, _, group, _, width = q.shape
    specs = Specs(sizes, group, width, owner="key")
    total = pltpu.VMEM((sizes.key, width), jnp.float32)
    d_k, d_v = over_tiles(
        partial(_key_kernel, width**-0.5),
        sizes,
        work,
        in_specs=_inputs(specs, stats),
        out_specs=[specs.keys(), specs.keys()],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch=[total, total],
        name="two_stream_backward_keys",
    )(q, k, v, d_out, stats)
    return d_k, d_v


def _inputs(specs: Specs, stats):
    keys, queries = specs.keys(), specs.queries()
    return [specs.bounds(), queries, keys, keys, queries, specs.per_query(stats.shape[2])]


def _query_kernel(scale, pair, row, bounds, q, k, v, d_out, stats, d_q, total, columns, per_query):
    flags, key_tile = entry(pair, row, "query")
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
            own = columns[interval(flags)]
            shape = own.shape[0], keys.shape[0]
            seen = sees((own[:, :1], own[:, 1:2]), key_tile * shape[1], shape, 1)
        for g in range(group):
            lse = per_query[:, g : g + 1] * LOG2E
            delta = per_query[:, group + g : group + g + 1]
            weights = jnp.exp2(dot(q[g], keys, 1, 1) * (scale * LOG2E) - lse)
            if masked:
                weights = jnp.where(seen, weights, 0.0)
            d_scores = weights * (dot(d_out[g], values, 1, 1) - delta)
            total[g] += dot(d_scores.astype(keys.dtype), keys, 1, 0)

    masked_or_not(flags, step)

    @pl.when(flags & LAST != 0)
    def _():
        d_q[...] = (total[...] * scale).astype(d_q.dtype)


def _key_kernel(scale, pair, row, bounds, q, k, v, d_out, stats, d_k, d_v, total_k, total_v):
    """Scores stand transposed here, keys by queries: what belongs to a query is a row."""
    flags, key_tile = entry(pair, row, "key")
    group = q.shape[0]

    @pl.when(flags & FIRST != 0)
    def _():
        total_k[...] = jnp.zeros_like(total_k)
        total_v[...] = jnp.zeros_like(total_v)

    def step(masked: bool):
        keys, values = k[...], v[...]
        if masked:
            own = bounds[interval(flags)]
            shape = keys.shape[0], own.shape[1]
            seen = sees((own[:1], own[1:2]), key_tile * shape[0], shape, 0)
        for g in range(group):
            lse = stats[g : g + 1, :] * LOG2E
            delta = stats[group + g : group + g + 1, :]
            weights = jnp.exp2(dot(keys, q[g], 1, 1) * (scale * LOG2E) - lse)
            if masked:
                weights = jnp.where(seen, weights, 0.0)
            d_outs = d_out[g]
            total_v[...] += dot(weights.astype(d_outs.dtype), d_outs, 1, 0)
            d_scores = weights * (dot(values, d_outs, 1, 1) - delta)
            total_k[...] += dot(d_scores.astype(keys.dtype), q[g], 1, 0)

    masked_or_not(flags, step)

    @pl.when(flags & LAST != 0)
    def _():
        d_k[...] = (total_k[...] * scale).astype(d_k.dtype)
        d_v[...] = total_v[...].astype(d_v.dtype)
