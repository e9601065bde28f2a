"""Who sees whom: the one definition of the mask that everything else is derived from.

The predicate is written with operators alone, so it runs on numpy arrays, on traced arrays and on
plain integers, and broadcasts.
"""

from enum import Enum
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

# Integers, or arrays of them of any shape that broadcast against each other.
Integers = Int[Array | np.ndarray, "..."] | int
Booleans = Bool[Array | np.ndarray, "..."] | bool


class CleanMode(Enum):
    """How the clean stream sees itself."""

    TOKEN = "token"  # causal token by token: the clean stream is an autoregressive model
    BLOCK = "block"  # causal block by block, both ways inside a block


class Meta(NamedTuple):
    """Small integers every token carries; all fields broadcast against each other.

    stream: 0 for clean tokens, v >= 1 for tokens of noisy view v.
    segment: packed document, ascending along a row; 0 is padding, which sees nothing and is unseen.
    block: block in its document. order: causal order in its document.
    """

    stream: Integers
    segment: Integers
    block: Integers
    order: Integers


def visible(q: Meta, k: Meta, clean: CleanMode) -> Booleans:
    """Whether query q sees key k.

        k clean, q noisy :  block[k] <  block[q]
        k clean, q clean :  order[k] <= order[q] (TOKEN)   or   block[k] <= block[q] (BLOCK)
        k noisy, q noisy :  same view and block[k] == block[q]
        k noisy, q clean :  never

    and always: same segment, not padding. Broadcasts over the fields of q and k.
    """
    q_clean, k_clean = q.stream == 0, k.stream == 0
    q_noisy = q.stream != 0
    causal = k.order <= q.order if clean is CleanMode.TOKEN else k.block <= q.block
    seen = (
        (k_clean & q_noisy & (k.block < q.block))
        | (k_clean & q_clean & causal)
        | (q_noisy & (k.stream == q.stream) & (k.block == q.block))
    )
    return (q.segment == k.segment) & (q.segment != 0) & seen


def dense_mask(q: Meta, k: Meta, clean: CleanMode) -> Booleans:
    """The predicate on every pair: (..., T) queries by (..., S) keys. For tests and pictures."""
    return visible(
        Meta(*(field[..., :, None] for field in q)),
        Meta(*(field[..., None, :] for field in k)),
        clean,
    )
