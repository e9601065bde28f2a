"""From token integers to the kernels' input: at most two key intervals per query.

Key order contract: clean keys before noisy views, views ascending; inside a stream segments ascend,
inside a segment `order` (clean) and `block` ascend. Padding (segment 0) may stand before, between
and after segments, not inside one: two intervals could not leave it out.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.mask import CleanMode, Meta

# Segments of one stream stay below this, streams below 2**7: both fit one int32 sort key.
_SEGMENTS = 1 << 24
_LAST = jnp.iinfo(jnp.int32).max


class Intervals(NamedTuple):
    """Query t sees keys [a0[t], a1[t]) (clean) and [b0[t], b1[t]) (its own noisy block).

    The two never overlap; an empty interval has equal ends. All fields are (B, T) int32.
    """

    a0: Int[Array, "B T"]
    a1: Int[Array, "B T"]
    b0: Int[Array, "B T"]
    b1: Int[Array, "B T"]

    def mask(self, length: int) -> Bool[Array, "B T S"]:
        """The same statement as booleans, for S = `length` keys."""
        key = jnp.arange(length)
        in_a = (key >= self.a0[..., None]) & (key < self.a1[..., None])
        in_b = (key >= self.b0[..., None]) & (key < self.b1[..., None])
        return in_a | in_b


def _lower_bound(
    group: Int[Array, "B S"],
    rank: Int[Array, "B S"],
    q_group: Int[Array, "B Q"],
    q_rank: Int[Array, "B Q"],
) -> Int[Array, "B Q"]:
    """Number of keys whose (group, rank) is lexicographically smaller than the query's."""
    length = group.shape[1]

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        at = jnp.minimum(middle, length - 1)
        g = jnp.take_along_axis(group, at, axis=1)
        r = jnp.take_along_axis(rank, at, axis=1)
        smaller = (middle < high) & ((g < q_group) | ((g == q_group) & (r < q_rank)))
        return jnp.where(smaller, middle + 1, low), jnp.where(smaller, high, middle)

    return lax.fori_loop(0, length.bit_length(), halve, (q_group * 0, q_group * 0 + length))[0]


def intervals(q: Meta, k: Meta, clean: CleanMode) -> Intervals:
    """The key intervals of every query, equal to `visible` on every pair.

    q fields are (B, T), k fields (B, S), keys ordered as the module docstring says. Binary searches
    over the keys: O(T log S) work, nothing of size T x S. Every builder (training rows, prompts,
    canvases, fused-commit windows, caches) is this function on other integers.
    """
    if k.stream.shape[1] == 0:
        none = q.stream * 0
        return Intervals(none, none, none, none)
    # A padded key takes the group of the keys before it and ranks after all of them.
    group = lax.cummax(k.stream * _SEGMENTS + k.segment, axis=1)
    block = jnp.where(k.segment == 0, _LAST, k.block)
    noisy_group = q.stream * _SEGMENTS + q.segment
    first = q.block * 0 - _LAST
    groups = [q.segment, q.segment, noisy_group, noisy_group]
    ranks = [first, q.block, q.block, q.block + 1]
    if clean is CleanMode.BLOCK:
        groups, ranks = [*groups, q.segment], [*ranks, q.block + 1]
    found = _lower_bound(
        group, block, jnp.concatenate(groups, axis=1), jnp.concatenate(ranks, axis=1)
    )
    start, before_block, b0, b1, *causal = jnp.split(found, len(groups), axis=1)
    if clean is CleanMode.TOKEN:
        order = jnp.where(k.segment == 0, _LAST, k.order)
        causal = [_lower_bound(group, order, q.segment, q.order + 1)]
    real, noisy = q.segment != 0, (q.stream != 0) & (q.segment != 0)
    end = jnp.maximum(start, jnp.where(q.stream == 0, causal[0], before_block))
    return Intervals(
        jnp.where(real, start, 0),
        jnp.where(real, end, 0),
        jnp.where(noisy, b0, 0),
        jnp.where(noisy, b1, 0),
    )
