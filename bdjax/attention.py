"""The only door to the attention kernels: one call, run on each device's rows and heads.

Without an explicit implementation the choice goes by chip, shape and dtype. Candidates are tried in
order: one that cannot serve says why, the next is asked, and both are logged, once per text, by the
logger "bdjax.attention".
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from bdjax.sharding import device_kind, is_hopper, per_shard
from pallas_kernels import Blockwise, Cudnn, Dense, Hopper, Intervals, Mosaic, merge

Implementation = Dense | Blockwise | Cudnn | Hopper | Mosaic

HEADS = ("batch", "length", "heads", "head_dim")
KV_HEADS = ("batch", "length", "kv_heads", "head_dim")
CACHE = ("layers", "batch", "kv_heads", "length", "head_dim")
INTERVALS = Intervals(*[("batch", "length")] * 4)

# Up to here one masked softmax beats the tile loop on CPU and holds a few MB per row and head.
_DENSE_PAIRS = 1024 * 1024

# A chip's kernel gains nothing over so few pairs: a window over its own keys.
_FEW_PAIRS = 128 * 128

# Dense attention copies the layer of the cache that it reads: only short caches may be read so.
_DENSE_SLOTS = 512


class Prefix(NamedTuple):
    """One layer of a stacked cache and which of its slots each query sees."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    layer: Int[Array, ""]
    intervals: Intervals


def candidates(kind: str, queries: int, keys: int, width: int) -> tuple[Implementation, ...]:
    """Implementations for T = `queries` over S = `keys` on a chip, the preferred first.

    kind: `device_kind` of the chip. width: head_dim, by which tiles are chosen.
    """
    portable = Dense() if queries * keys <= _DENSE_PAIRS else Blockwise()
    if queries * keys <= _FEW_PAIRS:
        return (portable,)
    if kind.startswith("TPU"):
        return Mosaic.tuned(kind, width), portable
    if kind.startswith("NVIDIA"):
        return (Hopper(), Cudnn(), portable) if is_hopper(kind) else (Cudnn(), portable)
    return (portable,)


def prefix_candidates(kind: str, slots: int, width: int) -> tuple[Implementation, ...]:
    """The same for a window over a cache of `slots` slots a row."""
    if slots <= _DENSE_SLOTS:
        return (Dense(),)
    if kind.startswith("TPU"):
        return Mosaic.tuned(kind, width), Blockwise()
    # A GPU starts each tile anew: 1 row of 32768 slots takes an H100 3.3 ms by 128, 0.33 by 4096.
    portable = Blockwise() if kind == "cpu" else Blockwise(key_tile=4096)
    return (Hopper(), portable) if is_hopper(kind) else (portable,)


def check_chip(impl: Implementation, kind: str) -> None:
    """Raises NotImplementedError, with what to type, for an implementation of another chip."""
    needs = None
    if isinstance(impl, Hopper) and not is_hopper(kind):
        needs = "an H100 or H200"
    elif isinstance(impl, Cudnn) and impl.backend == "cudnn" and not kind.startswith("NVIDIA"):
        needs = "an NVIDIA GPU"
    elif isinstance(impl, Mosaic) and not impl.interpret and not kind.startswith("TPU"):
        needs = "a TPU"
    if needs is not None:
        raise NotImplementedError(
            f"{impl} needs {needs}, this is {kind}; leave attention out of the config, and what "
            "serves is chosen"
        )


def first_that_serves(what: str, impls: tuple[Implementation, ...], call: Callable):
    """`call(impl)` of the first implementation that does not refuse; the last one may raise.

    what: for the log, the attention that is to be served.
    """
    for impl in impls[:-1]:
        try:
            found = call(impl)
        except NotImplementedError as reason:
            _say(f"{what}: {impl} cannot serve: {reason}")
        else:
            _say(f"{what} by {impl}")
            return found
    _say(f"{what} by {impls[-1]}")
    return call(impls[-1])


@functools.cache
def _say(text: str) -> None:
    logging.getLogger("bdjax.attention").info(text)


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
    scaled by 1/sqrt(H) and summed in float32. Raises NotImplementedError, with the reason, when an
    explicit `impl` cannot serve.
    """
    kind, (width, slots) = device_kind(), (q.shape[3], 0 if prefix is None else prefix.k.shape[3])
    what = f"attention of {q.shape[1]} tokens to each other"
    own_impls, prefix_impls = (impl,), (impl,)
    if impl is not None:
        check_chip(impl, kind)
    else:
        own_impls = candidates(kind, q.shape[1], k.shape[1], width)
        prefix_impls = prefix_candidates(kind, slots, width)
    if prefix is None:
        alone = per_shard(
            lambda *shard: first_that_serves(
                what, own_impls, lambda impl: impl.attention(*shard)[0]
            ),
            (HEADS, KV_HEADS, KV_HEADS, INTERVALS),
            HEADS,
        )
        return alone(q, k, v, own)

    def both(q, k, v, own, prefix):
        mine = first_that_serves(what, own_impls, lambda impl: impl.attention(q, k, v, own))
        before = first_that_serves(
            f"attention of {q.shape[1]} tokens to {slots} cached ones",
            prefix_impls,
            lambda impl: impl.prefix_attention(q, *prefix),
        )
        return merge(*before, *mine)[0]

    specs = (HEADS, KV_HEADS, KV_HEADS, INTERVALS, Prefix(CACHE, CACHE, (), INTERVALS))
    return per_shard(both, specs, HEADS)(q, k, v, own, prefix)
