"""Newton-Schulz is the iteration written down, and who computes which layer changes nothing."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdjax.hlo import Traffic, collectives
from bdjax.muon import COEFFICIENTS, STEPS, newton_schulz, scale_by_muon
from bdjax.parameters import Parameter, Role, map_table
from bdjax.sharding import make_mesh, reshard

D, N, H, F = 32, 4, 8, 80


def matrix(shape, axes, contracted):
    init = jax.nn.initializers.normal(1.0)
    return Parameter(shape=shape, axes=axes, init=init, role=Role.MATRIX, contracted=contracted)


def table(layers):
    """Wide, tall, square with two axes on one side, and a matrix that is in no stack."""
    return {
        "down": matrix((layers, F, D), ("layers", "mlp", "embed_in"), (1,)),
        "up": matrix((layers, D, F), ("layers", "embed_in", "mlp"), (1,)),
        "wo": matrix((layers, N, H, D), ("layers", "heads", "head_dim", "embed_in"), (1, 2)),
        "alone": matrix((D, F), ("embed_in", "mlp"), (0,)),
    }


def draws(table, seed):
    draw = np.random.default_rng(seed).standard_normal
    return map_table(lambda p: reshard(jnp.asarray(draw(p.shape), jnp.float32), *p.axes), table)


def steps(rule, state, grads):
    directions = []
    for gradient in grads:
        direction, state = rule.update(gradient, state)
        directions.append(direction)
    return directions, state


def test_three_steps_are_optaxs():
    own = table(3)
    grads = [draws(own, seed) for seed in range(3)]

    def dimensions(p):
        outputs = [i for i, a in enumerate(p.axes) if i not in p.contracted and a != "layers"]
        return optax.contrib.MuonDimensionNumbers(p.contracted, tuple(outputs))

    theirs = optax.contrib.scale_by_muon(
        beta=0.9,
        ns_steps=4,
        preconditioning="aol",
        weight_dimension_numbers=map_table(dimensions, own),
    )
    ours = scale_by_muon(own, momentum=0.9)
    wanted, _ = jax.jit(lambda g: steps(theirs, theirs.init(g[0]), g))(grads)
    got, state = jax.jit(lambda g: steps(ours, ours.init(g[0]), g))(grads)
    for one, other in zip(got, wanted, strict=True):
        for name, longer in (("down", F), ("up", F), ("wo", D), ("alone", F)):
            size = 0.2 * math.sqrt(longer)
            np.testing.assert_allclose(one[name] / size, other[name], atol=1e-5)
    assert int(state.count) == 3


def newton_schulz_64(x):
    """One matrix, in numpy."""
    a, b, c = COEFFICIENTS
    x = x / np.sqrt(np.abs(x @ x.T).sum(1, keepdims=True))
    for _ in range(STEPS):
        g = x @ x.T
        x = a * x + b * g @ x + c * g @ g @ x
    return x


@pytest.mark.parametrize(("rows", "columns"), [(12, 30), (30, 12), (16, 16)])
def test_newton_schulz_in_float64(rows, columns):
    x = np.random.default_rng(0).standard_normal((2, rows, columns))
    tall = rows > columns
    wanted = np.stack([newton_schulz_64(m.T).T if tall else newton_schulz_64(m) for m in x])
    got = newton_schulz(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_zeros_stay_zeros():
    assert not newton_schulz(jnp.zeros((2, 3, 5))).any()


MESHES = [
    ({"fsdp": 4}, 8),
    ({"fsdp": 4}, 3),
    ({"fsdp": 2, "tensor": 2}, 3),
    ({"data": 4}, 8),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 3),
]


def compiled_update(axes, layers):
    own = table(layers)
    rule = scale_by_muon(own, momentum=0.9)
    with jax.set_mesh(make_mesh(**axes)):
        params = draws(own, 0)
        state = jax.jit(rule.init)(params)
        compiled = jax.jit(rule.update).lower(params, state).compile()
        direction, after = compiled(params, state)
    return SimpleNamespace(
        axes=axes,
        layers=layers,
        params=params,
        mean=after.mean,
        direction=direction,
        traffic=collectives(compiled.as_text()).traffic,
        flops=compiled.cost_analysis()["flops"],
    )


@pytest.fixture(scope="module", params=MESHES, ids=str)
def sharded(request):
    return compiled_update(*request.param)


@pytest.fixture(scope="module")
def plain():
    return {layers: compiled_update({}, layers) for layers in (3, 8)}


def test_the_mesh_changes_nothing(sharded, plain):
    """Also where the layers are no multiple of the devices."""
    for name, before in sharded.params.items():
        for tree in (sharded.direction, sharded.mean):
            assert tree[name].sharding == before.sharding, name
    wanted = plain[sharded.layers]
    close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    for got, other in ((sharded.direction, wanted.direction), (sharded.mean, wanted.mean)):
        jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), got, other)


def test_collectives_move_each_stack_once_in_and_once_out(sharded):
    """All-to-alls of a device's share for each cut axis; no gathers but of the finished update."""
    devices = math.prod(sharded.axes.values())
    cuts = [n for name, n in sharded.axes.items() if name != "data"]
    copies = sharded.axes.get("data", 1)
    padded = 0
    for x in table(sharded.layers).values():
        matrices = sharded.layers if "layers" in x.axes else 1
        padded += 4 * math.prod(x.shape) // matrices * math.ceil(matrices / devices) * devices
    share = padded * copies // devices
    number = len(sharded.params)
    wanted = {}
    if cuts:
        times = 2 * len(cuts)
        wanted["all-to-all"] = Traffic(times * number, times * share)
    if copies > 1:
        wanted["all-gather"] = Traffic(number, share)
    assert sharded.traffic == wanted


def test_the_work_is_split_over_all_devices(sharded, plain):
    """A device computes ceil(layers / devices) matrices of every stack."""
    devices = math.prod(sharded.axes.values())
    share = whole = 0
    for p in table(sharded.layers).values():
        matrices = sharded.layers if "layers" in p.axes else 1
        inputs = math.prod(p.shape[i] for i in p.contracted)
        outputs = math.prod(p.shape) // matrices // inputs
        short, long = sorted((inputs, outputs))
        products = short * short * (2 * long + short)
        share += math.ceil(matrices / devices) * products
        whole += matrices * products
    assert sharded.flops == pytest.approx(share / whole * plain[sharded.layers].flops, rel=0.1)


@pytest.mark.parametrize(
    ("contracted", "missing"), [((), "inputs"), ((1, 2), "outputs")], ids=["in", "out"]
)
def test_a_matrix_has_inputs_and_outputs(contracted, missing):
    wrong = {"w": matrix((2, D, F), ("layers", "embed_in", "mlp"), contracted)}
    with pytest.raises(ValueError, match=f"no {missing}; contracted must list"):
        scale_by_muon(wrong, momentum=0.9)
