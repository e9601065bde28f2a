"""The only door to the attention kernels: one call, run on each device's rows and heads."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from bdjax.sharding import per_shard
from pallas_kernels import Blockwise, Cudnn, Dense, Intervals, merge

Implementation = Dense | Blockwise | Cudnn

HEADS = ("batch", "length", "heads", "head_dim")
KV_HEADS = ("batch", "length", "kv_heads", "head_dim")
CACHE = ("layers", "batch", "kv_heads", "length", "head_dim")
INTERVALS = Intervals(*[("batch", "length")] * 4)

# Up to here one masked softmax beats the tile loop on CPU and holds a few MB per row and head.
_DENSE_PAIRS = 1024 * 1024

# Dense attention copies the layer of the cache that it reads: only short caches may be read so.
_DENSE_SLOTS = 512


class Prefix(NamedTuple):
    """One layer of a stacked cache and which of its slots each query sees."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    layer: Int[Array, ""]
    intervals: Intervals


def choose(impl: Implementation | None, queries: int, keys: int) -> Implementation:
    """`impl`, or the implementation that suits T x S when it is None."""
    if impl is not None:
        return impl
    return Dense() if queries * keys <= _DENSE_PAIRS else Blockwise()


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    own: Intervals,
    prefix: Prefix | None = None,
    impl: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of a window over its own keys and, if given, over a cached prefix.

    Prefix and own keys are two score sets merged by log-sum-exp, never concatenated. Scores are
    scaled by 1/sqrt(H) and summed in float32.
    """
    kernel = choose(impl, q.shape[1], k.shape[1])
    if prefix is None:
        alone = per_shard(
            lambda q, k, v, own: kernel.attention(q, k, v, own)[0],
            (HEADS, KV_HEADS, KV_HEADS, INTERVALS),
            HEADS,
        )
        return alone(q, k, v, own)
    slots = prefix.k.shape[3]
    prefix_kernel = choose(impl, q.shape[1], slots)
    if impl is None and slots > _DENSE_SLOTS:
        prefix_kernel = Blockwise()

    def both(q, k, v, own, prefix):
        mine = kernel.attention(q, k, v, own)
        before = prefix_kernel.prefix_attention(q, *prefix)
        return merge(*before, *mine)[0]

    specs = (HEADS, KV_HEADS, KV_HEADS, INTERVALS, Prefix(CACHE, CACHE, (), INTERVALS))
    return per_shard(both, specs, HEADS)(q, k, v, own, prefix)
