"""Dropout: its mean and variance, keyed by row, and absent wherever no key is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bdjax.layout import clean_places
from bdjax.loss import losses, total
from bdjax.model import dropped
from bdjax.noise import Absorbing
from bdjax.objective import BlockSize, Objective
from bdjax.seeds import row_keys
from bdjax.sharding import make_mesh, reshard
from bdjax.step import block_step

ROWS, LENGTH = 8, 12
BATCH = tiny.random_batch(ROWS, LENGTH)
OBJECTIVE = Objective(
    process=Absorbing(mask_id=tiny.MASK), block_size=BlockSize(first=4), ar_weight=0.5
)


def with_dropout(rate: float):
    plain = tiny.model()
    return dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, dropout=rate))


@pytest.fixture(scope="module")
def params():
    return tiny.model().init(jax.random.key(1))


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_a_share_is_zeroed_and_the_mean_stays(rate):
    ones = jnp.ones((4, 64, 512))
    found = np.asarray(dropped(ones, row_keys(jax.random.key(0), 4), rate, 3))
    kept = round(256 * (1 - rate)) / 256
    n = found.size
    assert set(np.unique(found)) == {0.0, np.float32(1 / kept)}
    assert abs(found.mean() - 1) < 4 * np.sqrt((1 / kept - 1) / n)
    assert abs((found > 0).mean() - kept) < 4 * np.sqrt(kept * (1 - kept) / n)


def test_sites_and_rows_are_independent_and_keys_decide():
    ones = jnp.ones((4, 16, 64))
    keys = row_keys(jax.random.key(0), 4)
    one, two = (np.asarray(dropped(ones, keys, 0.5, site)) > 0 for site in (1, 2))
    again = np.asarray(dropped(ones, keys[::-1], 0.5, 1)) > 0
    np.testing.assert_array_equal(again[::-1], one)
    alike = [(one == two).mean(), (one[0] == one[1]).mean()]
    assert all(abs(share - 0.5) < 4 * 0.5 / np.sqrt(one[0].size) for share in alike)


def forward(model, params, keys):
    places = clean_places(BATCH.segment, BATCH.position, 4)
    return block_step(model, params, BATCH.tokens, places, dropout=keys)[0]


def test_without_keys_or_rate_nothing_is_dropped(params):
    keys = row_keys(jax.random.key(0), ROWS)
    plain = forward(tiny.model(), params, None)
    np.testing.assert_array_equal(forward(with_dropout(0.3), params, None), plain)
    np.testing.assert_array_equal(forward(tiny.model(), params, keys), plain)
    assert np.abs(forward(with_dropout(0.3), params, keys) - plain).max() > 0.1


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_what_is_dropped_does_not_depend_on_the_mesh(mesh, params):
    model = with_dropout(0.3)

    def loss(params, batch):
        keys = row_keys(jax.random.key(5), ROWS)
        parts = losses(OBJECTIVE, model, params, batch, 4, jax.random.key(2), keys)
        return total(OBJECTIVE, parts)

    expected, grads = jax.jit(jax.value_and_grad(loss))(params, BATCH)
    with jax.set_mesh(make_mesh(**mesh)):
        spread = jax.tree.map(lambda x: reshard(x, "batch", "length"), BATCH)
        own = jax.jit(tiny.model().init)(jax.random.key(1))
        found, sharded = jax.jit(jax.value_and_grad(loss))(own, spread)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_rate_of_one_is_refused():
    with pytest.raises(ValueError, match="type dropout=0.1"):
        with_dropout(1.0)
