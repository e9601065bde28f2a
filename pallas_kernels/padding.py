"""Arrays of whole tiles."""

import jax.numpy as jnp
from jaxtyping import Array


def pad(x: Array, axis: int, multiple: int) -> Array:
    """`x` with zeros behind it along `axis`, up to a multiple of `multiple`; any type."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, width)
