"""Which slots of a canvas to keep at each step: the decoding rules, as frozen pytrees of numbers.

A policy is usually one `select`: from the slots' statistics to the slots that are accepted. Its
numbers are traced, so a sweep compiles once. To write one, subclass `Policy` and decorate with
`@policy`; `numbers` may be scalars or one value per row, shaped (N, 1).
"""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax.stats import Stats

# A Python number, or whatever jax puts in a leaf's place: a traced array, an abstract value.
Number = Any


class View(NamedTuple):
    """What a rule may look at besides the statistics.

    masked: slots still to be filled. step: denoising steps the row has spent on this block. size:
    the row's block size. position: absolute. keys: one per slot, fresh at every step.
    """

    masked: Bool[Array, "N W"]
    step: Int[Array, "N"]
    size: Int[Array, "N"]
    position: Int[Array, "N W"]
    keys: Key[Array, "N W"]


class Update(NamedTuple):
    """What happens to a canvas: new events where `changed`, slots final from now on."""

    events: Array
    changed: Bool[Array, "N W"]
    filled: Bool[Array, "N W"]


def policy(cls):
    """Registers a policy as a pytree: Enum fields are static, all others are traced leaves."""
    frozen = dataclass(frozen=True, kw_only=True)(cls)
    static = [f.name for f in fields(frozen) if isinstance(f.default, Enum)]
    leaves = [f.name for f in fields(frozen) if f.name not in static]
    return jax.tree_util.register_dataclass(frozen, leaves, static)


class Policy:
    """Base of the rules."""

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """The accepted slots; anything outside `view.masked` is ignored."""
        raise NotImplementedError

    def update(self, stats: Stats, view: View, canvas: Array) -> Update:
        """Writes the drawn token into accepted slots, at least one per unfinished row.

        A row whose rule accepts nothing keeps its most probable slot, so every step makes progress.
        """
        accepted = self.select(stats, view) & view.masked
        stuck = ~accepted.any(axis=1, keepdims=True)
        accepted |= stuck & best(stats.prob, view.masked, 1)
        return Update(jnp.where(accepted, stats.token, canvas), accepted, accepted)


def best(score: Float[Array, "N W"], masked: Bool[Array, "N W"], count) -> Bool[Array, "N W"]:
    """The `count` masked slots of highest score per row; ties go to the leftmost."""
    order = jnp.argsort(jnp.where(masked, -score, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return masked & (rank < jnp.asarray(count).reshape(-1, 1))


def quota(view: View, steps) -> Int[Array, "N 1"]:
    """Slots of a static schedule at a step: B // T, one more in the first B mod T steps, >= 1."""
    size, step = view.size[:, None], view.step[:, None]
    steps = jnp.maximum(jnp.asarray(steps, jnp.int32), 1)
    return jnp.maximum(size // steps + (step < size % steps), 1)


@policy
class Sequential(Policy):
    """The leftmost masked slots, `steps` steps per block (SDAR "sequential")."""

    steps: Number

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """As many from the left as the schedule says."""
        return best(-view.position.astype(jnp.float32), view.masked, quota(view, self.steps))


@policy
class Static(Policy):
    """The most probable slots, `steps` steps per block (SDAR "low_confidence_static")."""

    steps: Number

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """As many by confidence as the schedule says."""
        return best(stats.prob, view.masked, quota(view, self.steps))


@policy
class Dynamic(Policy):
    """All slots above a threshold, at least the static schedule's (SDAR "low_confidence_dynamic").

    Strict: prob > threshold. steps = block size asks for at least one slot a step.
    """

    threshold: Number
    steps: Number

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """{prob > threshold} if it is large enough, else the schedule's most probable ones."""
        sure = view.masked & (stats.prob > self.threshold)
        wanted = quota(view, self.steps)
        enough = sure.sum(axis=1, keepdims=True) >= wanted
        return jnp.where(enough, sure, best(stats.prob, view.masked, wanted))


@policy
class Threshold(Policy):
    """All slots with prob >= threshold, or the single most probable one (Fast-dLLM)."""

    threshold: Number

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """{prob >= threshold}; the base class adds the best slot where that is empty."""
        return stats.prob >= self.threshold


class EntropyForm(Enum):
    """What an entropy budget is charged for."""

    EB = "eb"  # all accepted but the most uncertain: bounds the joint error (Ben-Hamu et al. 2025)
    SDAR = "sdar"  # all accepted, strictly below the budget


@policy
class EntropyBounded(Policy):
    """The lowest-entropy slots whose summed entropy stays within `budget` nats."""

    budget: Number
    form: EntropyForm = EntropyForm.EB

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """EB: sum of entropies minus the largest <= budget. SDAR: sum < budget. At least one."""
        entropy = jnp.where(view.masked, stats.entropy, jnp.inf)
        ascending = jnp.sort(entropy, axis=1)
        spent = jnp.cumsum(jnp.where(jnp.isinf(ascending), 0.0, ascending), axis=1)
        if self.form is EntropyForm.EB:
            within = spent - jnp.where(jnp.isinf(ascending), 0.0, ascending) <= self.budget
        else:
            within = spent < self.budget
        within &= jnp.isfinite(ascending)
        count = jnp.maximum(jnp.cumprod(within, axis=1).sum(axis=1, keepdims=True), 1)
        return best(-stats.entropy, view.masked, count)


@policy
class RandomOne(Policy):
    """One uniformly random masked slot a step: the exact sampler of the model (BD3-LM)."""

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """The masked slot with the largest of independent uniform numbers."""
        draw = jax.vmap(jax.vmap(jax.random.uniform))
        return best(draw(view.keys), view.masked, 1)
