"""The TPU implementation: Pallas kernels that Mosaic compiles, behind the common two functions."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import tpu_training
from pallas_kernels.intervals import Intervals
from pallas_kernels.merge import EMPTY
from pallas_kernels.quiet import quiet
from pallas_kernels.tiles import tile_list, tile_map


@dataclass(frozen=True, kw_only=True)
class Mosaic:
    """Block-sparse attention on a TPU. Tile sizes are in tokens, of queries and of keys.

    `interpret` runs the kernels' Python on any machine, slowly: for tests.
    """

    query_tile: int = 512
    key_tile: int = 512
    interpret: bool | pltpu.InterpretParams = False

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """As `Dense.attention`; bfloat16 and float32, float16 by way of float32."""
        if q.dtype == jnp.float16:
            out, lse = self.attention(*(x.astype(jnp.float32) for x in (q, k, v)), intervals)
            return out.astype(q.dtype), lse
        return _attention(self, *quiet(q, k, v, intervals), intervals)


def _sizes(impl: Mosaic, queries: int, keys: int) -> tpu_training.Sizes:
    """The tiles, no longer than the rows need; a tile as long as its row may have any length."""
    query, key = (
        min(tile, -(-length // 16) * 16)
        for tile, length in ((impl.query_tile, queries), (impl.key_tile, keys))
    )
    return tpu_training.Sizes(query, key, impl.interpret)


def _pad(x: Array, tile: int, axis: int = 1) -> Array:
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % tile)
    return jnp.pad(x, width)


def _heads_first(x: Array, tile: int) -> Array:
    """(B, S, K, H) -> (B, K, S, H), padded to whole tiles."""
    return _pad(x, tile).swapaxes(1, 2)


def _grouped(x: Array, kv_heads: int, tile: int) -> Array:
    """(B, T, N, ...) -> (B, K, G, T, ...), padded to whole tiles."""
    x = _pad(x, tile)
    x = x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _ungrouped(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :length]


def _rows_of_eight(rows: list[Array], axis: int) -> Array:
    """Arrays stacked or joined along `axis`, padded with zeros to a multiple of eight."""
    return _pad(jnp.concatenate(rows, axis=axis), 8, axis)


def _prepare(sizes, k, bounds: Intervals):
    """Padded bounds: those the tile lists need and those the kernels read."""
    padded = Intervals(*(_pad(x, sizes.query) for x in bounds))
    tiles = tile_map(padded, k.shape[1], sizes.query, sizes.key)
    ends = (padded.a0, padded.b0), (padded.a1, padded.b1)
    return tiles, _rows_of_eight([jnp.stack(x, axis=1)[:, :, None] for x in ends], 2)


def _forward(impl: Mosaic, q, k, v, bounds: Intervals):
    sizes = _sizes(impl, q.shape[1], k.shape[1])
    tiles, rows = _prepare(sizes, k, bounds)
    out, lse = tpu_training.forward(
        sizes,
        tile_list(tiles),
        rows,
        _grouped(q, k.shape[2], sizes.query),
        _heads_first(k, sizes.key),
        _heads_first(v, sizes.key),
    )
    return _ungrouped(out, q.shape[1]), _ungrouped(lse, q.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(impl, q, k, v, bounds):
    if k.shape[1] == 0:
        return jnp.zeros_like(q), jnp.full(q.shape[:3], EMPTY, jnp.float32)
    return _forward(impl, q, k, v, bounds)


def _attention_fwd(impl, q, k, v, bounds):
    out, lse = _attention(impl, q, k, v, bounds)
    return (out, lse), (q, k, v, bounds, out, lse)


def _attention_bwd(impl, residuals, cotangents):
    """With P = exp(S - lse): dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dlse), dQ = dS K,
    dK = dS^T Q; each kernel computes P again.
    """
    q, k, v, bounds, out, lse = residuals
    if k.shape[1] == 0:
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), None
    d_out, d_lse = cotangents
    sizes = _sizes(impl, q.shape[1], k.shape[1])
    tiles, rows = _prepare(sizes, k, bounds)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - d_lse
    arguments = (
        rows,
        _grouped(q, k.shape[2], sizes.query),
        _heads_first(k, sizes.key),
        _heads_first(v, sizes.key),
        _grouped(d_out, k.shape[2], sizes.query),
        _rows_of_eight([_grouped(x, k.shape[2], sizes.query) for x in (lse, delta)], 2),
    )
    d_q = tpu_training.backward_queries(sizes, tile_list(tiles), *arguments)
    d_k, d_v = tpu_training.backward_keys(sizes, tile_list(tiles, by_keys=True), *arguments)
    d_k, d_v = (x.swapaxes(1, 2)[:, : k.shape[1]] for x in (d_k, d_v))
    return _ungrouped(d_q, q.shape[1]), d_k, d_v, None


_attention.defvjp(_attention_fwd, _attention_bwd)
