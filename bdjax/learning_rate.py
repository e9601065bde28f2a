"""The learning rate as a function of the step: a warm-up, and how the rest falls."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class Decay(ABC):
    """Base of the shapes after the warm-up."""

    @abstractmethod
    def fallen(self, step: Float[Array, ""], warmup: int, total_steps: int) -> Float[Array, ""]:
        """0 at the peak, 1 at the final rate; `step` counts from 0 and is at least `warmup`."""


@dataclass(frozen=True, kw_only=True)
class StableDecay(Decay):
    """Warm-up, stable, decay (WSD, Hu et al. 2024): flat, then linear from the share `start` on.

    Raises ValueError for a start outside 0..1.
    """

    start: float = 0.8

    def __post_init__(self):
        if not 0 <= self.start <= 1:
            raise ValueError(
                f"optim.decay.start={self.start} must be a fraction from 0 to 1; type "
                "optim.decay.start=0.8"
            )

    def fallen(self, step: Float[Array, ""], warmup: int, total_steps: int) -> Float[Array, ""]:
        """(step - start) / (total - start)."""
        start = max(round(self.start * total_steps), warmup)
        return jnp.clip((step - start) / max(1, total_steps - start), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class CosineDecay(Decay):
    """Half a cosine from the end of the warm-up to the last step (Loshchilov & Hutter 2017)."""

    def fallen(self, step: Float[Array, ""], warmup: int, total_steps: int) -> Float[Array, ""]:
        """(1 - cos(pi x)) / 2 over x = (step - warmup) / (total - warmup)."""
        share = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        return (1 - jnp.cos(math.pi * share)) / 2


def learning_rate(
    decay: Decay, *, peak: float, warmup_fraction: float, final_fraction: float, total_steps: int
) -> Schedule:
    """The rate of step 0, 1, ..., total_steps - 1; later steps keep the final rate.

    With W warm-up steps the first is peak / W, the W-th the peak (no step is spent at zero); the
    decay would reach `final_fraction * peak` at step `total_steps`. Raises ValueError for
    total_steps below 1.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be at least 1")
    warmup = max(1, round(warmup_fraction * total_steps))

    def rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        now = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((now + 1) / warmup, 1.0)
        return peak * rise * (1 - (1 - final_fraction) * decay.fallen(now, warmup, total_steps))

    return rate
