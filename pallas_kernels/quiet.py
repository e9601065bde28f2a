"""Zeros where nobody looks: what padding holds, NaN even, must not reach a product."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.intervals import Intervals


def used_keys(bounds: Intervals, keys: int) -> Bool[Array, "B S"]:
    """Which of S = `keys` keys some query sees, in O(T + S)."""
    row = jnp.arange(bounds.a0.shape[0])[:, None]
    reach = jnp.zeros((bounds.a0.shape[0], keys + 1), jnp.int32)
    reach = reach.at[row, bounds.a0].max(bounds.a1).at[row, bounds.b0].max(bounds.b1)
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
