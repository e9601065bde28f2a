"""Processes: what noise does to tokens. The objective talks to these; draws and schedules below.

Everything a config needs of `bdjax.draws` and `bdjax.schedules` can be imported from here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax.draws import (
    Bernoulli,
    Bound,
    Cart,
    Complement,
    Draw,
    ExactCount,
    Flat,
    Masks,
    Realised,
    Scope,
    enumerated,
    group_by,
)
from bdjax.layout import Places
from bdjax.schedules import (
    Beta,
    Cosine,
    Discrete,
    Linear,
    LogLinear,
    Polynomial,
    Ramp,
    Rescaled,
    Uniform,
)
from bdjax.sharding import per_shard

__all__ = [
    "Absorbing",
    "Bernoulli",
    "Beta",
    "Bound",
    "Cart",
    "Complement",
    "Corruption",
    "Cosine",
    "Discrete",
    "Draw",
    "ExactCount",
    "Flat",
    "Linear",
    "LogLinear",
    "Masks",
    "Polynomial",
    "Process",
    "Ramp",
    "Realised",
    "Rescaled",
    "Scope",
    "Uniform",
    "enumerated",
    "group_by",
]


class Corruption(NamedTuple):
    """A noisy view of the clean tokens and what it is scored on."""

    events: Array
    labels: Array
    scored: Bool[Array, "B M"]
    weight: Float[Array, "B M"]


@dataclass(frozen=True, kw_only=True)
class Process(ABC):
    """What corrupts and what a fresh canvas holds. `Absorbing` masks; others may add noise."""

    @property
    def paired(self) -> bool:
        """Whether every second view is made of the one before it, by `rest`."""
        return False

    @abstractmethod
    def prior(self, keys: Key[Array, "N W"]) -> Array:
        """A fresh canvas of N rows of W slots."""

    @abstractmethod
    def corrupt(
        self,
        keys: Key[Array, "B"],
        strata: Float[Array, "B"],
        tokens: Array,
        places: Places,
        trainable: Bool[Array, "B M"],
        step: Int[Array, ""] | int,
    ) -> Corruption:
        """One noisy view per row at a training step; untrainable tokens stay as they are."""

    def rest(
        self, first: Corruption, tokens: Array, places: Places, trainable: Bool[Array, "B M"]
    ) -> Corruption:
        """The view that goes with `first`, if the process is `paired`."""
        raise NotImplementedError(f"{type(self).__name__} draws no pairs of views")

    def enumerate(
        self,
        pattern: Int[Array, ""],
        tokens: Array,
        places: Places,
        trainable: Bool[Array, "B M"],
    ) -> Corruption:
        """The view of one of finitely many patterns whose weighted losses sum to the bound."""
        raise NotImplementedError(f"{type(self).__name__} has no finite sum for its bound")


_ROW = ("batch", "length")
_PLACES = Places(*[_ROW] * 5)


@dataclass(frozen=True, kw_only=True)
class Absorbing(Process):
    """Tokens turn into `mask_id` and stay; the network names the token underneath."""

    mask_id: int
    draw: Draw = ExactCount()

    @property
    def paired(self) -> bool:
        """Complementary views come in pairs."""
        return isinstance(self.draw, Complement)

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
        step: Int[Array, ""] | int = 0,
    ) -> Corruption:
        """One noisy view per row. Untrainable tokens (prompts, BOS, padding) stay as they are."""

        def masks(places, trainable, tokens, key, stratum, step):
            return self.draw.masks(key, stratum, places, trainable, step, tokens)

        return self._apply(masks, tokens, places, trainable, keys, strata, _per_row(step, places))

    def rest(
        self,
        first: Corruption,
        tokens: Int[Array, "B M"],
        places: Places,
        trainable: Bool[Array, "B M"],
    ) -> Corruption:
        """The view of the trainable tokens that `first` left."""

        def masks(places, trainable, first):
            return self.draw.rest(first, places, trainable)

        specs = (_PLACES, _ROW, _ROW)
        drawn = per_shard(jax.vmap(masks), specs, Masks(_ROW, _ROW))(
            places, trainable, first.scored
        )
        return self._view(drawn, tokens)

    def enumerate(
        self,
        pattern: Int[Array, ""],
        tokens: Int[Array, "B M"],
        places: Places,
        trainable: Bool[Array, "B M"],
    ) -> Corruption:
        """The noisy view of one mask pattern (`enumerated`), the same in every block."""

        def masks(places, trainable, tokens, pattern):
            return enumerated(pattern, places, trainable)

        return self._apply(masks, tokens, places, trainable, _per_row(pattern, places))

    def _apply(
        self, masks: Callable, tokens, places: Places, trainable, *per_row: Array
    ) -> Corruption:
        """The view that `masks(places, trainable, tokens, *per_row)`, on each row, describes."""
        specs = (_PLACES, _ROW, _ROW, *[("batch",)] * len(per_row))
        run = per_shard(jax.vmap(masks), specs, Masks(_ROW, _ROW))
        return self._view(run(places, trainable, tokens, *per_row), tokens)

    def _view(self, drawn: Masks, tokens) -> Corruption:
        events = jnp.where(drawn.masked, self.mask_id, tokens)
        return Corruption(events, tokens, drawn.masked, drawn.weight)


def _per_row(number, places: Places) -> Int[Array, "B"]:
    """One number per row: a scalar cannot be closed over inside `shard_map`."""
    return number + places.segment[:, 0] * 0
