"""cuDNN's flash attention under the mask as a bias: for short rows on an NVIDIA GPU, in 16 bits.

It computes all T x S pairs and holds one 16-bit number for each, for all heads together. A train
step of configs/tinyshakespeare.py takes 21.6 ms with it and 33.7 ms with `Dense` under full
rematerialisation (H100, jax 0.11.2, 64 rows of 2 x 256, 6 heads of 64, 2026-11-23).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dense import Dense
from pallas_kernels.intervals import Intervals


@dataclass(frozen=True, kw_only=True)
class Cudnn:
    """Masked cuDNN attention, accumulated in float32; head_dim a multiple of 8, T and S even."""

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """As `Dense.attention`, which serves odd lengths, as of a block of one, in its place.

        The log-sum-exp is Dense's own, computed only where it is used. Raises NotImplementedError
        for dtypes and head_dim that cuDNN does not serve.
        """
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"cuDNN attention takes bfloat16 or float16, not {q.dtype}; use Dense()"
            )
        if q.shape[3] % 8:
            raise NotImplementedError(
                f"cuDNN attention takes head_dim in eights, not {q.shape[3]}; use Dense()"
            )
        if q.shape[1] % 2 or k.shape[1] % 2:
            return Dense().attention(q, k, v, intervals)
        seen = intervals.mask(k.shape[1])
        # Zero weight times a NaN in padding would still be a NaN.
        used = seen.any(axis=1)[:, :, None, None]
        k_used, v_used = jnp.where(used, k, 0), jnp.where(used, v, 0)
        out = jax.nn.dot_product_attention(
            q, k_used, v_used, mask=seen[:, None], implementation="cudnn"
        )
        out = jnp.where(seen.any(axis=2)[:, :, None, None], out, 0)
        return out, Dense().attention(q, k_used, v_used, intervals)[1]

    def prefix_attention(
        self,
        q: Float[Array, "B T N H"],
        cache_k: Float[Array, "L B K S H"],
        cache_v: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """`Dense.prefix_attention`: a short window gains nothing from a flash kernel."""
        return Dense().prefix_attention(q, cache_k, cache_v, layer, intervals)
