"""The implementation for Hopper GPUs: Pallas kernels of Mosaic, behind the common two functions."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu_window import window_attention
from pallas_kernels.hopper_backward import backward_keys, backward_queries
from pallas_kernels.hopper_forward import ROWS, TILE, Sizes, forward
from pallas_kernels.hopper_product import BLOCKS
from pallas_kernels.hopper_tiles import MOST_KEYS, key_plan, query_plan, shares_of
from pallas_kernels.intervals import Intervals
from pallas_kernels.kept import kept
from pallas_kernels.padding import pad
from pallas_kernels.quiet import nothing


@dataclass(frozen=True, kw_only=True)
class Hopper:
    """Block-sparse attention on an H100 or H200, accumulated in float32; bfloat16 and float16.

    Tiles of 128 tokens; how many of them are in flight in the forward pass, in that for dQ and (of
    64 queries) in that for dK and dV.
    """

    forward_stages: int = 2
    queries_stages: int = 2
    keys_stages: int = 2

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """As `Dense.attention`.

        Raises NotImplementedError for other types, head_dim above 128 and more than `MOST_KEYS`.
        """
        if q.dtype not in (jnp.bfloat16, jnp.float16) or {k.dtype, v.dtype} != {q.dtype}:
            raise NotImplementedError(
                "the Hopper kernels take queries, keys and values of one type, bfloat16 or "
                f"float16, not {q.dtype}, {k.dtype} and {v.dtype}; use Blockwise()"
            )
        if q.shape[3] > 128:
            raise NotImplementedError(
                f"the Hopper kernels take head_dim up to 128, not {q.shape[3]}; use Cudnn()"
            )
        if k.shape[1] > MOST_KEYS:
            raise NotImplementedError(
                f"the Hopper kernels take up to {MOST_KEYS} keys a row, not {k.shape[1]}; use "
                "Blockwise()"
            )
        return _attention(self, q, k, v, intervals)

    def prefix_attention(
        self,
        q: Float[Array, "B T N H"],
        cache_k: Float[Array, "L B K S H"],
        cache_v: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """`attention` over one layer of a stacked cache, forward only, for a short window.

        Raises NotImplementedError for what `gpu_window.window_attention` does not serve.
        """
        return window_attention(q, cache_k, cache_v, layer, intervals)


def _tiled(x: Array, length: int) -> Array:
    """(B, T, N, H) with whole tiles of tokens, and the width of a product."""
    return pad(pad(x, 1, length), 3, 64)


def _padded(bounds: Intervals) -> Intervals:
    return Intervals(*(pad(x, 1, TILE) for x in bounds))


def _sizes(impl: Hopper, width: int) -> tuple[Sizes, Sizes, Sizes]:
    """Of the forward pass, of dQ, of dK and dV."""
    return (
        Sizes(impl.forward_stages, width),
        Sizes(impl.queries_stages, width),
        Sizes(impl.keys_stages, width),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(impl: Hopper, q, k, v, bounds: Intervals):
    return _attention_fwd(impl, q, k, v, bounds)[0]


def _attention_fwd(impl, q, k, v, bounds):
    queries, width = q.shape[1], q.shape[3]
    if 0 in (*q.shape[:2], k.shape[1]):
        return nothing(q), (q, k, v, bounds, None, *nothing(q))
    sizes, _, _ = _sizes(impl, width)
    padded, k_tiles = _padded(bounds), _tiled(k, TILE)
    plan = query_plan(padded, k_tiles.shape[1], TILE, TILE)
    shares = shares_of(plan, q.shape[2], BLOCKS)
    ends = jnp.stack(padded, axis=1)
    out, lse = forward(sizes, plan, shares, _tiled(q, TILE), k_tiles, _tiled(v, TILE), ends)
    out, lse = kept((out[:, :queries, :, :width], lse[:, :, :queries]))
    return (out, lse.swapaxes(1, 2)), (q, k, v, bounds, plan, out, lse)


def _attention_bwd(impl, residuals, cotangents):
    q, k, v, bounds, plan, out, lse = residuals
    (queries, width), keys = (q.shape[1], q.shape[3]), k.shape[1]
    if 0 in (*q.shape[:2], keys):
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), None
    d_out, d_lse = cotangents
    _, by_queries, by_keys = _sizes(impl, width)
    padded = _padded(bounds)
    ends = jnp.stack(padded, axis=1)
    q, d_out = _tiled(q, TILE), _tiled(d_out, TILE)
    k, v = _tiled(k, TILE), _tiled(v, TILE)
    lse, d_lse = (pad(x, 2, TILE) for x in (lse, d_lse.swapaxes(1, 2)))
    d_q, stats = backward_queries(
        by_queries, plan, q, k, v, _tiled(out, TILE), d_out, lse, d_lse, ends
    )
    by_key_tiles = key_plan(padded, k.shape[1], ROWS, TILE)
    d_k, d_v = backward_keys(by_keys, by_key_tiles, q, k, v, d_out, stats, ends)
    d_k, d_v = (x[:, :keys, :, :width] for x in (d_k, d_v))
    return d_q[:, :queries, :, :width], d_k, d_v, None


_attention.defvjp(_attention_fwd, _attention_bwd)
