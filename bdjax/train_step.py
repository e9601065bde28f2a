"""One update: corrupt -> block_step -> readout -> loss -> optimiser, in one jitted function."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from bdjax.loss import losses, total
from bdjax.objective import Batch, Objective
from bdjax.optim import Optimiser, OptimiserState
from bdjax.seeds import Purpose, key_for, row_keys
from bdjax.step import Model


class TrainState(NamedTuple):
    """All arrays of a run. `step`: updates tried so far."""

    params: Any
    optimiser: OptimiserState
    step: Int[Array, ""]


@partial(jax.jit, static_argnames=("objective", "model", "optimiser"), donate_argnames="state")
def train_step(
    objective: Objective,
    model: Model,
    optimiser: Optimiser,
    state: TrainState,
    batch: Batch,
    root: Key[Array, ""],
) -> tuple[TrainState, dict[str, Array]]:
    """corrupt -> block_step -> readout -> objective -> optimiser; noise keyed by (root, step)."""
    size = objective.block_size.at(state.step)
    key = key_for(root, Purpose.CORRUPTION, state.step)
    dropout = None
    if model.decoder.dropout > 0:
        own = key_for(root, Purpose.DROPOUT, state.step)
        dropout = row_keys(own, batch.segment.shape[0])

    def loss_of(params):
        parts = losses(objective, model, params, batch, size, key, dropout)
        return total(objective, parts), parts

    (loss, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    params, inner, metrics = optimiser.update(grads, state.optimiser, state.params)
    metrics |= {"loss": loss, "block_size": size, "tokens": batch.trainable.sum()}
    metrics |= {f"loss_{name}": pair.mean for name, pair in parts.items()}
    # The log takes floats: counts are exact up to 2^24 and close enough above.
    metrics = jax.tree.map(lambda x: x.astype(jnp.float32), metrics)
    return TrainState(params, inner, state.step + 1), metrics


def initial_state(seed: int, model: Model, optimiser: Optimiser) -> TrainState:
    """Fresh parameters and optimiser state on the mesh in force."""
    params = model.init(key_for(jax.random.key(seed), Purpose.INIT))
    return TrainState(params, jax.jit(optimiser.init)(params), jnp.zeros((), jnp.int32))
