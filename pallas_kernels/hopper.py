"""The implementation for Hopper GPUs: Pallas kernels that Mosaic compiles, behind the two functions."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import Blockwise
from pallas_kernels.hopper_backward import backward_keys, backward_queries
from pallas_kernels.hopper_forward import LOG2E, ROWS, Sizes, forward
from pallas_kernels.hopper_tiles import key_plan, query_plan
from pallas_kernels.intervals import Intervals
from pallas_kernels.merge import EMPTY
from pallas_kernels.quiet import quiet

# Queries, and keys in the pass for dK and dV, of a thread block: two warpgroups of 64.
_TILE = 2 * ROWS


@dataclass(frozen=True, kw_only=True)
class Hopper:
    """Block-sparse attention on an H100 or H200, accumulated in float32; bfloat16 and float16.

    Each pass has its keys (or queries) per step and steps in flight, as they were measured best.
    """

    forward_keys: int = 128
    forward_stages: int = 2
    queries_keys: int = 128
    queries_stages: int = 2
    keys_stages: int = 3
    tidy: bool = True

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """As `Dense.attention`.

        Raises NotImplementedError for other types, and for head_dim above 128.
        """
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"the Hopper kernels take bfloat16 or float16, not {q.dtype}; use Blockwise()"
            )
        if q.shape[3] > 128:
            raise NotImplementedError(
                f"the Hopper kernels take head_dim up to 128, not {q.shape[3]}; use Cudnn()"
            )
        if self.tidy:
            q, k, v = quiet(q, k, v, intervals)
        return _attention(self, q, k, v, intervals)

    def prefix_attention(
        self,
        q: Float[Array, "B T N H"],
        cache_k: Float[Array, "L B K S H"],
        cache_v: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """That of `Blockwise`."""
        return Blockwise(key_tile=4096).prefix_attention(q, cache_k, cache_v, layer, intervals)


def _pad(x: Array, tile: int, axis: int) -> Array:
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % tile)
    return jnp.pad(x, width)


def _tiled(x: Array, length: int) -> Array:
    """(B, T, N, H) with whole tiles of tokens, and the width of a product."""
    return _pad(_pad(x, length, 1), 64, 3)


def _padded(bounds: Intervals) -> Intervals:
    return Intervals(*(_pad(x, _TILE, 1) for x in bounds))


def _sizes(impl: Hopper, q: Array, k: Array) -> tuple[int, Sizes, Sizes, Sizes]:
    """The keys of a tile that all passes share, and the sizes of the three passes."""
    width = q.shape[3]
    return (
        max(_TILE, impl.forward_keys, impl.queries_keys),
        Sizes(impl.forward_keys, impl.forward_stages, width),
        Sizes(impl.queries_keys, impl.queries_stages, width),
        Sizes(_TILE, impl.keys_stages, width),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(impl: Hopper, q, k, v, bounds: Intervals):
    return _attention_fwd(impl, q, k, v, bounds)[0]


def _attention_fwd(impl, q, k, v, bounds):
    queries, width = q.shape[1], q.shape[3]
    if k.shape[1] == 0 or queries == 0:
        out, lse = jnp.zeros_like(q), jnp.full(q.shape[:3], EMPTY, jnp.float32)
        return (out, lse), (q, k, v, bounds, out, lse)
    whole, sizes, _, _ = _sizes(impl, q, k)
    padded = _padded(bounds)
    out, lse = forward(
        sizes,
        query_plan(padded, _TILE, sizes.key),
        _tiled(q, _TILE),
        _tiled(k, whole),
        _tiled(v, whole),
        jnp.stack(padded, axis=1),
    )
    out, lse = out[:, :queries, :, :width], lse[:, :, :queries].swapaxes(1, 2)
    return (out, lse), (q, k, v, bounds, out, lse)


def _attention_bwd(impl, residuals, cotangents):
    q, k, v, bounds, out, lse = residuals
    (queries, width), keys = (q.shape[1], q.shape[3]), k.shape[1]
    if keys == 0 or queries == 0:
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), None
    d_out, d_lse = cotangents
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - d_lse
    stats = jnp.stack([lse * LOG2E, delta], axis=1)
    whole, _, by_queries, by_keys = _sizes(impl, q, k)
    padded = _padded(bounds)
    arguments = (
        _tiled(q, _TILE),
        _tiled(k, whole),
        _tiled(v, whole),
        _tiled(d_out, _TILE),
        _pad(jnp.moveaxis(stats, 3, 1), _TILE, 3),
        jnp.stack(padded, axis=1),
    )
    d_q = backward_queries(by_queries, query_plan(padded, _TILE, by_queries.key), *arguments)
    plan = key_plan(padded, arguments[1].shape[1], ROWS, _TILE)
    d_k, d_v = backward_keys(by_keys, plan, *arguments)
    d_k, d_v = (x[:, :keys, :, :width] for x in (d_k, d_v))
    return d_q[:, :queries, :, :width], d_k, d_v, None


_attention.defvjp(_attention_fwd, _attention_bwd)
