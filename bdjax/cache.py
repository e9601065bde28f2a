"""Keys and values of the committed prefix: read-only in a forward pass, written once after it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bdjax import sharding
from bdjax.layout import Places
from pallas_kernels import Meta

# Heads before slots: what a kernel reads of one head lies in one piece.
AXES = ("layers", "batch", "kv_heads", "length", "head_dim")
NEW = ("layers", "batch", "length", "kv_heads", "head_dim")


class KeyValues(NamedTuple):
    """Keys (after RoPE) and values of one window, stacked over layers."""

    k: Float[Array, "L N W K H"]
    v: Float[Array, "L N W K H"]


class Cache(NamedTuple):
    """Committed tokens of N rows: slot = absolute position, `length` slots of a row are filled.

    `block` carries each slot's block as data: the mask reads it, never slot // block_size.
    """

    k: Float[Array, "L N K S H"]
    v: Float[Array, "L N K S H"]
    block: Int[Array, "N S"]
    length: Int[Array, "N"]

    @property
    def meta(self) -> Meta:
        """The cache as mask keys: clean, one document, padding past the length."""
        slot = jnp.arange(self.block.shape[1]) + self.block * 0
        filled = (slot < self.length[:, None]).astype(jnp.int32)
        return Meta(self.block * 0, filled, self.block, slot)


def empty(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """A cache of zeros, born sharded."""
    keys = sharding.zeros((layers, rows, kv_heads, slots, head_dim), dtype, *AXES)
    values = sharding.zeros((layers, rows, kv_heads, slots, head_dim), dtype, *AXES)
    block = sharding.zeros((rows, slots), jnp.int32, "batch", "length")
    return Cache(keys, values, block, sharding.zeros((rows,), jnp.int32, "batch"))


def write(cache: Cache, new: KeyValues, places: Places, commit: Bool[Array, "N W"]) -> Cache:
    """The cache with the window's `commit` tokens at their positions; all others are dropped.

    Committed tokens extend the row: its length becomes one past the last position written.
    """
    slots = cache.block.shape[1]
    slot = jnp.where(commit, places.position, slots)

    def put(stack, values, slot):
        # One scatter on the stack as it lies: a vmap over rows would transpose, and so copy, it.
        row = jnp.arange(slot.shape[0])[:, None]
        return stack.at[:, row, :, slot].set(jnp.moveaxis(values, 0, 2), mode="drop")

    put = sharding.per_shard(put, (AXES, NEW, ("batch", "length")), AXES)
    block = jax.vmap(lambda row, value, at: row.at[at].set(value, mode="drop"))(
        cache.block, places.block, slot
    )
    reach = jnp.where(commit, places.position + 1, 0).max(axis=1)
    return Cache(
        put(cache.k, new.k, slot),
        put(cache.v, new.v, slot),
        block,
        jnp.maximum(cache.length, reach),
    )
