"""Roles decide the rule, the mesh decides nothing, and a bad gradient changes nothing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdjax.learning_rate import CosineDecay, StableDecay
from bdjax.optim import OptimConfig, make_optimiser
from bdjax.parameters import Parameter, Role, map_table
from bdjax.sharding import make_mesh, reshard

L, D, N, H, V = 2, 16, 4, 8, 24


def parameter(shape, axes, role, contracted=()):
    init = jax.nn.initializers.normal(0.1)
    return Parameter(shape=shape, axes=axes, init=init, role=role, contracted=contracted)


TABLE = {
    "embed": parameter((V, D), ("vocab", "embed_in"), Role.EMBEDDING),
    "final_norm": parameter((D,), ("embed",), Role.NORM),
    "layers": {
        "norm": parameter((L, D), ("layers", "embed"), Role.NORM),
        "bq": parameter((L, N, H), ("layers", "heads", "head_dim"), Role.BIAS),
        "wo": parameter(
            (L, N, H, D), ("layers", "heads", "head_dim", "embed_in"), Role.MATRIX, (1, 2)
        ),
        "wq": parameter(
            (L, D, N, H), ("layers", "embed_in", "heads", "head_dim"), Role.MATRIX, (1,)
        ),
    },
}
MATRICES = {"layers/wo", "layers/wq"}


def named(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}


def parameters(seed=0, scale=0.1):
    # Drawn by numpy: compiling jax.random for every mesh took most of this file's time.
    draw = np.random.default_rng(seed).standard_normal

    def one(p):
        return reshard(jnp.asarray(scale * draw(p.shape), jnp.float32), *p.axes)

    return map_table(one, TABLE)


def gradients():
    return parameters(seed=1, scale=0.3)


@partial(jax.jit, static_argnames=("config", "steps"))
def train(params, grads, config, steps=1):
    optimiser = make_optimiser(config, TABLE, 10)
    state = optimiser.init(params)
    for _ in range(steps):
        params, state, metrics = optimiser.update(grads, state, params)
    return params, state, metrics


def test_muon_takes_the_matrices_and_adam_the_rest():
    params = parameters()
    state = make_optimiser(OptimConfig(muon=True), TABLE, 10).init(params)
    muon, adam = (state.inner[0].inner_states[key].inner_state for key in (True, False))
    assert set(named(muon.mean)) == MATRICES
    assert set(named(adam.mu)) == set(named(params)) - MATRICES


def test_a_muon_step_is_orthogonal_per_layer_and_has_adams_size():
    params = parameters()
    config = OptimConfig(muon=True, weight_decay=0.0, warmup_fraction=0.0)
    moved = named(train(params, gradients(), config)[0])
    for name, shape in (("layers/wq", (L, D, N * H)), ("layers/wo", (L, N * H, D))):
        step = (moved[name] - named(params)[name]).reshape(shape) / config.peak_lr
        values = jnp.linalg.svd(step / (0.2 * np.sqrt(max(shape[1:]))), compute_uv=False)
        assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("muon", [False, True])
def test_only_matrices_decay(muon):
    params = parameters()
    moved = {}
    for decay in (0.0, 0.5):
        config = OptimConfig(weight_decay=decay, muon=muon, warmup_fraction=0.0)
        moved[decay] = named(train(params, gradients(), config)[0])
    for name, before in named(params).items():
        difference = moved[0.5][name] - moved[0.0][name]
        wanted = -config.peak_lr * 0.5 * before if name in MATRICES else jnp.zeros_like(before)
        np.testing.assert_allclose(difference, wanted, atol=1e-6)


def test_without_muon_it_is_optax_adamw():
    params, grads = parameters(), gradients()
    config = OptimConfig(warmup_fraction=0.0, decay=StableDecay(start=1.0), clip_norm=0.5)
    ours = train(params, grads, config, steps=3)[0]
    mask = map_table(lambda p: p.role is Role.MATRIX, TABLE)
    adamw = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask)
    tx = optax.chain(optax.clip_by_global_norm(0.5), adamw)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), ours, params)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("axes", [{}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_mesh_changes_nothing(muon, axes):
    config = OptimConfig(muon=muon)
    wanted = train(parameters(), gradients(), config, steps=2)
    with jax.set_mesh(make_mesh(**axes)):
        params = parameters()
        got = train(params, gradients(), config, steps=2)
        abstract = jax.eval_shape(make_optimiser(config, TABLE, 10).init, params)
    for name, before in named(params).items():
        assert named(got[0])[name].sharding == before.sharding
    for name, leaf in named(abstract).items():
        if leaf.sharding is not None:  # eval_shape leaves it out where nothing is split
            assert named(got[1])[name].sharding.spec == leaf.sharding.spec, name
    close = partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6)
    jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), got, wanted)


@pytest.mark.parametrize("muon", [False, True])
def test_a_bad_gradient_changes_only_the_count(muon):
    params = parameters()
    bad = gradients()
    bad["layers"]["wq"] = bad["layers"]["wq"].at[0, 0, 0, 0].set(jnp.nan)
    after, state, metrics = train(params, bad, OptimConfig(muon=muon), steps=2)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert (int(state.steps), int(state.skipped), int(metrics["skipped_steps"])) == (0, 2, 2)
    assert int(metrics["skipped_in_a_row"]) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert all(metrics[f"update_ratio/{role.value}"] == 0 for role in (Role.MATRIX, Role.NORM))


def test_update_ratios_are_norms_over_the_leaves_of_a_role():
    params = parameters()
    params["layers"]["bq"] = params["layers"]["bq"] * 0
    config = OptimConfig(weight_decay=0.3, warmup_fraction=0.0)
    after, _, metrics = train(params, gradients(), config)
    roles = named(map_table(lambda p: p.role, TABLE))
    for role in (Role.MATRIX, Role.NORM, Role.EMBEDDING):
        inside = [name for name, own in roles.items() if own is role]
        before, now = (
            np.concatenate([np.asarray(named(tree)[name], np.float64).ravel() for name in inside])
            for tree in (params, after)
        )
        wanted = np.linalg.norm(now - before) / np.linalg.norm(before)
        assert float(metrics[f"update_ratio/{role.value}"]) == pytest.approx(wanted, rel=1e-4)
    assert metrics["update_ratio/bias"] == 0


def test_what_decays_is_a_matter_of_role():
    params = parameters()
    config = OptimConfig(decayed=(Role.NORM,), weight_decay=0.5, warmup_fraction=0.0)
    plain = replace(config, weight_decay=0.0)
    one, two = (named(train(params, gradients(), c)[0]) for c in (config, plain))
    changed = {name for name in one if not np.array_equal(one[name], two[name])}
    assert changed == {"final_norm", "layers/norm"}


def test_zero_gradients_stay_finite():
    params = parameters()
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _, metrics = train(params, zero, OptimConfig(muon=True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))


def test_the_schedule_at_its_boundaries():
    config = OptimConfig(peak_lr=2.0, warmup_fraction=0.1, final_lr_fraction=0.25)
    flat = replace(config, decay=StableDecay(start=0.5))
    rate = make_optimiser(flat, TABLE, 100).rate
    wanted = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 50: 2.0, 75: 1.25, 100: 0.5, 1000: 0.5}
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(value), step
    assert float(make_optimiser(flat, TABLE, 1).rate(0)) == 2.0
    # Half a cosine: halfway down in the middle of what follows the warm-up.
    rate = make_optimiser(replace(config, decay=CosineDecay()), TABLE, 100).rate
    quarter = 2 - 1.5 * (1 - np.cos(np.pi / 3)) / 2
    wanted = {0: 0.2, 9: 2.0, 10: 2.0, 40: quarter, 55: 1.25, 100: 0.5, 1000: 0.5}
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(value), step


@pytest.mark.parametrize("muon", [False, True])
def test_a_quadratic_converges(muon):
    target = parameters(seed=2)
    params = parameters()
    config = OptimConfig(peak_lr=0.02, weight_decay=0.0, muon=muon, final_lr_fraction=0.0)
    optimiser = make_optimiser(config, TABLE, 200)

    def loss(params):
        return optax.tree.norm(jax.tree.map(jnp.subtract, params, target)) ** 2

    def step(carry, _):
        params, state = carry
        params, state, _ = optimiser.update(jax.grad(loss)(params), state, params)
        return (params, state), None

    final, _ = jax.lax.scan(step, (params, optimiser.init(params)), length=200)[0]
    assert float(loss(final)) < 1e-2 * float(loss(params))


@pytest.mark.parametrize(
    ("field", "value"),
    [("peak_lr", 0.0), ("b2", 1.0), ("warmup_fraction", 1.5), ("accumulate", 0),
     ("weight_decay", -1.0), ("clip_norm", 0.0), ("peak_lr", float("nan"))],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(
        ValueError, match=f"optim.{field}={value} must be .*type for example optim.{field}="
    ):
        OptimConfig(**{field: value})
