"""The implementation for Hopper GPUs: Pallas kernels of Mosaic, behind the common two functions."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu_window import window_attention
from pallas_kernels.hopper_backward import backward_keys, backward_queries
from pallas_kernels.hopper_forward import LOG2E, ROWS, TILE, Sizes, forward
from pallas_kernels.hopper_tiles import key_plan, query_plan
from pallas_kernels.intervals import Intervals
from pallas_kernels.kept import kept
from pallas_kernels.padding import pad
from pallas_kernels.quiet import nothing


@dataclass(frozen=True, kw_only=True)
class Hopper:
    """Block-sparse attention on an H100 or H200, accumulated in float32; bfloat16 and float16.

    Tiles of 128 tokens; how many steps are in flight in the forward pass (of 128 keys), in that for
    dQ (of 64) and in that for dK and dV (of 64 queries).
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

        Raises NotImplementedError for other types, and for head_dim above 128.
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
        Sizes(TILE, impl.forward_stages, width),
        Sizes(ROWS, impl.queries_stages, width),
        Sizes(TILE, impl.keys_stages, width),
    )


def query_stats(
    out: Float[Array, "B T N H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_lse: Float[Array, "B T N"],
) -> Float[Array, "B N 2 T"]:
    """What the backward kernels need of a query: its log-sum-exp in base 2, and delta."""
    product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = product.sum(axis=3) - d_lse
    return jnp.stack([lse * LOG2E, delta.swapaxes(1, 2)], axis=2)


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
    out, lse = forward(
        sizes, plan, _tiled(q, TILE), k_tiles, _tiled(v, TILE), jnp.stack(padded, axis=1)
    )
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
    stats = pad(query_stats(out, d_out, lse, d_lse), 3, TILE)
    q, d_out = _tiled(q, TILE), _tiled(d_out, TILE)
    k, v = _tiled(k, TILE), _tiled(v, TILE)
    d_q = backward_queries(by_queries, plan, q, k, v, d_out, stats, ends)
    by_key_tiles = key_plan(padded, k.shape[1], ROWS, TILE)
    d_k, d_v = backward_keys(by_keys, by_key_tiles, q, k, v, d_out, stats, ends)
    d_k, d_v = (x[:, :keys, :, :width] for x in (d_k, d_v))
    return d_q[:, :queries, :, :width], d_k, d_v, None


_attention.defvjp(_attention_fwd, _attention_bwd)
