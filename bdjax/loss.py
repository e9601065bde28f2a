"""Losses out of rows, as (numerator, denominator): divide only after summing over everything."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bdjax.levels import by_noise_level
from bdjax.objective import (
    Batch,
    Objective,
    Row,
    Scored,
    build_row,
    corruptions,
    places_of,
)
from bdjax.step import Model, block_step

# Scored tokens, nats and weighted nats in ten bins of the noise level, each over the same count as
# the diffusion loss: the bins of the last add up to it.
NOISE_LEVELS = ("by_noise_tokens", "by_noise_nll", "by_noise_bound")


class Pair(NamedTuple):
    """A loss as numerator and denominator; divide only after summing over everything."""

    numerator: Float[Array, "*n"]
    denominator: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, "*n"]:
        """Numerator / denominator, 0 when nothing was counted."""
        return self.numerator / jnp.maximum(self.denominator, 1.0)


def token_losses(
    model: Model, params, row: Row, dropout: Key[Array, "B"] | None = None
) -> tuple[Float[Array, "B R"] | None, Float[Array, "B A"] | None]:
    """Unweighted NLLs of the row's diffusion and AR entries: one forward, one readout call."""
    hidden, _ = block_step(model, params, row.tokens, row.places, dropout=dropout)
    parts = [part for part in (row.diffusion, row.ar) if part is not None]
    joined = Scored(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
    nll = model.readout.nll(params, hidden, joined.rows, joined.labels, joined.scored)
    if row.diffusion is None:
        return None, nll
    cut = row.diffusion.rows.shape[1]
    return nll[:, :cut], nll[:, cut:] if row.ar is not None else None


def row_losses(
    model: Model, params, row: Row, dropout: Key[Array, "B"] | None = None
) -> dict[str, Pair]:
    """The parts on one row, if trained: "diffusion" (nats of bound) and "ar" (nats)."""
    return _parts(row, *token_losses(model, params, row, dropout))


def watched_losses(
    model: Model, params, row: Row, dropout: Key[Array, "B"] | None = None
) -> dict[str, Pair]:
    """`row_losses` and, with the diffusion, `NOISE_LEVELS`, which `total` ignores."""
    diffusion, ar = token_losses(model, params, row, dropout)
    parts = _parts(row, diffusion, ar)
    if diffusion is not None:
        for name, sums in zip(NOISE_LEVELS, by_noise_level(row, diffusion), strict=True):
            parts[name] = Pair(sums, row.diffusion_count)
    return parts


def _parts(row: Row, diffusion, ar) -> dict[str, Pair]:
    parts = {}
    if diffusion is not None:
        parts["diffusion"] = Pair((row.diffusion.weight * diffusion).sum(), row.diffusion_count)
    if ar is not None:
        parts["ar"] = Pair((row.ar.weight * ar).sum(), row.ar_count)
    return parts


def losses(
    objective: Objective,
    model: Model,
    params,
    batch: Batch,
    block_size,
    key: Key[Array, ""],
    dropout: Key[Array, "B"] | None = None,
) -> dict[str, Pair]:
    """The parts on one batch under fresh noise; `dropout`: one key per row, None for none."""
    places = places_of(objective, batch, block_size)
    row = build_row(objective, batch, block_size, corruptions(objective, batch, places, key))
    return row_losses(model, params, row, dropout)


def total(
    objective: Objective, parts: dict[str, Pair], step: Int[Array, ""] | int = 0
) -> Float[Array, ""]:
    """What a step minimises: the diffusion mean plus ar_weight times the AR mean, nats."""
    loss = jnp.zeros(())
    if "diffusion" in parts:
        loss += parts["diffusion"].mean
    if "ar" in parts:
        loss += objective.ar_weight_at(step) * parts["ar"].mean
    return loss
