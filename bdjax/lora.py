"""LoRA: a low-rank pair beside each of some matrices; the matrices themselves stay as they are.

W x becomes W x + (alpha / rank) B (A x), with A of shape (inputs, rank) and B (rank, outputs), each
sharded as W's inputs and outputs are (Hu et al. 2021). B starts at zero: the first step sees W.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bdjax.parameters import Parameter, Role, Table
from bdjax.sharding import spec

TARGETS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Rank and scale of the pairs, and the matrices that get one; all else is frozen.

    Raises ValueError for a number outside its range and for an unknown or doubled target.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1; type lora.rank=16")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha={self.alpha} must be above 0; type lora.alpha=32")
        wrong = [name for name in self.targets if name not in TARGETS]
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets={','.join(self.targets)} must be some of {', '.join(TARGETS)}, each "
                "once; type lora.targets=wq,wv"
            )

    @property
    def scale(self) -> float:
        """What the product of a pair is multiplied by."""
        return self.alpha / self.rank


def pair_names(target: str) -> tuple[str, str]:
    """Under which names A and B of a matrix stand beside it."""
    return f"{target}_lora_a", f"{target}_lora_b"


def with_pairs(table: Table, lora: LoraConfig) -> Table:
    """The table of one layer with the targets' pairs; a matrix lists its inputs first."""
    found = dict(table)
    for target in lora.targets:
        w = table[target]
        assert isinstance(w, Parameter) and w.contracted == tuple(range(len(w.contracted)))
        inputs = len(w.contracted)
        a, b = pair_names(target)
        found[a] = Parameter(
            shape=(*w.shape[:inputs], lora.rank),
            axes=(*w.axes[:inputs], "rank"),
            init=jax.nn.initializers.variance_scaling(
                1.0, "fan_in", "normal", in_axis=w.contracted, out_axis=inputs
            ),
            role=Role.ADAPTER,
            contracted=w.contracted,
        )
        found[b] = Parameter(
            shape=(lora.rank, *w.shape[inputs:]),
            axes=("rank", *w.axes[inputs:]),
            init=jax.nn.initializers.zeros,
            role=Role.ADAPTER,
            contracted=(0,),
        )
    return found


def low_rank(
    equation: str,
    x: Float[Array, "B T *inputs"],
    a: Float[Array, "*inputs rank"],
    b: Float[Array, "rank *outputs"],
    scale: float,
    out_sharding: jax.sharding.PartitionSpec | None,
) -> Float[Array, "B T *outputs"]:
    """scale B (A x), for a matrix W that acts by `jnp.einsum(equation, x, W)`."""
    left, right = equation.split(",")
    matrix, result = right.split("->")
    kept = "".join(letter for letter in left if letter not in matrix)
    inputs = "".join(letter for letter in matrix if letter not in result)
    outputs = "".join(letter for letter in matrix if letter in result)
    narrow = spec("batch", "length", "rank")
    h = jnp.einsum(f"{left},{inputs}r->{kept}r", x, a, out_sharding=narrow)
    return scale * jnp.einsum(f"{kept}r,r{outputs}->{result}", h, b, out_sharding=out_sharding)


def split(params: dict, lora: LoraConfig | None) -> tuple[dict, dict | None]:
    """(what training moves, what it does not) of parameters or their table; None if it moves all.

    Raises KeyError where a pair is missing.
    """
    if lora is None:
        return params, None
    names = [name for target in lora.targets for name in pair_names(target)]
    layers = params["layers"]
    moved = {"layers": {name: layers[name] for name in names}}
    rest = {name: x for name, x in layers.items() if name not in names}
    return moved, params | {"layers": rest}


def join(moved: Any, frozen: dict | None) -> Any:
    """All parameters again: the inverse of `split`."""
    return moved if frozen is None else frozen | {"layers": frozen["layers"] | moved["layers"]}


def merged(params: dict, table: Table, lora: LoraConfig) -> dict:
    """`params` with each pair added to its matrix, W + (alpha / rank) A B in float32, and gone.

    table: that of all parameters, layers stacked. The arrays keep their shardings.
    """
    moved, frozen = split(params, lora)
    assert frozen is not None
    layers = dict(frozen["layers"])
    for target in lora.targets:
        w = table["layers"][target]
        assert isinstance(w, Parameter)
        a, b = (moved["layers"][name] for name in pair_names(target))
        axes = "abcdefg"[: len(w.shape)]
        inputs = len(w.contracted) + 1
        added = jnp.einsum(
            f"{axes[:inputs]}r,{axes[0]}r{axes[inputs:]}->{axes}",
            a,
            b,
            precision="highest",
            out_sharding=spec(*w.axes),
        )
        layers[target] = layers[target] + lora.scale * added
    return frozen | {"layers": layers}
