"""Draws: which trainable tokens of a row are masked and what each masked token's loss weighs.

They run per device on local rows; their noise is a function of the row's key.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax.layout import Places
from bdjax.schedules import Law, Linear, Schedule, Uniform

# Flips until every group's share lies in the band; what is left then has a chance below 1e-8.
_MOST_FLIPS = 100


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

    def count(self, chosen: Bool[Array, "M"]) -> Int[Array, "M"]:
        """Chosen tokens of each group."""
        return jnp.zeros_like(self.size).at[self.ordinal].add(chosen)


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
class Draw(ABC):
    """Base of the draws; `masks` handles one row."""

    @abstractmethod
    def masks(
        self,
        key: Key[Array, ""],
        stratum: Float[Array, ""],
        places: Places,
        trainable: Bool[Array, "M"],
        step: Int[Array, ""] | int,
        tokens: Int[Array, "M"],
    ) -> Masks:
        """The row's masks at a training step. `places` fields are (M,)."""


@dataclass(frozen=True, kw_only=True)
class ExactCount(Draw):
    """n masked tokens in a block of B trainable ones, n uniform on 1..B, weight B / n.

    Unbiased for the NELBO (reference estimator: training notes 2.3), never empty; the counts of a
    row's blocks are stratified.
    """

    def masks(self, key, stratum, places: Places, trainable, step, tokens) -> Masks:
        """n_b = 1 + floor(u_b B_b) of block b's tokens, chosen uniformly."""
        counts, ranks = jax.random.split(key)
        blocks = group_by(places.segment, places.block, trainable=trainable)
        u = stratified(counts, blocks.size > 0, stratum)
        n = jnp.minimum(1 + jnp.floor(u * blocks.size).astype(jnp.int32), blocks.size)
        masked = trainable & (rank_in_group(ranks, blocks, trainable) < n[blocks.ordinal])
        weight = (blocks.size / jnp.maximum(n, 1))[blocks.ordinal]
        return Masks(masked, jnp.where(masked, weight, 0.0))


class Scope(Enum):
    """Which tokens share one noise level."""

    ROW = "row"
    DOCUMENT = "document"
    BLOCK = "block"

    def groups(self, places: Places, trainable: Bool[Array, "M"]) -> Groups:
        """The row's tokens by shared level."""
        labels = {
            Scope.ROW: (places.segment * 0,),
            Scope.DOCUMENT: (places.segment,),
            Scope.BLOCK: (places.segment, places.block),
        }[self]
        return group_by(*labels, trainable=trainable)


@dataclass(frozen=True, kw_only=True)
class Weighting(ABC):
    """Base of the ways to weigh a masked token; `Bernoulli` calls it with what it drew."""

    @abstractmethod
    def weights(
        self,
        bound: Float[Array, "M"],
        masked: Bool[Array, "M"],
        groups: Groups,
        places: Places,
    ) -> Float[Array, "M"]:
        """Weights of all tokens, read where they are masked. bound: each token's p' / p."""


@dataclass(frozen=True, kw_only=True)
class Bound(Weighting):
    """p' / p: unbiased for the NELBO if all levels are drawn alike."""

    def weights(self, bound, masked, groups: Groups, places: Places):
        """The schedule's own."""
        return bound


@dataclass(frozen=True, kw_only=True)
class Realised(Weighting):
    """B / n of the n tokens masked among the group's B (SDAR-VL's effective mask ratio).

    B / (B + 1) of the NELBO under uniform levels: a group without a mask counts nothing.
    """

    def weights(self, bound, masked, groups: Groups, places: Places):
        """Group size over masked count."""
        share = groups.size / jnp.maximum(groups.count(masked), 1)
        return share[groups.ordinal]


@dataclass(frozen=True, kw_only=True)
class Flat(Weighting):
    """1 for every masked token (Fast-dLLM v2, LLaDA2's published trainer)."""

    def weights(self, bound, masked, groups: Groups, places: Places):
        """Ones."""
        return jnp.ones_like(bound)


@dataclass(frozen=True, kw_only=True)
class Cart(Weighting):
    """Half the sum of p (1 - p)^(d - 1) over the document's unmasked tokens at distances d.

    Dream's context-adaptive weights: tokens near visible ones count more.
    """

    p: float = 0.3

    def __post_init__(self):
        if not 0 < self.p < 1:
            raise ValueError(f"p={self.p} must lie between 0 and 1; type p=0.3")

    def weights(self, bound, masked, groups: Groups, places: Places):
        """Two linear scans, one from either side."""
        visible = (~masked & (places.segment != 0)).astype(bound.dtype)

        def from_left(visible, segment):
            follows = (segment == jnp.roll(segment, 1)).at[0].set(False)
            before = jnp.where(follows, jnp.roll(visible, 1), 0.0)
            keep = jnp.where(follows, 1 - self.p, 0.0)

            def chain(first, then):
                return first[0] * then[0], first[1] * then[0] + then[1]

            return jax.lax.associative_scan(chain, (keep, before))[1]

        left = from_left(visible, places.segment)
        right = from_left(visible[::-1], places.segment[::-1])[::-1]
        return self.p / 2 * (left + right)


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Draw):
    """Each trainable token masked with probability p(t); one t per `scope`.

    t = low + (high - low) q(u), q the `law`'s quantile and u stratified over the row (over the
    batch if a row has one level); clipping [low, high] biases the bound, in training only (BD3-LM).
    block_floor: t is at least 1 / B of the group's B trainable tokens (Stable-DiffCoder).
    resample: groups whose masked share leaves [low, high] are flipped again (BD3-LM).
    never_empty: a row is flipped up to ten times until one token is masked, then one is forced
    (SDAR). forced: trainable tokens of these ids are always masked (SDAR-VL's `<think>`).
    """

    schedule: Schedule = Linear()
    scope: Scope = Scope.BLOCK
    law: Law = Uniform()
    weight: Weighting = Bound()
    low: float = 1e-3
    high: float = 1.0
    block_floor: bool = False
    resample: bool = False
    never_empty: bool = False
    forced: tuple[int, ...] = ()

    def __post_init__(self):
        from_zero = self.low == 0 and self.schedule.finite_at_zero
        if not (self.low > 0 or from_zero) or not self.low < self.high <= 1:
            raise ValueError(
                f"noise levels need 0 < low < high <= 1, got low={self.low} high={self.high}; "
                "type low=0.001 high=1.0 for the whole range"
            )
        if self.resample and self.never_empty:
            raise ValueError(
                "resample=True and never_empty=True are two rules for the same rows; "
                "type never_empty=False"
            )

    def levels(self, u: Float[Array, "M"], groups: Groups, step) -> Float[Array, "M"]:
        """The time t of each group."""
        t = self.low + (self.high - self.low) * self.law.quantile(u, step)
        if self.block_floor:
            t = jnp.maximum(t, 1 / jnp.maximum(groups.size, 1))
        return t

    def masks(self, key, stratum, places: Places, trainable, step, tokens) -> Masks:
        """Independent coin flips at each group's level."""
        levels, coins = jax.random.split(key)
        groups = self.scope.groups(places, trainable)
        t = self.levels(stratified(levels, groups.size > 0, stratum), groups, step)
        p = jnp.vectorize(self.schedule.p)(t)[groups.ordinal]
        flip = self._flip_within if self.resample else self._flip
        masked = flip(coins, p, groups, trainable)
        if self.forced:
            masked |= trainable & jnp.isin(tokens, jnp.asarray(self.forced))
        bound = self.schedule.weight(t)[groups.ordinal]
        weight = self.weight.weights(bound, masked, groups, places)
        return Masks(masked, jnp.where(masked, weight, 0.0))

    def _flip(self, key, p, groups: Groups, trainable) -> Bool[Array, "M"]:
        tries = 10 if self.never_empty else 1
        coin = jax.random.uniform(key, (tries, trainable.shape[0]))
        masked = trainable & (coin < p)
        first = masked.any(axis=1).argmax()
        masked = masked[first]
        if self.never_empty:
            luckiest = jnp.where(trainable, coin[first], 2.0).argmin()
            forced = trainable & (jnp.arange(trainable.shape[0]) == luckiest)
            masked = jnp.where(masked.any(), masked, forced)
        return masked

    def _flip_within(self, key, p, groups: Groups, trainable) -> Bool[Array, "M"]:
        fewest = jnp.ceil(self.low * groups.size - 1e-4)
        most = jnp.floor(self.high * groups.size + 1e-4)
        possible = (fewest <= most) & (groups.size > 0)

        def outside(masked):
            n = groups.count(masked)
            return possible & ((n < fewest) | (n > most))

        def flip(number):
            own = jax.random.fold_in(key, number)
            return trainable & (jax.random.uniform(own, p.shape) < p)

        def again(state):
            number, masked = state
            return number + 1, jnp.where(outside(masked)[groups.ordinal], flip(number), masked)

        def unfinished(state):
            number, masked = state
            return (number < _MOST_FLIPS) & outside(masked).any()

        return jax.lax.while_loop(unfinished, again, (jnp.int32(1), flip(0)))[1]


@dataclass(frozen=True, kw_only=True)
class Complement(Draw):
    """`draw`, and as every second view exactly the trainable tokens that it left (Fast-dLLM v2).

    Both views of a pair weigh flatly or by the realised share: p' / p of one level is not that of
    what it left.
    """

    draw: Bernoulli = Bernoulli(weight=Flat())

    def __post_init__(self):
        if not isinstance(self.draw.weight, Flat | Realised):
            raise ValueError(
                f"draw.weight={type(self.draw.weight).__name__} has no complement; "
                "type draw.weight=Flat"
            )
        if self.draw.forced:
            raise ValueError(
                f"draw.forced={self.draw.forced} masks tokens in both views of a complement; "
                "type draw.forced=()"
            )

    def masks(self, key, stratum, places: Places, trainable, step, tokens) -> Masks:
        """The first view of a pair."""
        return self.draw.masks(key, stratum, places, trainable, step, tokens)

    def rest(self, first: Bool[Array, "M"], places: Places, trainable: Bool[Array, "M"]) -> Masks:
        """The second view of a pair whose first one masks `first`."""
        masked = trainable & ~first
        groups = self.draw.scope.groups(places, trainable)
        weight = self.draw.weight.weights(jnp.ones(masked.shape), masked, groups, places)
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
