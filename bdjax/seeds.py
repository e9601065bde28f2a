"""Randomness is a function of (seed, step, purpose, row): nothing is split off and carried."""

from enum import IntEnum

import jax
from jaxtyping import Array, Int, Key

from bdjax import sharding


class Purpose(IntEnum):
    """What a key is for. Numbers are part of reproducibility: never reuse one."""

    INIT = 0
    CORRUPTION = 1
    SAMPLING = 3
    EVALUATION = 4
    DROPOUT = 5


def key_for(
    root: Key[Array, ""], purpose: Purpose, step: int | Int[Array, ""] = 0
) -> Key[Array, ""]:
    """The key of a purpose at a step."""
    return jax.random.fold_in(jax.random.fold_in(root, step), int(purpose))


def row_keys(key: Key[Array, ""], rows: int) -> Key[Array, "B"]:
    """One key per global row, the same on every mesh."""
    ids = sharding.reshard(jax.numpy.arange(rows), "batch")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
