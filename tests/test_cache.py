"""Writing to the cache: both ways of doing it are the loop over tokens that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.cache import put, put_by_rows

SLOTS, WIDTH = 11, 4


@pytest.mark.parametrize("write", [put, put_by_rows])
def test_committed_tokens_land_at_their_positions_and_nothing_else_moves(write):
    """Rows that begin before the first slot, inside, at the end and past it; any of them chosen."""
    rng = np.random.default_rng(0)
    starts = np.array([-4, -2, 0, 3, 7, 9, 11])
    position = starts[:, None] + np.arange(WIDTH)
    stack = rng.standard_normal((2, len(starts), 3, SLOTS, 5)).astype(np.float32)
    values = rng.standard_normal((2, len(starts), WIDTH, 3, 5)).astype(np.float32)
    for commit in (rng.random(position.shape) < 0.6, np.ones(position.shape, bool)):
        commit &= position >= 0
        wanted = stack.copy()
        for row, w in np.argwhere(commit & (position < SLOTS)):
            wanted[:, row, :, position[row, w]] = values[:, row, w]
        arrays = [jnp.asarray(x) for x in (stack, values, position.astype(np.int32), commit)]
        np.testing.assert_array_equal(jax.jit(write)(*arrays), wanted)
