"""Numbers that follow time or the step: mask probability p(t), noise-level laws, ramps."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Base of the schedules: p(t) is the probability that a token is masked, rising in t.

    The NELBO weight is p'(t) / p(t) (-alpha'/(1-alpha) of Shi et al. 2024, eq. 5), by autodiff.
    """

    @abstractmethod
    def p(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """Mask probability at time t."""

    def weight(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Nats of bound per nat of masked cross-entropy at times t."""
        slope = jnp.vectorize(jax.grad(self.p))
        return slope(t) / jnp.vectorize(self.p)(t)

    @property
    def finite_at_zero(self) -> bool:
        """Whether the weight stays finite down to t = 0."""
        return False


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


@dataclass(frozen=True, kw_only=True)
class Rescaled(Schedule):
    """`schedule` squeezed into p from eps to 1 - eps: alpha becomes (1 - 2 eps) alpha + eps (MD4).

    The bound misses what the levels outside hold, less than a share of eps times the block's size.
    """

    schedule: Schedule = Linear()
    eps: float = 1e-4

    def __post_init__(self):
        if not 0 < self.eps < 0.5:
            raise ValueError(f"eps={self.eps} must lie between 0 and 0.5; type eps=0.0001")

    def p(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """(1 - 2 eps) p(t) + eps."""
        return (1 - 2 * self.eps) * self.schedule.p(t) + self.eps

    @property
    def finite_at_zero(self) -> bool:
        """p is at least eps."""
        return True


@dataclass(frozen=True, kw_only=True)
class Discrete(Schedule):
    """`schedule` at times n / steps only, n = 1 .. steps (MD4's discrete-time bound).

    Weight steps (p(t) - p(t - 1 / steps)) / p(t): one step masks everything at weight 1, and many
    steps approach p' / p.
    """

    schedule: Schedule = Linear()
    steps: int = 1000

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; type steps=1000")

    def _ends(self, t) -> tuple[Array, Array]:
        """p at both ends of the step that holds t."""
        number = jnp.clip(jnp.floor(t * self.steps), 0, self.steps - 1)
        p = jnp.vectorize(self.schedule.p)
        return p(number / self.steps), p((number + 1) / self.steps)

    def p(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The schedule's p at the end of the step that holds t."""
        return self._ends(t)[1]

    def weight(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """steps (p(end) - p(start)) / p(end)."""
        start, end = self._ends(t)
        return self.steps * (end - start) / end

    @property
    def finite_at_zero(self) -> bool:
        """The first step ends above 0."""
        return True


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """`first` until step `begin`, then straight to `last` at step `end`."""

    first: float
    last: float
    end: int
    begin: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.first) and math.isfinite(self.last)):
            raise ValueError(
                f"first={self.first} last={self.last} must be finite; type first=0.5 last=0.0"
            )
        if not 0 <= self.begin < self.end:
            raise ValueError(
                f"a ramp needs 0 <= begin < end, got begin={self.begin} end={self.end}; "
                f"type end={max(self.begin, 0) + 1000}"
            )

    def at(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The value at a step."""
        share = jnp.clip((step - self.begin) / (self.end - self.begin), 0.0, 1.0)
        return self.first + (self.last - self.first) * share


@dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """Base of the laws of noise levels on [0, 1]."""

    @abstractmethod
    def quantile(self, u: Float[Array, "*n"], step: Int[Array, ""] | int) -> Float[Array, "*n"]:
        """The levels below which shares u of the draws at this step lie."""


@dataclass(frozen=True, kw_only=True)
class Uniform(Law):
    """All levels alike."""

    def quantile(self, u: Float[Array, "*n"], step: Int[Array, ""] | int) -> Float[Array, "*n"]:
        """u itself."""
        return u


@dataclass(frozen=True, kw_only=True)
class Beta(Law):
    """t ~ Beta(mean C, (1 - mean) C), mean and C moving straight over `steps` steps (SDAR-VL).

    A deliberate reweighting of noise levels: the bound is not corrected for it. Mean 0.5 and C = 2
    are the uniform law.
    """

    steps: int
    first_mean: float = 0.5
    last_mean: float = 0.7
    first_concentration: float = 4.0
    last_concentration: float = 25.0

    def __post_init__(self):
        for name in ("first_mean", "last_mean"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must lie between 0 and 1; type {name}=0.5"
                )
        for name in ("first_concentration", "last_concentration"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive; type {name}=4.0")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; type steps=1000")

    def parameters(self, step: Int[Array, ""] | int) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The two parameters of the distribution at a step."""
        mean = Ramp(first=self.first_mean, last=self.last_mean, end=self.steps).at(step)
        size = Ramp(
            first=self.first_concentration, last=self.last_concentration, end=self.steps
        ).at(step)
        return mean * size, (1 - mean) * size

    def quantile(self, u: Float[Array, "*n"], step: Int[Array, ""] | int) -> Float[Array, "*n"]:
        """The regularised incomplete beta function inverted by bisection, to 2^-25."""
        a, b = self.parameters(step)
        a, b = (jnp.broadcast_to(jnp.asarray(x, u.dtype), u.shape) for x in (a, b))

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            below = jax.lax.betainc(a, b, middle) < u
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, 25, halve, (jnp.zeros_like(u), jnp.ones_like(u)))
        return (low + high) / 2
