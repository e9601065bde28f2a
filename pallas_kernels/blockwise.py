"""Attention tile by tile in plain jnp: the visible tiles only, nothing of size T x S.

A tile of queries visits the key tiles that the convex cover of its clean intervals touches, then
those of its noisy intervals. The trip counts are data, so sparsity follows the intervals and
nothing recompiles. Runs on any platform; the Pallas kernels do the same on their chips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.intervals import Intervals
from pallas_kernels.kept import kept
from pallas_kernels.merge import EMPTY
from pallas_kernels.quiet import nothing, quiet, quiet_cotangents, used_keys


@dataclass(frozen=True, kw_only=True)
class Blockwise:
    """Tiled attention; accumulates in float32. Tile sizes are in tokens."""

    query_tile: int = 128
    key_tile: int = 128

    def __post_init__(self):
        if self.query_tile < 1 or self.key_tile < 1:
            raise ValueError(f"tiles must be positive, got {self.query_tile=} {self.key_tile=}")

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """As `Dense.attention`, with a backward pass that recomputes the scores tile by tile."""
        if 0 in q.shape or k.shape[1] == 0:
            return nothing(q)
        return _attention(self, *quiet(q, k, v, intervals), intervals)

    def prefix_attention(
        self,
        q: Float[Array, "B T N H"],
        cache_k: Float[Array, "L B K S H"],
        cache_v: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """`attention` over one layer of a stacked cache, forward only.

        Tiles are read straight from the stack: no layer of the cache is ever copied.
        """
        _, batch, heads, slots, width = cache_k.shape
        if 0 in q.shape or slots == 0:
            return nothing(q)
        tile = min(self.key_tile, slots)

        used = used_keys(intervals, slots)[:, None, :, None]

        def load(cache, start):
            shape = (1, batch, heads, tile, width)
            found = lax.dynamic_slice(cache, (layer, 0, 0, start, 0), shape)[0]
            return jnp.where(lax.dynamic_slice_in_dim(used, start, tile, axis=2), found, 0)

        read = partial(_Keys, slots, heads, tile)
        keys = read(lambda start: load(cache_k, start), lambda start: load(cache_v, start))
        return _forward(self, q, keys, intervals)


@dataclass(frozen=True)
class _Keys:
    """Keys and values behind a reader of tiles: start -> (B, K, tile, H)."""

    length: int
    heads: int
    tile: int
    k: Callable
    v: Callable

    def start(self, index):
        """First key of tile `index`; the last tile is shifted left to end with the keys."""
        return jnp.minimum(index * self.tile, self.length - self.tile)


def _slices(k, v, tile: int) -> _Keys:
    tile = min(tile, k.shape[1])

    def read(x):
        heads_first = x.swapaxes(1, 2)
        return lambda start: lax.dynamic_slice_in_dim(heads_first, start, tile, axis=2)

    return _Keys(k.shape[1], k.shape[2], tile, read(k), read(v))


def _fold(x: Float[Array, "B T N H"], heads: int) -> Float[Array, "B K TG H"]:
    """Query heads of one group side by side along the query axis."""
    batch, length, _, width = x.shape
    grouped = x.reshape(batch, length, heads, -1, width).transpose(0, 2, 1, 3, 4)
    return grouped.reshape(batch, heads, -1, width)


def _unfold(x: Float[Array, "B K TG H"], length: int) -> Float[Array, "B T N H"]:
    batch, heads, _, width = x.shape
    grouped = x.reshape(batch, heads, length, -1, width).transpose(0, 2, 1, 3, 4)
    return grouped.reshape(batch, length, -1, width)


def _tiles(x: Array, tile: int) -> Array:
    """(B, T, ...) -> (T / tile, B, tile, ...), zero-padded: a query of padding sees nothing."""
    pad = -x.shape[1] % tile
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0)


def _untile(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _cover(low: Int[Array, "B t"], high: Int[Array, "B t"], tile: int):
    """First and past-the-last key tile that any of the intervals [low, high) touches."""
    some = high > low
    first = jnp.where(some, low, jnp.iinfo(jnp.int32).max).min() // tile
    last = -(-jnp.where(some, high, 0).max() // tile)
    return jnp.minimum(first, last), last


def _seen(keys: _Keys, index, low, high, group: int):
    """Which keys of tile `index` each folded query sees: (B, 1, tG, tile)."""
    key = keys.start(index) + jnp.arange(keys.tile)
    fresh = key >= index * keys.tile  # the shifted last tile repeats keys of the one before it
    seen = (key >= low[..., None]) & (key < high[..., None]) & fresh
    return jnp.repeat(seen, group, axis=1)[:, None]


def _forward(impl: Blockwise, q, keys: _Keys, intervals: Intervals):
    length, width, group = q.shape[1], q.shape[3], q.shape[2] // keys.heads
    tile = min(impl.query_tile, length)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def one_tile(carry, tiled):
        q_tile, bounds = tiled
        folded = _fold(q_tile, keys.heads)

        def visit(low, high, index, state):
            out, top, total = state
            start = keys.start(index)
            scores = jnp.einsum(
                "bkth,bksh->bkts", folded, keys.k(start), preferred_element_type=wide
            )
            seen = _seen(keys, index, low, high, group)
            scores = jnp.where(seen, scores * width**-0.5, EMPTY)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            values = keys.v(start)
            part = jnp.einsum(
                "bkts,bksh->bkth", weights.astype(values.dtype), values, preferred_element_type=wide
            )
            return (
                out * shrink[..., None] + part,
                new_top,
                total * shrink + weights.sum(axis=-1),
            )

        rows = folded.shape[:3]
        state = jnp.zeros(folded.shape, wide), jnp.full(rows, EMPTY, wide), jnp.zeros(rows, wide)
        for low, high in ((bounds.a0, bounds.a1), (bounds.b0, bounds.b1)):
            first, last = _cover(low, high, keys.tile)
            state = lax.fori_loop(first, last, partial(visit, low, high), state)
        out, top, total = state
        safe = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, top + jnp.log(safe), EMPTY)
        out = _unfold(out / safe[..., None], tile).astype(q.dtype)
        return carry, (out, _unfold(lse[..., None], tile)[..., 0])

    tiled = (_tiles(q, tile), jax.tree.map(lambda x: _tiles(x, tile), intervals))
    _, (out, lse) = lax.scan(one_tile, None, tiled)
    return _untile(out, length), _untile(lse, length)


def _backward(impl: Blockwise, q, k, v, intervals, out, lse, d_out, d_lse):
    """Gradients by recomputation. With P = exp(S - lse):
    dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dlse), dQ = dS K, dK = dS^T Q.
    """
    keys = _slices(k, v, impl.key_tile)
    length, width, group = q.shape[1], q.shape[3], q.shape[2] // keys.heads
    tile = min(impl.query_tile, length)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scale = width**-0.5
    delta = (d_out.astype(wide) * out.astype(wide)).sum(axis=-1) - d_lse

    def one_tile(grads, tiled):
        q_tile, d_out_tile, lse_tile, delta_tile, bounds = tiled
        folded, d_folded = _fold(q_tile, keys.heads), _fold(d_out_tile, keys.heads)
        row_lse = _fold(lse_tile[..., None], keys.heads)
        row_delta = _fold(delta_tile[..., None], keys.heads)

        def visit(low, high, index, state):
            d_q, d_k, d_v = state
            start = keys.start(index)
            k_tile, v_tile = keys.k(start), keys.v(start)
            scores = jnp.einsum("bkth,bksh->bkts", folded, k_tile, preferred_element_type=wide)
            seen = _seen(keys, index, low, high, group)
            weights = jnp.where(seen, jnp.exp(scores * scale - row_lse), 0.0)
            d_weights = jnp.einsum("bkth,bksh->bkts", d_folded, v_tile, preferred_element_type=wide)
            d_scores = (weights * (d_weights - row_delta) * scale).astype(q.dtype)
            weights = weights.astype(q.dtype)
            d_q += jnp.einsum("bkts,bksh->bkth", d_scores, k_tile, preferred_element_type=wide)
            part_k = jnp.einsum("bkts,bkth->bskh", d_scores, folded, preferred_element_type=wide)
            part_v = jnp.einsum("bkts,bkth->bskh", weights, d_folded, preferred_element_type=wide)
            return d_q, _add(d_k, part_k, start), _add(d_v, part_v, start)

        d_k, d_v = grads
        state = jnp.zeros(folded.shape, wide), d_k, d_v
        for low, high in ((bounds.a0, bounds.a1), (bounds.b0, bounds.b1)):
            first, last = _cover(low, high, keys.tile)
            state = lax.fori_loop(first, last, partial(visit, low, high), state)
        d_q, d_k, d_v = state
        return (d_k, d_v), _unfold(d_q, tile).astype(q.dtype)

    tiled = tuple(_tiles(x, tile) for x in (q, d_out, lse, delta))
    tiled += (jax.tree.map(lambda x: _tiles(x, tile), intervals),)
    zeros = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    (d_k, d_v), d_q = lax.scan(one_tile, zeros, tiled)
    return _untile(d_q, length), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _add(total, part, start):
    old = lax.dynamic_slice_in_dim(total, start, part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(impl, q, k, v, intervals):
    return _forward(impl, q, _slices(k, v, impl.key_tile), intervals)


def _attention_fwd(impl, q, k, v, intervals):
    out, lse = kept(_attention(impl, q, k, v, intervals))
    return (out, lse), (q, k, v, intervals, out, lse)


def _attention_bwd(impl, residuals, cotangents):
    q, k, v, intervals, out, lse = residuals
    d_out, d_lse = quiet_cotangents(lse, *cotangents)
    return (*_backward(impl, q, k, v, intervals, out, lse, d_out, d_lse), None)


_attention.defvjp(_attention_fwd, _attention_bwd)
