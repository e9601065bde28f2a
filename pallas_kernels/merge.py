"""Two attentions over disjoint key sets are one attention: merge them by log-sum-exp."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Stands for the log-sum-exp of no keys. Finite, so that gradients of empty rows are zero, not NaN.
EMPTY = -1e30


def merge(
    out_1: Float[Array, "B T N H"],
    lse_1: Float[Array, "B T N"],
    out_2: Float[Array, "B T N H"],
    lse_2: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """softmax over the union of the keys: sum_i exp(lse_i - lse) out_i, lse = log sum_i exp lse_i.

    Sums in float32 or wider, returns out in out_1's type. Differentiable in all four arguments.
    """
    top = jnp.maximum(lse_1, lse_2)
    weight_1, weight_2 = jnp.exp(lse_1 - top), jnp.exp(lse_2 - top)
    total = weight_1 + weight_2
    share_1, share_2 = (weight_1 / total)[..., None], (weight_2 / total)[..., None]
    wide = jnp.promote_types(out_1.dtype, jnp.float32)
    out = out_1.astype(wide) * share_1 + out_2.astype(wide) * share_2
    lse = jnp.where(top > EMPTY / 2, top + jnp.log(total), EMPTY)
    return out.astype(out_1.dtype), lse
