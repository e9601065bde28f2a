"""cuDNN's flash attention for the two-stream mask: the portable fast path of NVIDIA GPUs, 16 bits.

cuDNN knows no intervals, only a mask as a bias and one key length per row. A short row is one call
under a mask. A long one is cut into chunks of queries: the keys of a chunk's clean cover and of its
own noisy cover are gathered side by side, so that the key length ends the work where the chunk's
keys end, and the mask is one chunk high. Nothing of size T x S exists for a long row.

The log-sum-exp that jax hands out here is rounded to 16 bits: too coarse to merge by. It is
computed by `Dense` or `Blockwise`, only where it is used, and its gradient is theirs.

A train step of configs/tinyshakespeare.py takes 21.6 ms with it and 33.7 ms with `Dense` under full
rematerialisation (H100, jax 0.11.2, 64 rows of 2 x 256, 6 heads of 64, 2026-11-23).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import Blockwise
from pallas_kernels.dense import Dense
from pallas_kernels.intervals import Intervals
from pallas_kernels.kept import kept
from pallas_kernels.quiet import nothing, quiet

# Dense attention copies the layer of the cache that it reads: only short caches are read so.
_DENSE_SLOTS = 512


@dataclass(frozen=True, kw_only=True)
class Cudnn:
    """Masked cuDNN attention, accumulated in float32; head_dim a multiple of 8.

    query_chunk: queries per call, an even number; rows up to it take one call. backend: "xla" runs
    the same algorithm where there is no cuDNN, in any float type.
    """

    query_chunk: int = 1024
    backend: Literal["cudnn", "xla"] = "cudnn"

    def __post_init__(self):
        if self.query_chunk < 2 or self.query_chunk % 2:
            raise ValueError(
                f"query_chunk={self.query_chunk} must be even and positive; type query_chunk=1024"
            )

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """As `Dense.attention`.

        Raises NotImplementedError for dtypes and head_dim that cuDNN does not serve.
        """
        if self.backend == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"cuDNN attention takes bfloat16 or float16, not {q.dtype}; use Dense() for short "
                "rows or Blockwise() for long ones"
            )
        if self.backend == "cudnn" and q.shape[3] % 8:
            raise NotImplementedError(
                f"cuDNN attention takes head_dim in eights, not {q.shape[3]}; use Dense() for "
                "short rows or Blockwise() for long ones"
            )
        if 0 in q.shape or k.shape[1] == 0:
            return nothing(q)
        q, k, v = quiet(q, k, v, intervals)
        sees = (intervals.a1 > intervals.a0) | (intervals.b1 > intervals.b0)
        if max(q.shape[1], k.shape[1]) > self.query_chunk:
            out, reference = _chunked(self, q, k, v, intervals), Blockwise()
        elif q.shape[1] % 2 or k.shape[1] % 2:
            return Dense().attention(q, k, v, intervals)
        else:
            out, reference = _call(self, q, k, v, intervals.mask(k.shape[1]), None), Dense()
        out = jnp.where(sees[:, :, None, None], out, 0)
        return out, reference.attention(q, k, v, intervals)[1]

    def prefix_attention(
        self,
        q: Float[Array, "B T N H"],
        cache_k: Float[Array, "L B K S H"],
        cache_v: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        intervals: Intervals,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
        """That of `Dense` or, over a long cache, of `Blockwise`: cuDNN takes no stacked cache."""
        portable = Dense() if cache_k.shape[3] <= _DENSE_SLOTS else Blockwise()
        return portable.prefix_attention(q, cache_k, cache_v, layer, intervals)


def _call(impl: Cudnn, q, k, v, seen, length):
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=seen[:, None],
        key_value_seq_lengths=length,
        implementation=impl.backend,
    )


class _Chunk(NamedTuple):
    """Which keys a chunk of queries gathers: `first` + `count` of them, then `second` ones."""

    first: Int[Array, "B"]
    count: Int[Array, "B"]
    second: Int[Array, "B"]
    length: Int[Array, "B"]

    def key(self, at: Int[Array, "S"]) -> Int[Array, "B S"]:
        """The key at each place of the gathered order; places from `length` on are undefined."""
        first, count, second = self.first[:, None], self.count[:, None], self.second[:, None]
        return jnp.where(at < count, first + at, second + at - count)

    def place(self, key: Int[Array, "S"]) -> tuple[Int[Array, "B S"], Array]:
        """Where each key stands in the gathered order, and whether it does."""
        first, count, second = self.first[:, None], self.count[:, None], self.second[:, None]
        in_first = (key >= first) & (key < first + count)
        in_second = (key >= second) & (key < second + self.length[:, None] - count)
        return jnp.where(in_first, key - first, count + key - second), in_first | in_second


def _cover(low, high):
    some = high > low
    begin = jnp.where(some, low, jnp.iinfo(jnp.int32).max).min(axis=1)
    end = jnp.where(some, high, 0).max(axis=1)
    return jnp.where(begin < end, begin, 0), end


def _chunk(bounds: Intervals) -> _Chunk:
    """Both covers; one that contains both where they overlap, so that no key stands twice."""
    (a0, a1), (b0, b1) = _cover(bounds.a0, bounds.a1), _cover(bounds.b0, bounds.b1)
    both = (a0 < b1) & (b0 < a1)
    a0, a1 = jnp.where(both, jnp.minimum(a0, b0), a0), jnp.where(both, jnp.maximum(a1, b1), a1)
    own = jnp.where(both, 0, b1 - b0)
    return _Chunk(a0, a1 - a0, b0, a1 - a0 + own)


def _pick(x: Float[Array, "B S K H"], index: Int[Array, "B P"]) -> Float[Array, "B P K H"]:
    index = jnp.clip(index, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index[:, :, None, None], axis=1)


def _split(x: Array, size: int) -> Array:
    """(B, T, ...) -> (T / size, B, size, ...), padded by queries that see nothing."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _gathered(k, v, bounds: Intervals):
    """Keys, values, mask and key lengths of one chunk."""
    chunk, at = _chunk(bounds), jnp.arange(k.shape[1])
    index = chunk.key(at)
    key, inside = index[:, None], (at < chunk.length[:, None])[:, None]
    low, high = (x[..., None] for x in (bounds.a0, bounds.a1))
    seen = (key >= low) & (key < high)
    low, high = (x[..., None] for x in (bounds.b0, bounds.b1))
    seen |= (key >= low) & (key < high)
    return chunk, _pick(k, index), _pick(v, index), seen & inside, jnp.maximum(chunk.length, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(impl: Cudnn, q, k, v, bounds: Intervals):
    def one(carry, chunk):
        q, bounds = chunk
        _, keys, values, seen, length = _gathered(k_even, v_even, bounds)
        return carry, _call(impl, q, keys, values, seen, length)

    # cuDNN takes an even number of keys.
    k_even, v_even = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (k, v))
    chunks = jax.tree.map(lambda x: _split(x, impl.query_chunk), (q, bounds))
    return _join(lax.scan(one, None, chunks)[1], q.shape[1])


def _chunked_fwd(impl, q, k, v, bounds):
    return kept(_chunked(impl, q, k, v, bounds)), (q, k, v, bounds)


def _chunked_bwd(impl, residuals, d_out):
    """cuDNN's own backward pass chunk by chunk, after its forward pass once more. Gradients of the
    gathered keys are gathered back, not scattered: sums in one order, equal bit by bit."""
    q, k, v, bounds = residuals
    keys = k.shape[1]
    k_even, v_even = (jnp.pad(x, ((0, 0), (0, keys % 2), (0, 0), (0, 0))) for x in (k, v))

    def one(totals, chunk):
        q, bounds, d_out = chunk
        gathered, chunk_k, chunk_v, seen, length = _gathered(k_even, v_even, bounds)
        _, pull = jax.vjp(lambda *x: _call(impl, *x, seen, length), q, chunk_k, chunk_v)
        d_q, *d_gathered = pull(d_out)
        place, there = gathered.place(jnp.arange(keys))
        there = there[:, :, None, None]
        totals = tuple(
            total + jnp.where(there, _pick(x, place), 0).astype(total.dtype)
            for total, x in zip(totals, d_gathered, strict=True)
        )
        return totals, d_q

    chunks = jax.tree.map(lambda x: _split(x, impl.query_chunk), (q, bounds, d_out))
    wide = jnp.promote_types(k.dtype, jnp.float32)
    (d_k, d_v), d_q = lax.scan(one, (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)), chunks)
    return _join(d_q, q.shape[1]), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
