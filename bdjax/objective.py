"""The training objective: rows out of batches. `bdjax.loss` scores them.

One objective covers the published recipes; `bdjax.presets` lists what each changes.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax.block_size import BlockSize, BlockSizes, BlockStages
from bdjax.draws import group_by
from bdjax.layout import Places, clean_places, join, join_places, noisy_places
from bdjax.noise import Corruption, Process
from bdjax.schedules import Ramp
from bdjax.seeds import row_keys
from bdjax.sharding import per_shard, reshard
from pallas_kernels import CleanMode

__all__ = [
    "Alignment",
    "Batch",
    "BlockSize",
    "BlockStages",
    "Normaliser",
    "Objective",
    "Ramp",
    "Row",
    "Scored",
    "build_row",
    "corruptions",
    "next_token",
    "output_rows",
    "places_of",
    "training_row",
]


class Batch(NamedTuple):
    """What the data pipeline delivers, (B, L) each.

    segment: packed document, 0 = padding. position: in its document. trainable: scored tokens
    (never BOS, prompts or padding).
    """

    tokens: Array
    segment: Int[Array, "B L"]
    position: Int[Array, "B L"]
    trainable: Bool[Array, "B L"]


# No row has this number.
_STRATA = 2**32 - 1


class Alignment(Enum):
    """Which output row names the token at a position."""

    SAME_POSITION = "same_position"
    SHIFTED_CLEAN = "shifted_first_clean"  # from the row before; a block's first from clean text
    SHIFTED_NOISY = "shifted_first_noisy"  # from the row before in the noisy view (Fast-dLLM v2)


class Normaliser(Enum):
    """What the summed loss is divided by."""

    TRAINABLE = "trainable"  # trainable tokens
    REAL = "real"  # all tokens but padding
    MASKED = "masked"  # masked tokens of all views
    PER_SAMPLE = "per_sample"  # each document's trainable tokens, then the number of documents
    SELF = "self"  # the weights themselves


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step trains on.

    process: corruption of the noisy views. views: noisy copies per row (0 trains the clean stream
    alone). clean_stream: False leaves it out (MDLM). documents: blocks, mask and positions restart
    at every packed document; False treats the row as one text. ar_weight: next-token loss on the
    clean stream, which needs the token-causal one; a number, or a `Ramp` over the steps.
    """

    process: Process
    block_size: BlockSizes
    alignment: Alignment = Alignment.SAME_POSITION
    views: int = 1
    clean_stream: bool = True
    documents: bool = True
    ar_weight: float | Ramp = 0.0
    normaliser: Normaliser = Normaliser.TRAINABLE

    def __post_init__(self):
        ends = (self.ar_weight,)
        if isinstance(self.ar_weight, Ramp):
            ends = (self.ar_weight.first, self.ar_weight.last)
        if self.views < 0:
            raise ValueError(f"views={self.views} must not be negative; type views=1")
        if not all(0 <= x < math.inf for x in ends):
            raise ValueError(
                f"ar_weight={self.ar_weight} must be finite and not negative; type ar_weight=0.5"
            )
        if self.views == 0 and not self.scores_ar:
            raise ValueError(
                f"views=0 and ar_weight={self.ar_weight} leave nothing to train; type views=1"
            )
        if self.process.paired and self.views % 2:
            raise ValueError(
                f"views={self.views} cannot be complementary pairs of process.draw=Complement; "
                "type views=2"
            )
        if not self.clean_stream and self.scores_ar:
            raise ValueError(
                f"ar_weight={self.ar_weight} scores the clean stream, which clean_stream=False "
                "leaves out; type ar_weight=0.0 or clean_stream=True"
            )
        if not self.clean_stream and self.alignment is Alignment.SHIFTED_CLEAN:
            raise ValueError(
                "alignment=shifted_first_clean reads the clean stream, which clean_stream=False "
                "leaves out; type alignment=same_position or clean_stream=True"
            )

    @property
    def scores_ar(self) -> bool:
        """Whether the clean stream's next-token loss counts at any step."""
        w = self.ar_weight
        return max(w.first, w.last) > 0 if isinstance(w, Ramp) else w > 0

    def ar_weight_at(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """The factor of the next-token loss at a step."""
        return self.ar_weight.at(step) if isinstance(self.ar_weight, Ramp) else self.ar_weight

    def check(self, clean: CleanMode) -> None:
        """Refuses a next-token loss that could see its label.

        Raises ValueError naming both fields.
        """
        if self.scores_ar and clean is CleanMode.BLOCK and self.block_size.largest > 1:
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
    objective: Objective,
    batch: Batch,
    places: Places,
    key: Key[Array, ""],
    step: Int[Array, ""] | int = 0,
) -> list[Corruption]:
    """The noisy views of a batch at a training step; a function of (key, view, global row)."""
    rows = batch.segment.shape[0]
    process = objective.process
    drawn: list[Corruption] = []
    for view in range(objective.views):
        if process.paired and view % 2:
            drawn.append(process.rest(drawn[-1], batch.tokens, places, batch.trainable))
            continue
        own = jax.random.fold_in(key, view)
        # Splits of `own` are the keys of its first rows: theirs must be another one.
        order, jitter = jax.random.split(jax.random.fold_in(own, _STRATA))
        cell = jax.random.permutation(order, rows) + jax.random.uniform(jitter, (rows,))
        strata = reshard(cell / rows, "batch")
        keys = row_keys(own, rows)
        drawn.append(process.corrupt(keys, strata, batch.tokens, places, batch.trainable, step))
    return drawn


def normalised(
    normaliser: Normaliser, batch: Batch, scored: Scored, views: int
) -> tuple[Scored, Float[Array, ""]]:
    """The entries of all views with their final weights, and what the sum is divided by."""
    weight = jnp.where(scored.scored, scored.weight, 0.0)
    entries = scored.scored.sum().astype(jnp.float32)
    if normaliser is Normaliser.MASKED:
        return scored._replace(weight=weight), entries
    if normaliser is Normaliser.SELF:
        # Mean weight 1 over the entries: the count stays a count.
        weight *= entries / jnp.maximum(weight.sum(), 1e-30)
        return scored._replace(weight=weight), entries
    weight /= views
    if normaliser is Normaliser.PER_SAMPLE:
        sizes, samples = per_shard(
            jax.vmap(_samples), (("batch", "length"),) * 2, (("batch", "length"), ("batch",))
        )(batch.segment, batch.trainable)
        weight /= jnp.tile(jnp.maximum(sizes, 1), (1, views))
        return scored._replace(weight=weight), samples.sum().astype(jnp.float32)
    counted = batch.segment != 0 if normaliser is Normaliser.REAL else batch.trainable
    return scored._replace(weight=weight), counted.sum().astype(jnp.float32)


def _samples(segment, trainable) -> tuple[Int[Array, "L"], Int[Array, ""]]:
    """Trainable tokens of each token's document, and how many documents have any."""
    groups = group_by(segment, trainable=trainable)
    return groups.size[groups.ordinal], (groups.size > 0).sum()


def build_row(objective: Objective, batch: Batch, block_size, views: list[Corruption]) -> Row:
    """The joined row [clean; view 1; view 2; ...] and the entries scored on it."""
    clean = places_of(objective, batch, block_size)
    ar = next_token(batch, clean) if objective.scores_ar else None
    ar_count = jnp.zeros(()) if ar is None else ar.weight.sum()
    if not views:
        return Row(batch.tokens, clean, None, ar, jnp.zeros(()), ar_count)
    noisy = noisy_places(clean, len(views))
    events, labels, scored, weight = (jnp.concatenate(x, axis=1) for x in zip(*views, strict=True))
    offset = clean.stream.shape[1] if objective.clean_stream else 0
    rows, exists = output_rows(objective.alignment, clean, noisy, offset)
    diffusion = Scored(rows, labels, scored & exists, weight)
    diffusion, count = normalised(objective.normaliser, batch, diffusion, len(views))
    if not objective.clean_stream:
        return Row(events, noisy, diffusion, ar, count, ar_count)
    tokens, places = join(batch.tokens, events), join_places(clean, noisy)
    return Row(tokens, places, diffusion, ar, count, ar_count)


def training_row(
    objective: Objective, batch: Batch, step: Int[Array, ""] | int, key: Key[Array, ""]
) -> Row:
    """What a training step runs on: the block size, noise and entries of that step.

    The next-token entries weigh 1; `Objective.ar_weight_at` scales their sum.
    """
    size = objective.block_size.at(step)
    places = places_of(objective, batch, size)
    return build_row(objective, batch, size, corruptions(objective, batch, places, key, step))
