"""The loss by noise level is the loss, sorted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bdjax import presets
from bdjax.levels import by_noise_level
from bdjax.loss import NOISE_LEVELS, total, watched_losses
from bdjax.objective import BlockSize, Objective, build_row, corruptions, places_of
from bdjax.sharding import make_mesh, reshard

PROCESS = presets.default(mask_id=tiny.MASK, block_size=4).objective.process
WANTED = Objective(process=PROCESS, block_size=BlockSize(first=4), views=2, ar_weight=0.5)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def row():
    @jax.jit
    def build(batch):
        places = places_of(WANTED, batch, 4)
        return build_row(WANTED, batch, 4, corruptions(WANTED, batch, places, KEY))

    return build(tiny.random_batch(4, 24))


@pytest.fixture(scope="module")
def nll(row):
    draws = np.random.default_rng(0).uniform(1, 2, row.diffusion.rows.shape)
    return jnp.asarray(draws, jnp.float32)


bins = jax.jit(by_noise_level)


def by_hand(row, nll):
    """Token by token in numpy."""
    entries, width = row.diffusion, row.diffusion.rows.shape[1]
    found = np.zeros((3, 10))
    for b in range(nll.shape[0]):
        named = [np.asarray(x)[b, -width:] for x in row.places[:3]]
        own = list(zip(*named, strict=True))
        scored, weight = np.asarray(entries.scored)[b], np.asarray(entries.weight)[b]
        for i in np.flatnonzero(scored):
            block = [j for j in range(width) if own[j] == own[i]]
            share = sum(scored[j] for j in block) / len(block)
            bin_ = int(np.ceil(round(10 * share, 6))) - 1
            found[:, bin_] += 1, nll[b, i], weight[i] * nll[b, i]
    return found


def test_every_scored_token_stands_in_the_bin_of_its_block(row, nll):
    found = bins(row, nll)
    np.testing.assert_allclose(found, by_hand(row, np.asarray(nll)), rtol=1e-5)
    assert (found[0] > 0).sum() >= 3


def test_edges_belong_to_the_bin_below(row, nll):
    """Blocks of ten, 1 to 10 scored."""
    places = jax.tree.map(lambda x: jnp.tile(jnp.ones_like(x[:1]), (4, 1)), row.places)
    block = jnp.arange(places.block.shape[1]) // 10 + places.block * 0
    for count in range(1, 11):
        scored = jnp.arange(48) % 10 < count
        scored = jnp.tile(scored & (jnp.arange(48) < 40), (4, 1))
        shift = places.block.shape[1] - 48
        places = places._replace(block=jnp.roll(block, shift, axis=1))
        exact = row._replace(places=places, diffusion=row.diffusion._replace(scored=scored))
        found = bins(exact, nll)
        assert found[0].tolist() == [4 * 4 * count * (i == count - 1) for i in range(10)]


def test_the_bins_add_up_to_the_loss_and_do_not_change_it(row):
    model = tiny.model()
    params = model.init(jax.random.key(0))
    parts = jax.jit(lambda params, row: watched_losses(model, params, row))(params, row)
    tokens, _, bound = (parts[name] for name in NOISE_LEVELS)
    np.testing.assert_allclose(bound.mean.sum(), parts["diffusion"].mean, rtol=1e-5)
    assert tokens.numerator.sum() == row.diffusion.scored.sum()
    alone = {name: parts[name] for name in ("diffusion", "ar")}
    assert total(WANTED, parts) == total(WANTED, alone)


def test_a_mesh_changes_no_bin(row, nll):
    wanted = bins(row, nll)
    with jax.set_mesh(make_mesh(data=2, fsdp=2)):
        split = jax.tree.map(lambda x: reshard(x, "batch", "length") if x.ndim else x, (row, nll))
        np.testing.assert_allclose(bins(*split), wanted, rtol=1e-5)
