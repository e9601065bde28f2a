"""A stack of all layers' weights as weights of each layer, and their gradients back in a stack.

XLA copies slices of a stack before products read them, and stacks gradients in one kernel with an
operand for every layer, at a third of the bandwidth. Here a slice is cast where it is taken, and
every gradient is written to its place.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from bdjax.sharding import has_mesh


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstacked(stack: Float[Array, "L *s"], dtype: DTypeLike) -> tuple[Float[Array, "*s"], ...]:
    """The L slices in `dtype`; gradients are collected in it too."""
    cut = (lax.index_in_dim(stack, n, keepdims=False) for n in range(stack.shape[0]))
    # Without barriers every product would cast for itself.
    return tuple(lax.optimization_barrier(part.astype(dtype)) for part in cut)


def _fwd(stack, dtype):
    return unstacked(stack, dtype), jnp.empty(0, stack.dtype)


def _bwd(dtype, like, grads):
    first = grads[0]
    spec = jax.sharding.PartitionSpec(None, *jax.typeof(first).sharding.spec)
    placed = {"out_sharding": spec} if has_mesh() else {}
    stack = lax.empty((len(grads), *first.shape), dtype, **placed)
    for n, grad in enumerate(grads):
        stack = lax.dynamic_update_index_in_dim(stack, grad, n, 0)
    return (lax.optimization_barrier(stack).astype(like.dtype),)


unstacked.defvjp(_fwd, _bwd)
