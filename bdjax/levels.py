"""The loss by how noisy the token's own block was: where a model in training is weak."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bdjax.noise import group_by
from bdjax.objective import Row
from bdjax.sharding import per_shard

BINS = 10
_ROW = ("batch", "length")


def by_noise_level(row: Row, nll: Float[Array, "B M"]) -> Float[Array, "3 10"]:
    """Scored tokens, their nats, and their weighted nats, summed over the batch in ten bins.

    nll: of the row's diffusion entries. Bin i holds tokens whose block has a share of scored ones
    in (i / 10, (i + 1) / 10]; the block is that of their own view, all real tokens of it count, so
    BOS and prompts stand for clean ones.
    """
    entries = row.diffusion
    width = entries.rows.shape[1]
    places = row.places
    noisy = (x[:, -width:] for x in (places.stream, places.segment, places.block))
    run = per_shard(jax.vmap(_one_row), (_ROW,) * 6, ("batch", None, None))
    return run(*noisy, entries.scored, entries.weight, nll).sum(axis=0)


def _one_row(stream, segment, block, scored, weight, nll):
    real = segment != 0
    groups = group_by(stream, segment, block, trainable=real)
    size = groups.size[groups.ordinal]
    count = jnp.zeros_like(groups.size).at[groups.ordinal].add(scored)[groups.ordinal]
    # ceil(10 count / size) - 1 in integers: the edges belong to the bin below.
    bins = (BINS * count - 1) // jnp.maximum(size, 1)
    here = (bins[:, None] == jnp.arange(BINS)) & scored[:, None]
    values = jnp.stack([jnp.ones_like(nll), nll, weight * nll])
    return jnp.where(here, values[:, :, None], 0.0).sum(axis=1)
