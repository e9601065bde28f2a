"""Likelihood of held-out text: the diffusion bound, with standard errors, and the AR model's."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from bdjax.data import RowBatch
from bdjax.loss import token_losses
from bdjax.noise import ExactCount
from bdjax.objective import Batch, Normaliser, Objective, build_row, corruptions, places_of
from bdjax.seeds import Purpose, key_for
from bdjax.sharding import from_host, own_rows, reshard, spec
from bdjax.step import Model

# 2^B - 1 forwards give the exact bound of blocks of B tokens.
EXACT_UP_TO = 4


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Nats summed over held-out rows; `se` is the standard error over rows, given the draws."""

    nats_per_token: float
    nats_se: float
    bits_per_byte: float
    bits_se: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """diffusion: upper bound on -log p (None without views). ar: the clean stream's own likelihood
    (None unless it was trained). exact: the bound enumerates every mask pattern.
    """

    block_size: int
    exact: bool
    draws: int
    tokens: int
    bytes: int
    diffusion: Likelihood | None
    ar: Likelihood | None

    def scalars(self) -> dict[str, float]:
        """Means and their standard errors by name, as in "evaluation/diffusion_bits_per_byte"."""
        return {
            f"evaluation/{part}_{name}": value
            for part in ("diffusion", "ar")
            if getattr(self, part) is not None
            for name, value in asdict(getattr(self, part)).items()
        }

    def __str__(self):
        how = "exact" if self.exact else f"{self.draws} draw(s) per row"
        lines = [f"held-out {self.bytes} bytes, {self.tokens} tokens, block size {self.block_size}"]
        for name, found in (("diffusion bound", self.diffusion), ("AR likelihood", self.ar)):
            if found is not None:
                detail = f", {how}" if name == "diffusion bound" else ""
                lines.append(
                    f"{name}: {found.bits_per_byte:.4f} +- {found.bits_se:.4f} bits/byte, "
                    f"{found.nats_per_token:.4f} +- {found.nats_se:.4f} nats/token{detail}"
                )
        return "\n".join(lines)


class RowSums(NamedTuple):
    """Per row: nats of the bound and of the AR model, scored tokens and their bytes."""

    diffusion: Float[Array, "B"]
    ar: Float[Array, "B"]
    tokens: Int[Array, "B"]
    bytes: Int[Array, "B"]


def to_device(batch: RowBatch, rows: int | None = None) -> Batch:
    """The arrays of a host batch, split over the mesh in force.

    Of `rows` rows in all, the batch holds those of this process (`sharding.own_rows`); without
    `rows` it holds all of them, the same in every process.
    """
    if rows is None:
        rows = len(batch["tokens"])
        own = own_rows(rows)
        batch = {name: x[own] for name, x in batch.items()}
    return Batch(*(from_host(batch[name], rows, "batch", "length") for name in Batch._fields))


@partial(jax.jit, static_argnames=("objective", "model"))
def evaluate_batch(
    objective: Objective,
    model: Model,
    params,
    batch: Batch,
    block_size: Int[Array, ""],
    key: Key[Array, ""],
    pattern: Int[Array, ""] | None,
    token_bytes: Int[Array, "V"],
) -> RowSums:
    """One forward's sums: of a fresh draw, or of one mask pattern if `pattern` is given."""
    places = places_of(objective, batch, block_size)
    if objective.views == 0:
        views = []
    elif pattern is None:
        views = corruptions(objective, batch, places, key)
    else:
        process = objective.process
        views = [process.enumerate(pattern, batch.tokens, places, batch.trainable)]
    row = build_row(objective, batch, block_size, views)
    diffusion, ar = token_losses(model, params, row)
    zero = batch.trainable.sum(axis=1) * 0.0
    size_of = token_bytes.at[batch.tokens]
    sizes = size_of.get(mode="clip", out_sharding=spec("batch", "length"))
    counted = jnp.where(batch.trainable, sizes, 0)
    sums = RowSums(
        zero if diffusion is None else (row.diffusion.weight * diffusion).sum(axis=1),
        zero if ar is None else (row.ar.weight * ar).sum(axis=1),
        batch.trainable.sum(axis=1),
        counted.sum(axis=1),
    )
    # Every process reads all rows.
    return jax.tree.map(lambda x: reshard(x, None), sums)


def scoring(objective: Objective) -> Objective:
    """The objective as evaluation uses it: one view, drawn by the unbiased exact counts, summed.

    What training draws, weighs and divides by may be biased on purpose; the bound is the same.
    """
    process = replace(objective.process, draw=ExactCount())
    return replace(
        objective,
        process=process,
        views=min(objective.views, 1),
        normaliser=Normaliser.TRAINABLE,
    )


def evaluate(
    objective: Objective,
    model: Model,
    params,
    batches: Iterable[RowBatch],
    token_bytes: Int[np.ndarray, "V"],
    *,
    block_size: int | None = None,
    draws: int = 1,
    exact: bool = False,
    seed: int = 0,
) -> Evaluation:
    """The bound in nats per token and bits per byte on all of `batches`.

    exact: sums over all mask patterns (block_size <= EXACT_UP_TO), else the mean over `draws` draws
    per row. Noise is a function of (seed, batch, draw, row). Raises ValueError for a block size
    below 1, an exact bound of larger blocks, fewer than one draw, or no rows.
    """
    size = objective.block_size.largest if block_size is None else block_size
    if size < 1:
        raise ValueError(f"block_size={size} must be at least 1; type --block-size 1 or more")
    if exact and size > EXACT_UP_TO:
        raise ValueError(
            f"an exact bound of block size {size} needs {2**size - 1} forwards per batch; "
            f"type --block-size {EXACT_UP_TO} or less, or --draws 8 in place of --exact"
        )
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1; type --draws 1")
    objective = scoring(objective)
    root = key_for(jax.random.key(seed), Purpose.EVALUATION)
    bytes_of = jnp.asarray(token_bytes)
    run = partial(evaluate_batch, objective, model, params)
    patterns = list(range(1, 2**size)) if exact and objective.views else [None] * draws
    rows = []
    for index, host in enumerate(batches):
        batch = to_device(host)
        own = jax.random.fold_in(root, index)
        sums = [
            run(
                batch,
                jnp.int32(size),
                jax.random.fold_in(own, number),
                None if pattern is None else jnp.int32(pattern),
                bytes_of,
            )
            for number, pattern in enumerate(patterns)
        ]
        every = [np.stack([np.asarray(s[field], np.float64) for s in sums]) for field in range(4)]
        bound = every[0].sum(axis=0) if exact else every[0].mean(axis=0)
        rows.append(np.stack([bound, every[1][0], every[2][0], every[3][0]], axis=1))
    if not rows:
        raise ValueError("nothing to evaluate: no held-out rows")
    table = np.concatenate(rows)
    table = table[table[:, 2] > 0]
    return Evaluation(
        block_size=size,
        exact=exact,
        draws=draws,
        tokens=int(table[:, 2].sum()),
        bytes=int(table[:, 3].sum()),
        diffusion=_likelihood(table, 0) if objective.views else None,
        ar=_likelihood(table, 1) if objective.scores_ar else None,
    )


def _likelihood(table: Float[np.ndarray, "R 4"], column: int) -> Likelihood:
    nats, tokens, bytes_ = table[:, column], table[:, 2], table[:, 3]
    per_token, per_token_se = _ratio(nats, tokens)
    per_byte, per_byte_se = _ratio(nats / math.log(2), bytes_)
    return Likelihood(
        nats_per_token=per_token, nats_se=per_token_se, bits_per_byte=per_byte, bits_se=per_byte_se
    )


def _ratio(top: Float[np.ndarray, "R"], bottom: Float[np.ndarray, "R"]) -> tuple[float, float]:
    """sum(top) / sum(bottom) and its standard error over rows (ratio estimator, linearised)."""
    total = bottom.sum()
    ratio = top.sum() / total
    rows = len(top)
    if rows < 2:
        return float(ratio), float("nan")
    spread = ((top - ratio * bottom) ** 2).sum() * rows / (rows - 1)
    return float(ratio), float(math.sqrt(spread) / total)
