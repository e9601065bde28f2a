"""Zeros where nobody looks: what padding holds, NaN even, must not reach a product."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.intervals import Intervals
from pallas_kernels.merge import EMPTY


def used_keys(bounds: Intervals, keys: int) -> Bool[Array, "B S"]:
    """Which of S = `keys` keys some query sees, in O(T + S)."""
    row = jnp.arange(bounds.a0.shape[0])[:, None]
    reach = jnp.zeros((bounds.a0.shape[0], keys + 1), jnp.int32)
    begins, ends = (jnp.concatenate(x, axis=1) for x in (bounds[::2], bounds[1::2]))
    reach = reach.at[row, begins].max(ends)
    return lax.cummax(reach, axis=1)[:, :keys] > jnp.arange(keys)


def quiet(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bounds: Intervals,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """q, k and v with zeros for queries that see nothing and keys that nobody sees."""
    sees = (bounds.a1 > bounds.a0) | (bounds.b1 > bounds.b0)
    used = used_keys(bounds, k.shape[1])[..., None, None]
    return jnp.where(sees[..., None, None], q, 0), jnp.where(used, k, 0), jnp.where(used, v, 0)


def nothing(
    q: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The answer where there is no query or no key."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros_like(q), jnp.full(q.shape[:3], EMPTY, wide)


def quiet_cotangents(
    lse: Float[Array, "B T N"], d_out: Float[Array, "B T N H"], d_lse: Float[Array, "B T N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """d_out and d_lse with zeros for queries that saw nothing."""
    empty = lse == EMPTY
    return jnp.where(empty[..., None], 0, d_out), jnp.where(empty, 0, d_lse)
