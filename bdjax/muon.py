"""Muon: orthogonalised momentum, each device taking its share of the layers.

A stack of matrices (layers, ...) is sharded along inputs and outputs, where products would gather
it again and again. Layers are independent, so whole ones are handed out instead: one exchange in,
Newton-Schulz without any collective, one exchange out (`sharding.by_layer`).

One compiled update, per device, before (optax's rule, collectives chosen by XLA) -> now; bytes as
`bdjax.hlo` counts them, in units of all matrices (23.6 MB): `jax.jit(make_optimiser(OptimConfig(
muon=True), table, 10).update)` for the table of `DecoderConfig(num_layers=8, width=256,
num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=704)`,
XLA_FLAGS=--xla_force_host_platform_device_count=8, 2026-11-23, jax 0.10.2.
tests/test_muon.py counts a smaller one.

    fsdp=4              112 all-gathers and 26 all-reduces, 17.1 -> 14 all-to-alls, 0.5
    fsdp=2, tensor=2    314 of three kinds, 13.9                 -> 28 all-to-alls, 1.0
    all axes 2          426 of three kinds, 14.9                 -> 28 all-to-alls, 7 gathers, 1.25
    data=4              none                                     -> 7 all-gathers, 1.0
    GFLOP in that order: 8.3 -> 7.3, 7.3 -> 7.3, 5.2 -> 3.7, 29.0 -> 7.4

Layers are padded to a multiple of the devices: with more devices than layers the rest idle.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bdjax import sharding
from bdjax.parameters import Parameter, Role, Table, map_table

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 4


class MuonState(NamedTuple):
    """`count`: updates so far; `mean`: of the gradients, sharded as the parameters are."""

    count: Int[Array, ""]
    mean: Any


def scale_by_muon(table: Table, *, momentum: float) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum for the matrices of `table`.

    With m_t = b m_(t-1) + (1 - b) g_t and b = `momentum`, the direction of step t = 1, 2, ... is

        0.2 sqrt(max(inputs, outputs)) NS(b m_t / (1 - b^(t+1)) + (1 - b) g_t / (1 - b^t))

    for each layer by itself: NS is `newton_schulz`, both terms are corrected for m_0 = 0 (Dozat
    2016), the size is AdamW's usual root mean square (Liu et al. 2025). Where `table` has another
    role, the trees hold `optax.MaskedNode`, as `optax.partition` leaves it.
    Raises ValueError for a matrix without inputs or without outputs.
    """
    matrices = map_table(lambda p: p if p.role is Role.MATRIX else optax.MaskedNode(), table)
    jax.tree.map(_order, matrices)

    def init(params) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state: MuonState, params=None):
        del params
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mean, grads)
        old = momentum / (1 - momentum ** (count + 1))
        new = (1 - momentum) / (1 - momentum**count)

        def direction(p: Parameter, m, g):
            return _size(p) * orthogonalised(p, old * m + new * g)

        return jax.tree.map(direction, matrices, mean, grads), MuonState(count, mean)

    return optax.GradientTransformation(init, update)


def orthogonalised(p: Parameter, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`newton_schulz` of every layer of x, which is shaped and sharded like the parameter.

    The axes that `p.contracted` names are a matrix's inputs, all others but "layers" its outputs;
    without "layers" it is a stack of one.
    """
    order = _order(p)
    if "layers" not in p.axes:
        x = x[None]
        order = (0, *(i + 1 for i in order))
    axes = p.axes if "layers" in p.axes else (None, *p.axes)
    inputs = math.prod(p.shape[i] for i in p.contracted)

    def local(stack):
        flat = stack.reshape(stack.shape[0], inputs, -1)
        return newton_schulz(flat).reshape(stack.shape)

    spread = sharding.by_layer(local, *(axes[i] for i in order))
    back = sorted(range(len(order)), key=order.__getitem__)
    y = spread(x.transpose(order)).transpose(back)
    return y if "layers" in p.axes else y[0]


def newton_schulz(x: Float[Array, "L m n"]) -> Float[Array, "L m n"]:
    """Each matrix, its rows rescaled, with its singular values brought near 1.

    With (a, b, c) = COEFFICIENTS, X <- a X + b (X X^T) X + c (X X^T)^2 X is done STEPS times: the
    quintic of Jordan et al. 2024 ("Muon"), each step on the shorter side. It begins from S X with
    S = diag(sum_j |X X^T|_ij)^(-1/2), whose norm is at most 1 (almost orthogonal layers, Prach &
    Lampert 2022; Boissin et al. 2025 for Muon): four steps then do what five do after Frobenius's
    scaling, in four fifths of the time. S changes the singular vectors a little.
    """
    if x.shape[1] > x.shape[2]:
        return newton_schulz(x.mT).mT
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    # A floor: rows of zeros stay zeros.
    scale = jax.lax.rsqrt(jnp.maximum(jnp.abs(gram).sum(axis=-1), 1e-8))[..., None]
    x, gram = x * scale, gram * scale * scale.mT
    for step in range(STEPS):
        if step:
            gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _size(p: Parameter) -> float:
    inputs = math.prod(p.shape[i] for i in p.contracted)
    layers = p.shape[p.axes.index("layers")] if "layers" in p.axes else 1
    return 0.2 * math.sqrt(max(inputs, math.prod(p.shape) // layers // inputs))


def _order(p: Parameter) -> tuple[int, ...]:
    """The axes of a matrix as (layers, inputs, outputs)."""
    stack = tuple(i for i, axis in enumerate(p.axes) if axis == "layers")
    outputs = tuple(i for i in range(len(p.axes)) if i not in (*stack, *p.contracted))
    if not p.contracted or not outputs:
        raise ValueError(
            f"a matrix with axes {p.axes} and contracted={p.contracted} has no "
            f"{'outputs' if p.contracted else 'inputs'}; contracted must list some of the axes "
            "other than 'layers', or give it another role"
        )
    return (*stack, *p.contracted, *outputs)
