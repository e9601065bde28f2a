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

    Committed tokens extend the row: its length becomes one past the last position written. They
    stand at consecutive positions in their window: token w at the first one's position + w.
    """
    slots = cache.block.shape[1]
    slot = jnp.where(commit, places.position, slots)
    # For a scatter a TPU would lay the whole cache out anew, and back again for its kernels.
    by_rows = sharding.device_kind().startswith("TPU") and commit.shape[1] <= slots
    one = put_by_rows if by_rows else put
    fields = (AXES, NEW, ("batch", "length"), ("batch", "length"))
    spread = sharding.per_shard(one, fields, AXES)
    block = jax.vmap(lambda row, value, at: row.at[at].set(value, mode="drop"))(
        cache.block, places.block, slot
    )
    reach = jnp.where(commit, places.position + 1, 0).max(axis=1)
    return Cache(
        spread(cache.k, new.k, places.position, commit),
        spread(cache.v, new.v, places.position, commit),
        block,
        jnp.maximum(cache.length, reach),
    )


def put(
    stack: Float[Array, "L N K S H"],
    values: Float[Array, "L N W K H"],
    position: Int[Array, "N W"],
    commit: Bool[Array, "N W"],
) -> Float[Array, "L N K S H"]:
    """`stack` with the committed values at their positions, as one scatter."""
    # On the stack as it lies: a vmap over rows would transpose, and so copy, it.
    row = jnp.arange(position.shape[0])[:, None]
    slot = jnp.where(commit, position, stack.shape[3])
    return stack.at[:, row, :, slot].set(jnp.moveaxis(values, 0, 2), mode="drop")


def put_by_rows(
    stack: Float[Array, "L N K S H"],
    values: Float[Array, "L N W K H"],
    position: Int[Array, "N W"],
    commit: Bool[Array, "N W"],
) -> Float[Array, "L N K S H"]:
    """As `put`, row by row in place, for windows of consecutive positions; W is at most S."""
    layers, rows, heads, slots, head_dim = stack.shape
    width, values = position.shape[1], values.swapaxes(2, 3)
    at = jnp.clip(position[:, 0], 0, slots - width)
    # Near the ends of the row the slice is moved inside of it, and its tokens the other way.
    moved = position[:, 0] - at
    source = jnp.arange(width) - moved[:, None]
    inside = (source >= 0) & (source < width)
    chosen = jnp.take_along_axis(commit, jnp.clip(source, 0, width - 1), axis=1) & inside

    def one(row, stack):
        size = (layers, 1, heads, width, head_dim)
        new = jax.lax.dynamic_slice_in_dim(values, row, 1, axis=1)
        place = (0, row, 0, at[row], 0)
        old = jax.lax.dynamic_slice(stack, place, size)
        new = jnp.where(chosen[row][:, None], jnp.roll(new, moved[row], axis=3), old)
        return jax.lax.dynamic_update_slice(stack, new, place)

    return jax.lax.fori_loop(0, rows, one, stack)
