"""Dropout: its mean and variance, keyed by row, and absent wherever no key is given.

`test_train_step` trains with it: neither the mesh nor a split of the batch changes what is zeroed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bdjax.layout import clean_places
from bdjax.model import dropped
from bdjax.seeds import row_keys
from bdjax.step import block_step

ROWS, LENGTH = 8, 12
BATCH = tiny.random_batch(ROWS, LENGTH)


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


def test_a_rate_of_one_is_refused():
    with pytest.raises(ValueError, match="type dropout=0.1"):
        with_dropout(1.0)
