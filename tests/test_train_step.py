"""One update: the same in pieces and on any mesh, its average, and what it does with a NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bdjax.loss import row_losses, total
from bdjax.model import Remat
from bdjax.noise import Absorbing
from bdjax.objective import BlockSize, Objective, training_row
from bdjax.optim import OptimConfig, make_optimiser
from bdjax.sharding import make_mesh, reshard
from bdjax.train_step import FiniteWatch, NonFiniteError, TrainState, initial_state, train_step

ROWS, LENGTH = 8, 16
BATCH = tiny.random_batch(ROWS, LENGTH, seed=3)
OBJECTIVE = Objective(
    process=Absorbing(mask_id=tiny.MASK), block_size=BlockSize(first=4), ar_weight=0.5
)
PLAIN = tiny.model()
MODEL = replace(PLAIN, decoder=replace(PLAIN.decoder, dropout=0.25))
# No clipping: a gradient's size has to show in the weights. SGD-like eps for the same reason:
# Adam's first step would only show signs.
CONFIG = OptimConfig(warmup_fraction=0.0, eps=1.0, clip_norm=1e9, ema_decay=0.9)
ROOT = jax.random.key(11)


def run(config: OptimConfig, steps: int = 2, mesh: dict | None = None, batch=BATCH, model=MODEL):
    """State and metrics after some steps."""
    optimiser = make_optimiser(config, model.table(), 10)
    with jax.set_mesh(make_mesh(**(mesh or {}))):
        own = jax.tree.map(lambda x: reshard(x, "batch", "length"), batch)
        state = initial_state(0, model, optimiser)
        for _ in range(steps):
            state, metrics = train_step(OBJECTIVE, model, optimiser, state, own, ROOT)
        return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def whole():
    return run(CONFIG)


def assert_same(found, wanted, tolerance=1e-5):
    """Updates are of the gradients' size here, so that a tolerance on them means something."""
    start = initial_state(0, MODEL, make_optimiser(CONFIG, MODEL.table(), 10))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), wanted[0].params, start.params)
    assert min(jax.tree.leaves(moved)) > 1e-6
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


SLOW = pytest.mark.slow
PIECES = [
    (4, {}),
    (2, {"data": 2, "fsdp": 2, "tensor": 2}),
    pytest.param(1, {"data": 8}, marks=SLOW),
    pytest.param(1, {"data": 4, "tensor": 2}, marks=SLOW),
    pytest.param(1, {"fsdp": 4}, marks=SLOW),
    pytest.param(1, {"fsdp": 4, "tensor": 2}, marks=SLOW),
    pytest.param(8, {}, marks=SLOW),
    pytest.param(4, {"fsdp": 2}, marks=SLOW),
]


@pytest.mark.parametrize(("pieces", "mesh"), PIECES, ids=str)
def test_pieces_and_meshes_change_nothing(pieces, mesh, whole):
    assert_same(run(replace(CONFIG, accumulate=pieces), mesh=mesh), whole)


@pytest.mark.parametrize("remat", [Remat.FULL, pytest.param(Remat.NONE, marks=SLOW)])
def test_layers_without_a_loop_change_nothing_on_a_mesh(remat, whole):
    """Each layer's weights are cut out of the stacks, and its gradients written into them."""
    decoder = replace(MODEL.decoder, unroll=MODEL.decoder.num_layers, remat=remat)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert_same(run(CONFIG, mesh=mesh, model=replace(MODEL, decoder=decoder)), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_two_gpus_change_nothing(axis, whole):
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_same(run(CONFIG, mesh={axis: 2}), whole)
    again, once_more = (run(CONFIG, mesh={axis: 2}) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, again, once_more)


@pytest.mark.slow
def test_weights_cast_once_give_the_bits_of_weights_cast_in_every_layer():
    decoder = replace(PLAIN.decoder, dtype="bfloat16", remat=Remat.FULL, qkv_bias=True)
    model = replace(PLAIN, decoder=decoder)
    params = initial_state(0, model, make_optimiser(CONFIG, model.table(), 10)).params
    row = training_row(OBJECTIVE, BATCH, 0, ROOT)

    def gradient(narrow):
        def loss(params):
            parts = row_losses(model, model.narrow(params) if narrow else params, row)
            return total(OBJECTIVE, parts)

        return jax.jit(jax.grad(loss))(params)

    once, often = gradient(True), gradient(False)
    assert {x.dtype for x in jax.tree.leaves(once)} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(often), strict=True):
        assert np.array_equal(a, b)


def test_the_same_seed_gives_the_same_bits(whole):
    jax.tree.map(np.testing.assert_array_equal, run(CONFIG), whole)


@SLOW
def test_pieces_take_less_memory():
    sizes = []
    for pieces in (1, 4):
        optimiser = make_optimiser(replace(CONFIG, accumulate=pieces), MODEL.table(), 10)
        state = jax.eval_shape(lambda o=optimiser: initial_state(0, MODEL, o))
        lowered = train_step.lower(OBJECTIVE, MODEL, optimiser, state, BATCH, ROOT)
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.6 * sizes[0]


def test_the_average_follows_its_recurrence_and_stands_still_when_a_step_is_refused():
    optimiser = make_optimiser(CONFIG, MODEL.table(), 10)
    state = initial_state(0, MODEL, optimiser)
    wanted = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    applied = 0
    for number in range(4):
        if number == 2:
            hurt = jax.tree.map(lambda x: x * jnp.nan, state.params)
            good = jax.device_get(state)
            state, metrics = train_step(
                OBJECTIVE, MODEL, optimiser, state._replace(params=hurt), BATCH, ROOT
            )
            assert int(metrics["skipped_in_a_row"]) == 1
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), good.ema)
            state = state._replace(params=jax.tree.map(jnp.asarray, good.params))
            continue
        state, metrics = train_step(OBJECTIVE, MODEL, optimiser, state, BATCH, ROOT)
        applied += 1
        decay = min(0.9, (1 + applied) / (10 + applied))
        wanted = jax.tree.map(
            lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p, np.float64), wanted, state.params
        )
        assert int(metrics["skipped_in_a_row"]) == 0
    for a, b in zip(jax.tree.leaves(state.averaged), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert int(state.step) == 4 and int(state.optimiser.steps) == 3


def test_without_an_average_the_weights_are_used():
    state = TrainState(1, None, jnp.zeros((), jnp.int32))
    assert state.averaged == 1 and state._replace(ema=2).averaged == 2


def test_the_watch_reports_after_so_many_in_a_row_and_not_before():
    def values(skipped, loss):
        return {
            "skipped_in_a_row": float(skipped),
            "loss": loss,
            "grad_norm": 2.0,
            "learning_rate": 0.01,
        }

    watch = FiniteWatch(OptimConfig(max_skipped=3, peak_lr=0.01))
    for step, skipped in enumerate([0, 1, 2, 0, 1, 2]):
        watch.see(step, values(skipped, 1.5 if skipped == 0 else float("nan")))
    with pytest.raises(NonFiniteError, match=r"step 6: .*3 steps in a row \(loss too\).*"
                       r"Last finite step 3: loss 1.5000.*optim.peak_lr=0.005"):  # fmt: skip
        watch.see(6, values(3, float("nan")))
