"""The optimiser, from the parameter table: AdamW, or Muon for the matrices and AdamW beside it.

Which rule a parameter meets follows from its `Role`, never from its rank: stacked layers turn
every vector into a matrix.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bdjax.learning_rate import Decay, Schedule, StableDecay, learning_rate
from bdjax.muon import scale_by_muon
from bdjax.parameters import Role, Table, map_table


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan 2024) for matrices, and the schedule.

    The learning rate rises to `peak_lr` over the first `warmup_fraction` of the steps and falls to
    `final_lr_fraction * peak_lr` as `decay` says. `weight_decay` is multiplied by the learning
    rate and acts on the roles in `decayed`. `clip_norm` bounds the global gradient norm;
    `float("inf")` turns it off. With `muon`, matrices step by their orthogonalised momentum,
    scaled to AdamW's usual size (Liu et al. 2025, 0.2 RMS), so learning rates carry over.
    `accumulate`: pieces that a batch is cut into, one after another, to save memory; the result is
    the same. `ema_decay`: of the average of the weights that evaluation and sampling use, 0 for
    none. A run stops after `max_skipped` non-finite gradients in a row.

    Raises ValueError for a number outside its range.
    """

    peak_lr: float = 1e-3
    warmup_fraction: float = 0.02
    decay: Decay = StableDecay()
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    decayed: tuple[Role, ...] = (Role.MATRIX,)
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    muon: bool = False
    muon_momentum: float = 0.95
    accumulate: int = 1
    ema_decay: float = 0.0
    max_skipped: int = 20

    def __post_init__(self):
        for name in ("b1", "b2", "muon_momentum", "ema_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "0 <= x < 1", "0.95")
        for name, example in (("peak_lr", "1e-3"), ("clip_norm", "1.0"), ("eps", "1e-8")):
            self._check(name, getattr(self, name) > 0, "a number above 0", example)
        self._check("peak_lr", math.isfinite(self.peak_lr), "a finite number", "1e-3")
        self._check("weight_decay", self.weight_decay >= 0, "0 or more", "0.1")
        for name in ("warmup_fraction", "final_lr_fraction"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a fraction from 0 to 1", "0.1")
        for name in ("accumulate", "max_skipped"):
            self._check(name, getattr(self, name) >= 1, "at least 1", "1")

    def _check(self, name: str, holds: bool, expected: str, example: str):
        if not holds:
            raise ValueError(
                f"optim.{name}={getattr(self, name)} must be {expected}; type for example "
                f"optim.{name}={example}"
            )


class OptimiserState(NamedTuple):
    """`steps`: updates applied; `skipped`: updates refused for a non-finite gradient, in all and
    since the last one applied.
    """

    steps: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    inner: Any


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """A direction of unit learning rate, the rate, and the bound on the gradient's norm.

    `roles`: what each parameter is, in the order of the tree's leaves. `accumulate` and `ema_decay`
    as in `OptimConfig`; `bdjax.train_step` reads them.
    """

    direction: optax.GradientTransformation
    rate: Schedule
    clip_norm: float
    roles: tuple[Role, ...]
    accumulate: int = 1
    ema_decay: float = 0.0

    def init(self, params) -> OptimiserState:
        """The state before the first step, sharded as `params`; works under `jax.eval_shape`."""
        zero = jnp.zeros((), jnp.int32)
        return OptimiserState(zero, zero, zero, self.direction.init(params))

    def update(self, grads, state: OptimiserState, params) -> tuple[Any, OptimiserState, dict]:
        """(params, state, metrics) after one step; all three keep their shardings.

        Metrics: `grad_norm` before clipping, `learning_rate`, `skipped_steps` so far and
        `skipped_in_a_row`, and for each role `update_ratio/<role>`, the norm of the update over the
        norm of the weights (0 while these are zero). A gradient that holds an inf or a NaN changes
        nothing but the two counts.
        """
        norm = optax.tree.norm(grads)
        scale = jnp.minimum(1.0, self.clip_norm / norm)
        rate = self.rate(state.steps)
        clipped = jax.tree.map(lambda g: g * scale, grads)
        direction, inner = self.direction.update(clipped, state.inner, params)
        moved = jax.tree.map(lambda p, d: p - rate * d, params, direction)

        finite = jnp.isfinite(norm)
        zero = jnp.zeros((), jnp.int32)
        after = (moved, OptimiserState(state.steps + 1, state.skipped, zero, inner))
        refused = {"skipped": state.skipped + 1, "skipped_in_a_row": state.skipped_in_a_row + 1}
        before = (params, state._replace(**refused))
        old = params
        params, state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)
        metrics = {
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped_steps": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return params, state, metrics | self._update_ratios(old, params)

    def _update_ratios(self, old, new) -> dict[str, Float[Array, ""]]:
        """From what moved: the direction, used a second time, would be written to memory and read
        again (44 bytes a parameter instead of 40, compiled for an H100).
        """
        pairs = zip(self.roles, jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        sums: dict[Role, tuple] = {}
        for role, a, b in pairs:
            moved, weight = sums.get(role, (0.0, 0.0))
            square = _sums((b - a) ** 2, a * a)
            sums[role] = (moved + square[0], weight + square[1])

        def ratio(moved, weight):
            some = weight > 0
            return jnp.where(some, jnp.sqrt(moved / jnp.where(some, weight, 1.0)), 0.0)

        return {f"update_ratio/{role.value}": ratio(*pair) for role, pair in sums.items()}


def _sums(x: Array, y: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums of two arrays in one reduction.

    With two of them XLA's kernel for GPUs cannot write weights where they stood, and copies them.
    """
    zero = jnp.zeros((), x.dtype)
    return jax.lax.reduce(
        (x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim))
    )


def make_optimiser(config: OptimConfig, table: Table, total_steps: int) -> Optimiser:
    """The optimiser of the parameters that `table` describes."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    rule = adam
    if config.muon:
        muon = scale_by_muon(table, momentum=config.muon_momentum)
        matrices = map_table(lambda p: p.role is Role.MATRIX, table)
        rule = optax.partition({True: muon, False: adam}, matrices)
    decayed = map_table(lambda p: p.role in config.decayed, table)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    rate = learning_rate(
        config.decay,
        peak=config.peak_lr,
        warmup_fraction=config.warmup_fraction,
        final_fraction=config.final_lr_fraction,
        total_steps=total_steps,
    )
    return Optimiser(
        direction=optax.chain(rule, decay),
        rate=rate,
        clip_norm=config.clip_norm,
        roles=tuple(jax.tree.leaves(map_table(lambda p: p.role, table))),
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )
