"""Absorbing-mask corruption: schedules, draws, and the process object the objective talks to.

A draw decides which trainable tokens of a row are masked and what each masked token's loss weighs.
Draws run per device on local rows; their noise is a function of the row's key.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax.layout import Places
from bdjax.sharding import per_shard


class Masks(NamedTuple):
    """Which tokens are masked and the weight of each one's loss (0 where not masked)."""

    masked: Bool[Array, "M"]
    weight: Float[Array, "M"]


class Groups(NamedTuple):
    """Tokens of one row grouped (by block, document or row): their ordinals and trainable counts.

    `size[g]` counts the trainable tokens of group g; groups are numbered along the row.
    """

    ordinal: Int[Array, "M"]
    size: Int[Array, "M"]


def group_by(*labels: Int[Array, "M"], trainable: Bool[Array, "M"]) -> Groups:
    """Groups of consecutive tokens that agree in all labels."""
    changes = jnp.zeros_like(trainable)
    for label in labels:
        changes |= label != jnp.roll(label, 1)
    ordinal = jnp.cumsum(changes.at[0].set(False))
    size = jnp.zeros_like(ordinal).at[ordinal].add(trainable)
    return Groups(ordinal, size)


def stratified(
    key: Key[Array, ""], active: Bool[Array, "M"], stratum: Float[Array, ""]
) -> Float[Array, "M"]:
    """One uniform number per active group, stratified: (permutation + U) / K over K groups.

    A row with a single group is stratified over the batch instead: `stratum` in [0, 1) holds its
    (permutation + U) / rows.
    """
    shuffle, jitter = jax.random.split(key)
    order = jnp.where(active, jax.random.uniform(shuffle, active.shape), 2.0)
    cell = jnp.argsort(jnp.argsort(order))
    count = active.sum()
    inside = (cell + jax.random.uniform(jitter, active.shape)) / jnp.maximum(count, 1)
    return jnp.where(count == 1, stratum, inside)


def rank_in_group(
    key: Key[Array, ""], groups: Groups, trainable: Bool[Array, "M"]
) -> Int[Array, "M"]:
    """A uniformly random rank of each trainable token among its group's; untrainable ones last.

    Sorted by (group, random) as two keys: adding them in one float would lose the random bits.
    """
    length = trainable.shape[0]
    noise = jnp.where(trainable, jax.random.uniform(key, (length,)), 2.0)
    index = jnp.arange(length)
    _, _, sorted_index = jax.lax.sort((groups.ordinal, noise, index), num_keys=2)
    place = jnp.zeros_like(index).at[sorted_index].set(index)
    members = jnp.zeros_like(index).at[groups.ordinal].add(1)
    start = jnp.cumsum(members) - members
    return place - start[groups.ordinal]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Base of the draws; `masks` handles one row."""

    def masks(self, key, stratum, places: Places, trainable: Bool[Array, "M"]) -> Masks:
        """The row's masks. `places` fields are (M,)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ExactCount(Draw):
    """n masked tokens in a block of B trainable ones, n uniform on 1..B, weight B / n.

    Unbiased for the NELBO (reference estimator: training notes 2.3), never empty; the counts of a
    row's blocks are stratified.
    """

    def masks(self, key, stratum, places: Places, trainable: Bool[Array, "M"]) -> Masks:
        """n_b = 1 + floor(u_b B_b) of block b's tokens, chosen uniformly."""
        counts, ranks = jax.random.split(key)
        blocks = group_by(places.segment, places.block, trainable=trainable)
        u = stratified(counts, blocks.size > 0, stratum)
        n = jnp.minimum(1 + jnp.floor(u * blocks.size).astype(jnp.int32), blocks.size)
        masked = trainable & (rank_in_group(ranks, blocks, trainable) < n[blocks.ordinal])
        weight = (blocks.size / jnp.maximum(n, 1))[blocks.ordinal]
        return Masks(masked, jnp.where(masked, weight, 0.0))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of the schedules: p(t) is the probability that a token is masked, from p(0)=0 up.

    The NELBO weight is p'(t) / p(t) (-alpha'/(1-alpha) of Shi et al. 2024, eq. 5), by autodiff.
    """

    def p(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """Mask probability at time t."""
        raise NotImplementedError

    def weight(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Nats of bound per nat of masked cross-entropy at times t."""
        slope = jnp.vectorize(jax.grad(self.p))
        return slope(t) / jnp.vectorize(self.p)(t)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """p = t, weight 1 / t."""

    def p(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """t itself."""
        return t


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """p = 1 - cos(pi t / 2) (MD4)."""

    def p(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """1 - cos(pi t / 2), written without its cancellation at small t."""
        return 2 * jnp.sin(jnp.pi / 4 * t) ** 2


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """p = t^power, weight power / t."""

    power: float = 2.0

    def p(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """t to the power."""
        return t**self.power


@dataclass(frozen=True, kw_only=True)
class LogLinear(Schedule):
    """MDLM's loglinear noise: p = (1 - eps) t."""

    eps: float = 1e-3

    def p(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """(1 - eps) t."""
        return (1 - self.eps) * t


class Scope(Enum):
    """Which tokens share one noise level."""

    ROW = "row"
    DOCUMENT = "document"
    BLOCK = "block"


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Draw):
    """Each trainable token masked with probability p(t), weight p'(t)/p(t); one t per `scope`.

    t = low + (high - low) u with u stratified over the row (over the batch if a row has one level).
    `never_empty` redraws a row's masks up to ten times until one token is masked, then forces one
    (SDAR); clipping [low, high] biases the bound, in training only (BD3-LM).
    """

    schedule: Schedule = Linear()
    scope: Scope = Scope.BLOCK
    low: float = 1e-3
    high: float = 1.0
    never_empty: bool = False

    def __post_init__(self):
        if not 0 < self.low < self.high <= 1:
            raise ValueError(
                f"noise levels need 0 < low < high <= 1, got low={self.low} high={self.high}; "
                "type low=0.001 high=1.0 for the whole range"
            )

    def masks(self, key, stratum, places: Places, trainable: Bool[Array, "M"]) -> Masks:
        """Independent coin flips at each group's level."""
        levels, coins = jax.random.split(key)
        labels = {
            Scope.ROW: (places.segment * 0,),
            Scope.DOCUMENT: (places.segment,),
            Scope.BLOCK: (places.segment, places.block),
        }[self.scope]
        groups = group_by(*labels, trainable=trainable)
        u = stratified(levels, groups.size > 0, stratum)
        t = self.low + (self.high - self.low) * u
        p = jnp.vectorize(self.schedule.p)(t)[groups.ordinal]
        tries = 10 if self.never_empty else 1
        coin = jax.random.uniform(coins, (tries, trainable.shape[0]))
        masked = trainable & (coin < p)
        first = masked.any(axis=1).argmax()
        masked = masked[first]
        if self.never_empty:
            luckiest = jnp.where(trainable, coin[first], 2.0).argmin()
            forced = trainable & (jnp.arange(trainable.shape[0]) == luckiest)
            masked = jnp.where(masked.any(), masked, forced)
        weight = self.schedule.weight(t)[groups.ordinal]
        return Masks(masked, jnp.where(masked, weight, 0.0))


def enumerated(pattern: Int[Array, ""], places: Places, trainable: Bool[Array, "M"]) -> Masks:
    """Bit r of `pattern` masks every block's r-th trainable token: one term of the exact bound.

    NELBO_b = sum over non-empty subsets M of 1 / (|M| C(B_b, |M|)) sum_{i in M} l_i(M), so the
    weighted losses of the patterns 1 .. 2^B - 1 add up to the bound. Blocks with fewer trainable
    tokens than the pattern's highest bit have no such subset and weigh nothing.
    """
    blocks = group_by(places.segment, places.block, trainable=trainable)
    seen = jnp.cumsum(trainable)
    before = jnp.cumsum(blocks.size) - blocks.size
    rank = seen - 1 - before[blocks.ordinal]
    masked = trainable & ((pattern >> jnp.clip(rank, 0, 30)) & 1).astype(bool)
    n = jnp.bitwise_count(pattern)
    size = blocks.size[blocks.ordinal]
    fits = pattern < (1 << jnp.minimum(size, 30))
    lgamma = jax.lax.lgamma
    a, b = size.astype(jnp.float32), n.astype(jnp.float32)
    choose = jnp.exp(lgamma(a + 1) - lgamma(b + 1) - lgamma(jnp.maximum(a - b, 0) + 1))
    masked &= fits
    return Masks(masked, jnp.where(masked, 1 / (n * jnp.round(choose)), 0.0))


class Corruption(NamedTuple):
    """A noisy view of the clean tokens and what it is scored on."""

    events: Array
    labels: Array
    scored: Bool[Array, "B M"]
    weight: Float[Array, "B M"]


_ROW = ("batch", "length")
_PLACES = Places(*[_ROW] * 5)


@dataclass(frozen=True, kw_only=True)
class Absorbing:
    """Tokens turn into `mask_id` and stay; the network names the token underneath.

    The seam for other processes: `prior` (what a fresh canvas holds) and `corrupt`.
    """

    mask_id: int
    draw: Draw = ExactCount()

    def prior(self, keys: Key[Array, "N W"]) -> Int[Array, "N W"]:
        """A canvas of masks; the keys are for processes whose prior is random."""
        return jnp.full_like(jax.random.key_data(keys)[..., 0], self.mask_id).astype(jnp.int32)

    def corrupt(
        self,
        keys: Key[Array, "B"],
        strata: Float[Array, "B"],
        tokens: Int[Array, "B M"],
        places: Places,
        trainable: Bool[Array, "B M"],
    ) -> Corruption:
        """One noisy view per row. Untrainable tokens (prompts, BOS, padding) stay as they are."""
        return self.apply(self.draw.masks, tokens, places, trainable, keys, strata)

    def enumerate(
        self,
        pattern: Int[Array, ""],
        tokens: Int[Array, "B M"],
        places: Places,
        trainable: Bool[Array, "B M"],
    ) -> Corruption:
        """The noisy view of one mask pattern (`enumerated`), the same in every block."""
        # One pattern per row: a scalar cannot be closed over inside `shard_map`.
        per_row = pattern + places.segment[:, 0] * 0
        return self.apply(enumerated, tokens, places, trainable, per_row)

    def apply(
        self, masks: Callable, tokens, places: Places, trainable, *per_row: Array
    ) -> Corruption:
        """The view that `masks(*per_row, places, trainable)`, called on each row, describes."""

        def run(places, trainable, *per_row):
            return jax.vmap(lambda p, t, *r: masks(*r, p, t))(places, trainable, *per_row)

        specs = (_PLACES, _ROW, *[("batch",)] * len(per_row))
        drawn = per_shard(run, specs, Masks(_ROW, _ROW))(places, trainable, *per_row)
        events = jnp.where(drawn.masked, self.mask_id, tokens)
        return Corruption(events, tokens, drawn.masked, drawn.weight)
