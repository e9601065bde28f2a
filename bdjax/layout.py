"""Rows: where tokens stand. Clean stream, noisy views, prompts, canvases, fused-commit windows.

Clean and noisy tokens are separate arrays; `join` puts them side by side for one forward pass.
Everything downstream (intervals, RoPE, draws, readout) reads the integers made here.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import Meta


class Places(NamedTuple):
    """The integers of (B, T) tokens: the mask's four and the RoPE position, which it never reads.

    stream: 0 clean, v >= 1 noisy view v. segment: packed document, 0 = padding. block: block in its
    document. order: causal order in its document. position: RoPE position.
    """

    stream: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    block: Int[Array, "B T"]
    order: Int[Array, "B T"]
    position: Int[Array, "B T"]

    @property
    def meta(self) -> Meta:
        """What the mask reads."""
        return Meta(self.stream, self.segment, self.block, self.order)


def clean_places(
    segment: Int[Array, "B L"],
    position: Int[Array, "B L"],
    block_size: int | Int[Array, ""] | Int[Array, "B L"],
) -> Places:
    """The clean stream of packed documents: blocks of `block_size` counted from document starts.

    `block_size` is data: a scalar, or one integer per token that is constant in a document.
    """
    block = position // block_size
    return Places(segment * 0, segment, block, position, position)


def noisy_places(clean: Places, views: int) -> Places:
    """`views` noisy copies of a clean stream, view after view: (B, views * L)."""
    tiled = [jnp.tile(field, (1, views)) for field in clean]
    view = jnp.arange(views).repeat(clean.stream.shape[1]) + 1
    return Places(tiled[0] + view, *tiled[1:])


def join(first: Array, second: Array) -> Array:
    """Two (B, T, ...) arrays side by side along the length, which no mesh axis splits."""
    return jnp.concatenate([first, second], axis=1)


def join_places(first: Places, second: Places) -> Places:
    """`join` on every field."""
    return Places(*(join(a, b) for a, b in zip(first, second, strict=True)))


def window_places(
    start: Int[Array, "N"],
    block: Int[Array, "N"],
    slots: int,
    valid: Bool[Array, "N W"],
    clean: Bool[Array, "N"],
) -> Places:
    """`slots` consecutive positions from `start` on, all of block `block` of one document.

    Slots that are not `valid` are padding. `clean` rows stand in the clean stream (a finished block
    to commit), the others in noisy view 1 (a canvas).
    """
    position = start[:, None] + jnp.arange(slots)
    stream = jnp.where(clean[:, None], 0, 1) + position * 0
    block = block[:, None] + position * 0
    return Places(stream, valid.astype(jnp.int32), block, position, position)
