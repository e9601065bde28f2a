"""The TPU implementation: Pallas kernels that Mosaic compiles, behind the common two functions."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.intervals import Intervals
from pallas_kernels.kept import kept
from pallas_kernels.padding import pad
from pallas_kernels.quiet import nothing, quiet, quiet_cotangents
from pallas_kernels.tile_sizes import tile_sizes
from pallas_kernels.tiles import tile_list, tile_map
from pallas_kernels.tpu_backward import backward_keys, backward_queries
from pallas_kernels.tpu_forward import forward
from pallas_kernels.tpu_grid import Sizes, Work
from pallas_kernels.tpu_window import window_attention

# Bytes of a query tile with all heads of a group and of a key tile: more, and VMEM does not hold
# what belongs to them.
_TILE_BYTES = 5 << 18

# Two integers an entry in 1 MiB of scalar memory, of which the compiler wants some.
_ENTRIES = 96 * 1024


@dataclass(frozen=True, kw_only=True)
class Mosaic:
    """Block-sparse attention on a TPU, accumulated in float32. Tile sizes are in tokens.

    query_tile, key_tile: of training rows. window_tile: of cached keys under a window of queries.
    `interpret` runs the kernels' Python on any machine, slowly: for tests.
    """

    query_tile: int = 512
    key_tile: int = 512
    window_tile: int = 1024
    interpret: bool | pltpu.InterpretParams = False

    def __post_init__(self):
        step = 8 if self.interpret else 128
        for name in ("query_tile", "key_tile", "window_tile"):
            size = getattr(self, name)
            if size < 1 or size % step:
                raise ValueError(f"{name}={size} must be a multiple of {step}; type {name}=512")

    @classmethod
    def tuned(cls, kind: str, head_dim: int) -> "Mosaic":
        """With the table's tiles for a chip of this `device_kind`."""
        sizes = tile_sizes(kind, head_dim)
        return cls(query_tile=sizes.query, key_tile=sizes.key, window_tile=sizes.window)

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """As `Dense.attention`; bfloat16 and float32, float16 by way of float32.

        Raises NotImplementedError for more pairs of tiles than a TPU's scalar memory can list.
        """
        if 0 in q.shape or k.shape[1] == 0:
            return nothing(q)
        if q.dtype == jnp.float16:
            out, lse = self.attention(*(x.astype(jnp.float32) for x in (q, k, v)), intervals)
            return out.astype(q.dtype), lse
        return _attention(self, *quiet(q, k, v, intervals), intervals)

    def prefix_attention(
        self,
        q: Float[Array, "B T N H"],
        cache_k: Float[Array, "L B K S H"],
        cache_v: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """`attention` over one layer of a stacked cache, forward only, for a short window.

        No layer of the cache is ever copied, if S is a multiple of eight. Slots between the first
        and the last that a row's queries see must be finite, also where none of them looks. Raises
        NotImplementedError for more queries or heads a group than VMEM holds, for float16, and for
        a cache of another type than the queries.
        """
        if q.dtype != cache_k.dtype:
            raise NotImplementedError(
                f"the TPU window kernel takes queries and cache of one type, not {q.dtype} and "
                f"{cache_k.dtype}; cast the queries"
            )
        return window_attention(
            q,
            cache_k,
            cache_v,
            layer,
            intervals,
            key_tile=self.window_tile,
            interpret=self.interpret,
        )


def _tile(tile: int, length: int) -> int:
    """Two tiles a row at least where that can be: its two streams should not share one."""
    if length <= 128:
        return min(tile, -(-length // 16) * 16)
    return min(tile, -(-length // 256) * 128)


def _heads_first(x: Array, tile: int) -> Array:
    """(B, S, K, H) -> (B, K, S, H), padded to whole tiles."""
    return pad(x, 1, tile).swapaxes(1, 2)


def _grouped(x: Array, kv_heads: int, tile: int) -> Array:
    """(B, T, N, ...) -> (B, K, G, T, ...), padded to whole tiles."""
    x = pad(x, 1, tile)
    x = x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _ungrouped(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :length]


def _work(sizes: Sizes, bounds: Intervals, keys: int, by_keys: bool = False) -> Work:
    padded = Intervals(*(pad(x, 1, sizes.query) for x in bounds))
    tiles = tile_map(padded, keys, sizes.query, sizes.key)
    if tiles.live.size > _ENTRIES:
        raise NotImplementedError(
            f"a list of {tiles.live.size} pairs of tiles exceeds a TPU's scalar memory; use larger "
            f"tiles than {sizes.query} x {sizes.key}, or fewer rows a device"
        )
    ends = (padded.a0, padded.b0), (padded.a1, padded.b1)
    rows = jnp.stack([jnp.stack(x, axis=1) for x in ends], axis=2)
    return Work(tile_list(tiles, by_keys), pad(rows, 2, 8))


def _sizes(impl: Mosaic, q, k) -> Sizes:
    """The tiles asked for, or smaller ones where rows are short, groups of heads or heads large.

    By shape and type of q (B, T, N, H) and k (B, S, K, H).
    """
    query, key = _tile(impl.query_tile, q.shape[1]), _tile(impl.key_tile, k.shape[1])
    group, a_head = q.shape[2] // k.shape[2], -(-q.shape[3] // 128) * 128 * q.dtype.itemsize
    while (query * group + key) * a_head > _TILE_BYTES:
        if query > 128:
            query = query // 256 * 128
        elif key > 128:
            key = key // 256 * 128
        else:
            raise NotImplementedError(
                f"{group} heads a group of head_dim {q.shape[3]} in {q.dtype} exceed a TPU's VMEM "
                "in tiles of 128; use Blockwise()"
            )
    return Sizes(query, key, impl.interpret)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(impl: Mosaic, q, k, v, bounds: Intervals):
    sizes = _sizes(impl, q, k)
    out, lse = forward(
        sizes,
        _work(sizes, bounds, k.shape[1]),
        _grouped(q, k.shape[2], sizes.query),
        _heads_first(k, sizes.key),
        _heads_first(v, sizes.key),
    )
    return _ungrouped(out, q.shape[1]), _ungrouped(lse, q.shape[1])


def _attention_fwd(impl, q, k, v, bounds):
    out, lse = kept(_attention(impl, q, k, v, bounds))
    return (out, lse), (q, k, v, bounds, out, lse)


def _attention_bwd(impl, residuals, cotangents):
    """With P = exp(S - lse): dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dlse), dQ = dS K,
    dK = dS^T Q; each kernel computes P again.
    """
    q, k, v, bounds, out, lse = residuals
    keys, kv_heads = k.shape[1:3]
    d_out, d_lse = quiet_cotangents(lse, *cotangents)
    sizes = _sizes(impl, q, k)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - d_lse
    stats = jnp.concatenate([_grouped(x, kv_heads, sizes.query) for x in (lse, delta)], axis=2)
    arguments = (
        _grouped(q, kv_heads, sizes.query),
        _heads_first(k, sizes.key),
        _heads_first(v, sizes.key),
        _grouped(d_out, kv_heads, sizes.query),
        pad(stats, 2, 8),
    )
    d_q = backward_queries(sizes, _work(sizes, bounds, keys), *arguments)
    d_k, d_v = backward_keys(sizes, _work(sizes, bounds, keys, by_keys=True), *arguments)
    d_k, d_v = (x.swapaxes(1, 2)[:, :keys] for x in (d_k, d_v))
    return _ungrouped(d_q, q.shape[1]), d_k, d_v, None


_attention.defvjp(_attention_fwd, _attention_bwd)
