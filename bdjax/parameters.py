"""Parameters described once: shape, meaning of the axes, initialiser, role.

From this table follow initialisation, shardings, optimiser roles, checkpoints and importers.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from bdjax import sharding


class Role(Enum):
    """What a parameter is to the optimiser: decay and Muon go by role, never by rank."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One array of the model.

    `axes` gives the meaning of every axis (`sharding.RULES`); `contracted` lists the axes that
    the forward pass sums over (a matrix's inputs). `init(key, shape, dtype, out_sharding=...)`
    is a jax.nn initialiser. Masters are float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Callable
    role: Role
    contracted: tuple[int, ...] = field(default=())

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank")


Table = dict[str, "Parameter | Table"]


def is_parameter(node) -> bool:
    """Leaf test for tree functions over a table."""
    return isinstance(node, Parameter)


def map_table(function: Callable[[Parameter], object], table: Table):
    """`function` applied to every Parameter of a nested table."""
    return jax.tree.map(function, table, is_leaf=is_parameter)


def initialise(table: Table, key: PRNGKeyArray):
    """Float32 arrays for `table`, sharded as it says; each key folds in the parameter's path.

    Call it under `jax.jit`, so that every array is born in its shards.
    """

    def one(path, parameter: Parameter):
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return parameter.init(
            own, parameter.shape, jnp.float32, out_sharding=sharding.spec(*parameter.axes)
        )

    return jax.tree_util.tree_map_with_path(one, table, is_leaf=is_parameter)


def count(table: Table) -> int:
    """Number of scalars in the table."""
    leaves = jax.tree.leaves(table, is_leaf=is_parameter)
    total = 0
    for leaf in leaves:
        size = 1
        for n in leaf.shape:
            size *= n
        total += size
    return total
