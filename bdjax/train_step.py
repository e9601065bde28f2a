"""One update: corrupt -> block_step -> readout -> loss -> optimiser, in one jitted function."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from bdjax.levels import BINS
from bdjax.lora import join, split
from bdjax.loss import NOISE_LEVELS, Pair, total, watched_losses
from bdjax.objective import Batch, Objective, Row, training_row
from bdjax.optim import OptimConfig, Optimiser, OptimiserState
from bdjax.seeds import Purpose, key_for, row_keys
from bdjax.step import Model


class NonFiniteError(RuntimeError):
    """Too many gradients in a row held an inf or a NaN; the text is a report."""


class TrainState(NamedTuple):
    """All arrays of a run. `step`: updates tried so far; `ema`: the weights' average, or None.

    frozen: what LoRA does not train, None where everything is trained (`bdjax.lora.split`).
    """

    params: Any
    optimiser: OptimiserState
    step: Int[Array, ""]
    ema: Any = None
    frozen: Any = None

    @property
    def averaged(self) -> Any:
        """The weights that evaluation and sampling use."""
        return join(self.params if self.ema is None else self.ema, self.frozen)


@partial(jax.jit, static_argnames=("objective", "model", "optimiser"), donate_argnames="state")
def train_step(
    objective: Objective,
    model: Model,
    optimiser: Optimiser,
    state: TrainState,
    batch: Batch,
    root: Key[Array, ""],
) -> tuple[TrainState, dict[str, Array]]:
    """corrupt -> block_step -> readout -> objective -> optimiser; noise keyed by (root, step).

    Metrics: those of `Optimiser.update`, `loss` and its parts `loss_diffusion` and `loss_ar` (nats
    per token), `loss_by_noise_*` (`bdjax.loss.NOISE_LEVELS`), `block_size`, `tokens` (scored),
    `padding` (share of the rows).
    """
    size = objective.block_size.at(state.step)
    key = key_for(root, Purpose.CORRUPTION, state.step)
    row = training_row(objective, batch, state.step, key)
    dropout = None
    if model.decoder.dropout > 0:
        own = key_for(root, Purpose.DROPOUT, state.step)
        dropout = row_keys(own, batch.segment.shape[0])
    parts, grads = gradients(
        objective,
        model,
        state.params,
        row,
        dropout,
        state.step,
        pieces=optimiser.accumulate,
        frozen=state.frozen,
    )
    with jax.named_scope("optimiser"):
        params, inner, metrics = optimiser.update(grads, state.optimiser, state.params)
    ema = state.ema
    if ema is not None:
        ema = _average(optimiser.ema_decay, ema, params, state.optimiser.steps, inner.steps)
    loss = total(objective, parts, state.step)
    metrics |= {"loss": loss, "block_size": size, "tokens": batch.trainable.sum()}
    metrics["padding"] = (batch.segment == 0).mean()
    metrics |= {f"loss_{name}": pair.mean for name, pair in parts.items()}
    # The log takes floats: counts are exact up to 2^24 and close enough above.
    metrics = jax.tree.map(lambda x: x.astype(jnp.float32), metrics)
    return TrainState(params, inner, state.step + 1, ema, state.frozen), metrics


def gradients(
    objective: Objective,
    model: Model,
    params,
    row: Row,
    dropout: Key[Array, "B"] | None = None,
    step: Int[Array, ""] | int = 0,
    *,
    pieces: int = 1,
    frozen: Any = None,
) -> tuple[dict[str, Pair], Any]:
    """The parts of the loss on a row and the gradient of their total, `pieces` of it at a time.

    `params` are those that get a gradient, `frozen` the others, as in `TrainState`. Noise and
    counts are those of the whole batch, so the pieces' losses and gradients add up to its own.
    Memory for activations is that of one piece.
    """

    def loss_of(params, row, dropout):
        whole = join(params, frozen)
        parts = watched_losses(model, model.narrow(whole), row, dropout)
        return total(objective, parts, step), parts

    slope = jax.value_and_grad(loss_of, has_aux=True)
    if pieces == 1:
        (_, parts), grads = slope(params, row, dropout)
        return parts, grads

    cut = jax.tree.map(lambda x: _cut(x, pieces), (row, dropout))
    counts = {"diffusion": row.diffusion_count, "ar": row.ar_count}
    counts |= dict.fromkeys(NOISE_LEVELS, row.diffusion_count)

    def add(carry, number):
        numerators, grads = carry
        piece = jax.tree.map(lambda x: x if x.ndim == 0 else x[number], cut)
        (_, parts), more = slope(params, *piece)
        numerators = {name: numerators[name] + parts[name].numerator for name in parts}
        return (numerators, jax.tree.map(jnp.add, grads, more)), None

    names = [name for name in ("diffusion", "ar") if getattr(row, name) is not None]
    zeros = {name: jnp.zeros(()) for name in names}
    if row.diffusion is not None:
        zeros |= {name: jnp.zeros((BINS,)) for name in NOISE_LEVELS}
    start = (zeros, jax.tree.map(jnp.zeros_like, params))
    (numerators, grads), _ = jax.lax.scan(add, start, jnp.arange(pieces))
    return {name: Pair(n, counts[name]) for name, n in numerators.items()}, grads


def _cut(x: Array, pieces: int) -> Array:
    """(B, ...) -> (pieces, B / pieces, ...): every piece takes rows of every device's share."""
    if x.ndim == 0:
        return x
    return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0)


def _average(decay: float, ema, params, before: Int[Array, ""], steps: Int[Array, ""]):
    """ema + (1 - d) (params - ema) after the applied update number `steps`, if there was one.

    d = min(decay, (1 + steps) / (10 + steps)): the first updates are not held back by the
    initialisation.
    """
    now = steps.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + now) / (10 + now))
    applied = steps > before
    return jax.tree.map(lambda a, p: jnp.where(applied, a + share * (p - a), a), ema, params)


def initial_state(seed: int, model: Model, optimiser: Optimiser, base: Any = None) -> TrainState:
    """Fresh parameters and optimiser state on the mesh in force.

    base: parameters to start from, without LoRA's pairs; they become the state's own.
    """
    key = key_for(jax.random.key(seed), Purpose.INIT)
    lora = model.decoder.lora
    if base is None:
        params, frozen = split(model.init(key), lora)
    elif lora is None:
        params, frozen = base, None
    else:
        params, frozen = model.init_trained(key), base
    # A copy: the step gives both trees' buffers away.
    ema = jax.tree.map(jnp.copy, params) if optimiser.ema_decay > 0 else None
    inner = jax.jit(optimiser.init)(params)
    return TrainState(params, inner, jnp.zeros((), jnp.int32), ema, frozen)


class FiniteWatch:
    """Stops a run whose gradients stay non-finite: feed it each step's values, in order."""

    def __init__(self, config: OptimConfig):
        self._config = config
        self._most = config.max_skipped
        self._last: tuple[int, Mapping[str, float]] | None = None

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Raises NonFiniteError with a report after `max_skipped` refused updates in a row."""
        if values["skipped_in_a_row"] == 0:
            self._last = (step, values)
        if values["skipped_in_a_row"] < self._most:
            return
        wrong = [k for k, v in values.items() if k.startswith("loss") and not math.isfinite(v)]
        where = f"{', '.join(wrong)} too" if wrong else "the losses are finite"
        report = (
            f"step {step}: the gradient held an inf or a NaN {self._most} steps in a row "
            f"({where}); the weights are as they were before. "
        )
        if self._last is not None:
            then, last = self._last
            report += (
                f"Last finite step {then}: loss {last['loss']:.4f}, gradient norm "
                f"{last['grad_norm']:.3g}, learning rate {last['learning_rate']:.3g}. "
            )
        raise NonFiniteError(
            report + f"Start again with a lower optim.peak_lr={self._config.peak_lr / 2:.2g}, "
            f"optim.clip_norm={min(self._config.clip_norm, 1.0) / 2:.2g}, a longer "
            "optim.warmup_fraction or model.dtype=float32; the last checkpoint is whole"
        )
