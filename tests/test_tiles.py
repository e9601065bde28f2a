"""Tile maps and tile lists against enumeration of all pairs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BLOCK, TOKEN, Document, find, pack, stack, with_views

from pallas_kernels import Intervals, dense_mask
from pallas_kernels.tiles import FIRST, FULL, LAST, OWN, TileMap, pairs, tile_list, tile_map

QUERY, KEY = 8, 4
map_jit = jax.jit(tile_map, static_argnums=(1, 2, 3))
list_jit = jax.jit(tile_list, static_argnums=1)


def rows():
    first = [Document(9, 3, 2), Document(13, 5)]
    second = [Document(1, 1, 4), Document(1, 8), Document(11, 2)]
    return with_views(stack(pack(32, first), pack(32, second, lead=3)), 1)


def covers(seen: np.ndarray) -> np.ndarray:
    """Convex covers of what each tile of queries sees in one run of keys: (I, S)."""
    tiles = seen.reshape(-1, QUERY, seen.shape[-1]).any(axis=1)
    forward = np.maximum.accumulate(tiles, axis=1)
    return forward & np.maximum.accumulate(tiles[:, ::-1], axis=1)[:, ::-1]


@pytest.mark.parametrize("clean", [TOKEN, BLOCK])
def test_live_tiles_are_the_convex_covers_and_full_ones_need_no_mask(clean):
    meta = rows()
    bounds = find(meta, meta, clean)
    seen, half = np.asarray(dense_mask(meta, meta, clean)), 32
    found = map_jit(bounds, 64, QUERY, KEY)
    for part, keys in enumerate((slice(0, half), slice(half, 64))):
        mine = np.zeros_like(seen)
        mine[:, :, keys] = seen[:, :, keys]
        for row in range(2):
            live = covers(mine[row]).reshape(-1, 64 // KEY, KEY).any(axis=2)
            np.testing.assert_array_equal(found.live[part, row], live)
        full = mine.reshape(2, -1, QUERY, 64 // KEY, KEY).all(axis=(2, 4))
        np.testing.assert_array_equal(found.full[part], full)
        assert full.any() or part
    assert float(pairs(bounds)) == seen.sum()


def test_keys_past_the_end_make_no_tile_full():
    bounds = Intervals(*(jnp.full((1, 8), x) for x in (0, 10, 0, 0)))
    found = map_jit(bounds, 10, 8, 4)
    np.testing.assert_array_equal(found.live[:, 0, 0], [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(found.full[:, 0, 0], [[True, True, False], [False] * 3])


@pytest.mark.parametrize("by_keys", [False, True])
def test_the_list_holds_every_live_pair_once_in_order_and_every_owner(by_keys):
    rng = np.random.default_rng(0)
    live = rng.random((2, 3, 5, 7)) < 0.2
    live[:, 1, 2], live[:, 0, :, 4] = False, False
    full = live & (rng.random(live.shape) < 0.4)
    found = list_jit(TileMap(jnp.asarray(live), jnp.asarray(full)), by_keys)
    pair, row = (np.asarray(x)[: int(found.count)] for x in found[:2])
    order = (1, 3, 2, 0) if by_keys else (1, 2, 3, 0)
    live, full = live.transpose(order), full.transpose(order)
    expected = live.copy()
    expected[..., 0, 0] |= ~live.any(axis=(2, 3))
    visits = [tuple(visit) for visit in np.argwhere(expected)]
    own = (row & OWN != 0).astype(int)
    assert list(zip(row >> 4, pair >> 16, pair & 0xFFFF, own, strict=True)) == visits
    for n, visit in enumerate(visits):
        assert bool(row[n] & FULL) == full[visit]
        assert bool(row[n] & FIRST) == (n == 0 or visits[n - 1][:2] != visit[:2])
        assert bool(row[n] & LAST) == (n + 1 == len(visits) or visits[n + 1][:2] != visit[:2])


def test_too_many_tiles_are_refused():
    with pytest.raises(NotImplementedError, match="larger tiles"):
        jax.eval_shape(partial(tile_list), TileMap(*[jnp.zeros((2, 1, 1, 1 << 15), bool)] * 2))


def test_an_unpacked_row_wastes_seven_percent_at_most():
    """L=4096, block 32, tiles of 128: visited over visible pairs."""
    meta = with_views(stack(pack(4096, [Document(4096, 32)])), 1)
    bounds = find(meta, meta, TOKEN)
    tiles = map_jit(bounds, 8192, 128, 128)
    share = float(tiles.live.sum()) * 128 * 128 / float(pairs(bounds))
    print(f"visited/visible: {share:.4f}")
    assert 1 < share <= 1.07
