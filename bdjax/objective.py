"""The training objective: rows out of batches. `bdjax.loss` scores them.

One objective covers the published recipes; `bdjax.presets` lists what each changes.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax.layout import Places, clean_places, join, join_places, noisy_places
from bdjax.noise import Corruption
from bdjax.seeds import row_keys
from bdjax.sharding import reshard
from pallas_kernels import CleanMode


class Batch(NamedTuple):
    """What the data pipeline delivers, (B, L) each.

    segment: packed document, 0 = padding. position: in its document. trainable: scored tokens
    (never BOS, prompts or padding).
    """

    tokens: Array
    segment: Int[Array, "B L"]
    position: Int[Array, "B L"]
    trainable: Bool[Array, "B L"]


class Alignment(Enum):
    """Which output row names the token at a position."""

    SAME_POSITION = "same_position"
    SHIFTED_CLEAN = "shifted_first_clean"  # from the row before; a block's first from clean text
    SHIFTED_NOISY = "shifted_first_noisy"  # from the row before in the noisy view (Fast-dLLM v2)


class Normaliser(Enum):
    """What the summed loss is divided by."""

    TRAINABLE = "trainable"  # trainable tokens
    REAL = "real"  # all tokens but padding


@dataclass(frozen=True, kw_only=True)
class BlockSize:
    """Block size as a function of the step: `first`, doubled every `double_every` steps to `last`.

    Data, never a shape: a curriculum compiles once.
    """

    first: int
    last: int | None = None
    double_every: int = 0

    def __post_init__(self):
        if self.first < 1:
            raise ValueError(f"block size first={self.first} must be at least 1")
        if self.double_every < 0:
            raise ValueError(f"double_every={self.double_every} must be 0 (constant) or more")
        if (self.last is None) != (self.double_every == 0):
            raise ValueError(
                f"a growing block size needs both last and double_every, got last={self.last} "
                f"double_every={self.double_every}; type last={2 * self.first} double_every=1000"
            )
        if self.last is not None:
            ratio = self.last / self.first
            if ratio < 1 or int(ratio) & (int(ratio) - 1) or ratio != int(ratio):
                raise ValueError(f"last={self.last} is not first={self.first} times a power of two")

    @property
    def largest(self) -> int:
        """The largest block of the run: what packing aligns to and canvases are wide."""
        return self.last or self.first

    def at(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """The block size at a step."""
        doublings = (self.largest // self.first).bit_length() - 1
        grown = 0 if self.last is None else jnp.minimum(step // self.double_every, doublings)
        return jnp.asarray(self.first, jnp.int32) << grown


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step trains on.

    process: corruption of the noisy views. views: noisy copies per row (0 trains the clean stream
    alone). clean_stream: False leaves it out (MDLM). documents: blocks, mask and positions restart
    at every packed document; False treats the row as one text. ar_weight: next-token loss on the
    clean stream, which needs the token-causal one.
    """

    process: Any
    block_size: BlockSize
    alignment: Alignment = Alignment.SAME_POSITION
    views: int = 1
    clean_stream: bool = True
    documents: bool = True
    ar_weight: float = 0.0
    normaliser: Normaliser = Normaliser.TRAINABLE

    def __post_init__(self):
        if self.views < 0 or self.ar_weight < 0:
            raise ValueError(f"{self.views=} and {self.ar_weight=} must not be negative")
        if self.views == 0 and self.ar_weight == 0:
            raise ValueError("views=0 and ar_weight=0.0 leave nothing to train; type views=1")
        if not self.clean_stream and self.ar_weight > 0:
            raise ValueError(
                f"ar_weight={self.ar_weight} scores the clean stream, which clean_stream=False "
                "leaves out; type ar_weight=0.0 or clean_stream=True"
            )
        if not self.clean_stream and self.alignment is Alignment.SHIFTED_CLEAN:
            raise ValueError(
                "alignment=shifted_first_clean reads the clean stream, which clean_stream=False "
                "leaves out; type alignment=same_position or clean_stream=True"
            )

    def check(self, clean: CleanMode) -> None:
        """Refuses a next-token loss that could see its label.

        Raises ValueError naming both fields.
        """
        if self.ar_weight > 0 and clean is CleanMode.BLOCK and self.block_size.largest > 1:
            raise ValueError(
                f"objective.ar_weight={self.ar_weight} with model.clean=block leaks: a clean "
                f"token sees the rest of its block of {self.block_size.largest}; type "
                "model.clean=token or objective.ar_weight=0.0"
            )


class Scored(NamedTuple):
    """Entries for the readout, (B, R): output row, label, whether and how much it counts."""

    rows: Int[Array, "B R"]
    labels: Array
    scored: Bool[Array, "B R"]
    weight: Float[Array, "B R"]


class Row(NamedTuple):
    """What one training forward needs; `diffusion` and `ar` index the joined row's outputs.

    The counts are what the two weighted sums are divided by, over the whole batch: a part of the
    batch keeps them.
    """

    tokens: Array
    places: Places
    diffusion: Scored | None
    ar: Scored | None
    diffusion_count: Float[Array, ""]
    ar_count: Float[Array, ""]


def places_of(objective: Objective, batch: Batch, block_size) -> Places:
    """The clean stream's integers under this objective's idea of a document."""
    if objective.documents:
        return clean_places(batch.segment, batch.position, block_size)
    whole = (batch.segment != 0).astype(jnp.int32)
    along = jnp.arange(whole.shape[1]) + whole * 0
    return clean_places(whole, along, block_size)


def output_rows(
    alignment: Alignment, clean: Places, noisy: Places, offset: int
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """For every noisy token the joined row's output that names it, and whether there is one.

    The noisy views copy the clean stream (view after view) and start at row `offset`, 0 when the
    clean stream is left out.
    """
    length = clean.stream.shape[1]
    index = jnp.arange(noisy.stream.shape[1]) + noisy.stream * 0
    if alignment is Alignment.SAME_POSITION:
        return offset + index, noisy.segment != 0

    def same_as_before(*fields):
        alike = index > 0
        for field in fields:
            alike &= field == jnp.roll(field, 1, axis=1)
        return alike

    document = same_as_before(noisy.stream, noisy.segment) & (noisy.segment != 0)
    before = offset + jnp.maximum(index - 1, 0)
    if alignment is Alignment.SHIFTED_NOISY:
        return before, document
    inside = same_as_before(noisy.stream, noisy.segment, noisy.block)
    return jnp.where(inside, before, jnp.maximum(index % length - 1, 0)), document


def next_token(batch: Batch, places: Places) -> Scored:
    """The clean stream as an AR model: output i names token i + 1 of the same document."""
    following = jnp.roll(batch.tokens, -1, axis=1)
    index = jnp.arange(following.shape[1]) + batch.segment * 0
    same = (places.segment == jnp.roll(places.segment, -1, axis=1)) & (places.segment != 0)
    scored = same & jnp.roll(batch.trainable, -1, axis=1) & (index < following.shape[1] - 1)
    return Scored(index, following, scored, scored.astype(jnp.float32))


def corruptions(
    objective: Objective, batch: Batch, places: Places, key: Key[Array, ""]
) -> list[Corruption]:
    """The noisy views of a batch; view v's noise is a function of (key, v, global row)."""
    rows = batch.segment.shape[0]
    drawn = []
    for view in range(objective.views):
        own = jax.random.fold_in(key, view)
        order, jitter = jax.random.split(own)
        cell = jax.random.permutation(order, rows) + jax.random.uniform(jitter, (rows,))
        strata = reshard(cell / rows, "batch")
        drawn.append(
            objective.process.corrupt(
                row_keys(own, rows), strata, batch.tokens, places, batch.trainable
            )
        )
    return drawn


def build_row(objective: Objective, batch: Batch, block_size, views: list[Corruption]) -> Row:
    """The joined row [clean; view 1; view 2; ...] and the entries scored on it."""
    clean = places_of(objective, batch, block_size)
    counted = batch.segment != 0 if objective.normaliser is Normaliser.REAL else batch.trainable
    count = counted.sum().astype(jnp.float32)
    ar = next_token(batch, clean) if objective.ar_weight > 0 else None
    ar_count = jnp.zeros(()) if ar is None else ar.weight.sum()
    if not views:
        return Row(batch.tokens, clean, None, ar, count, ar_count)
    noisy = noisy_places(clean, len(views))
    events, labels, scored, weight = (jnp.concatenate(x, axis=1) for x in zip(*views, strict=True))
    offset = clean.stream.shape[1] if objective.clean_stream else 0
    rows, exists = output_rows(objective.alignment, clean, noisy, offset)
    diffusion = Scored(rows, labels, scored & exists, weight / len(views))
    if not objective.clean_stream:
        return Row(events, noisy, diffusion, ar, count, ar_count)
    tokens, places = join(batch.tokens, events), join_places(clean, noisy)
    return Row(tokens, places, diffusion, ar, count, ar_count)
