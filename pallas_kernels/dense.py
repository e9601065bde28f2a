"""The reference: attention as one masked softmax. Holds T x S; the others are tested against it."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.intervals import Intervals
from pallas_kernels.merge import EMPTY
from pallas_kernels.quiet import nothing, quiet


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Dense attention under interval masks, accumulated in float32 (float64 if given float64)."""

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """softmax(q k^T / sqrt(H)) v over each query's intervals; with the scores' log-sum-exp.

        N is a multiple of K (grouped queries). A query that sees nothing returns zeros, lse EMPTY.
        """
        if 0 in q.shape or k.shape[1] == 0:
            return nothing(q)
        q, k, v = quiet(q, k, v, intervals)
        batch, length, heads, width = q.shape
        kv_heads = k.shape[2]
        group = heads // kv_heads
        wide = jnp.promote_types(q.dtype, jnp.float32)
        # Groups are folded into the query axis: batched 2-D products are what CPUs do well.
        folded = q.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
        folded = folded.reshape(batch, kv_heads, length * group, width)
        scores = jnp.einsum("bkth,bskh->bkts", folded, k, preferred_element_type=wide)
        scores = scores.reshape(batch, kv_heads, length, group, -1) * width**-0.5
        seen = intervals.mask(k.shape[1])[:, None, :, None, :]
        scores = jnp.where(seen, scores, EMPTY)
        top = scores.max(axis=-1, keepdims=True, initial=EMPTY)
        weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = weights.sum(axis=-1, keepdims=True)
        share = weights / jnp.where(total > 0, total, 1.0)
        share = share.reshape(batch, kv_heads, length * group, -1).astype(v.dtype)
        out = jnp.einsum("bkts,bskh->bkth", share, v, preferred_element_type=wide)
        out = out.reshape(batch, kv_heads, length, group, width)
        # Zeros already; so are, by this, the cotangents of rows that see nothing.
        out = jnp.where(total == 0, 0, out).transpose(0, 2, 1, 3, 4)
        lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), EMPTY)
        lse = lse[..., 0].transpose(0, 2, 1, 3).reshape(batch, length, heads)
        return out.reshape(q.shape).astype(q.dtype), lse

    def prefix_attention(
        self,
        q: Float[Array, "B T N H"],
        cache_k: Float[Array, "L B K S H"],
        cache_v: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """`attention` over one layer of a stacked cache."""
        k, v = (cache[layer].swapaxes(1, 2) for cache in (cache_k, cache_v))
        return self.attention(q, k, v, intervals)
