"""The TPU training kernels without a TPU: the laws of attention, races, and what a grid visits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from attention_cases import BLOCK, TOKEN, AttentionCases, Document
from tpu_interpret import INTERPRET, watched

from pallas_kernels import Intervals, Mosaic
from pallas_kernels.mosaic import _sizes, _tile
from pallas_kernels.tiles import tile_list, tile_map


class TestMosaic(AttentionCases):
    """Tiles that divide the row, run by jax's plain interpreter."""

    impl = Mosaic(query_tile=16, key_tile=16, interpret=True)
    halves = ("bfloat16",)  # float16 goes by way of float32


@pytest.mark.slow
class TestMosaicUnderTheRaceDetector(AttentionCases):
    """The same, every kernel call checked: two cores, copies at their own time, memory of NaN."""

    impl = Mosaic(query_tile=16, key_tile=16, interpret=INTERPRET)

    def run(self, case, dtype="float32", bounds=None):
        with watched(kernels=3):
            return jax.block_until_ready(super().run(case, dtype, bounds))


def test_tiles_that_divide_nothing():
    """Tiles of different lengths, rows that are a multiple of neither; documents of 24 tokens."""
    cases = TestMosaic()
    cases.length, cases.impl = 96, Mosaic(query_tile=40, key_tile=56, interpret=True)
    # Lengths are of a stream of 24 tokens, here they count twice.
    cases.check(cases.case(cases.row([Document(12, 5), Document(12, 4)], [Document(10, 3)]), BLOCK))


def test_no_races_and_a_grid_as_long_as_the_work():
    """Forward and backward under the race detector; each kernel visits its list, no pair more."""
    points = []

    def record(token, *point):
        points.append(point)
        return token

    seen = replace(INTERPRET, grid_point_recorder=record)
    cases = TestMosaic()
    cases.length, cases.impl = 24, Mosaic(query_tile=8, key_tile=8, interpret=seen)
    case = cases.case(cases.row([Document(7, 3, 1), Document(2, 4), Document(14, 4)]), TOKEN)
    with watched(kernels=3):
        jax.block_until_ready(cases.check(case))
    tiles = tile_map(case.intervals, 24, 8, 8)
    lists = [tile_list(tiles), tile_list(tiles), tile_list(tiles, by_keys=True)]
    assert len(points) == 2 * sum(int(found.count) for found in lists)
    assert sum(int(found.count) for found in lists) < 3 * 2 * 3 * 3


def test_more_pairs_of_tiles_than_scalar_memory_lists_are_refused():
    """16 rows of 32768 in tiles of 512: the list would be a whole MiB."""
    row = jax.ShapeDtypeStruct((16, 32768, 1, 128), jnp.bfloat16)
    bounds = Intervals(*[jax.ShapeDtypeStruct((16, 32768), jnp.int32)] * 4)
    with pytest.raises(NotImplementedError, match="scalar memory; use larger tiles than 512 x 512"):
        jax.eval_shape(Mosaic().attention, row, row, row, bounds)


def test_tiles_shrink_with_short_rows_and_large_groups():
    """Two tiles a row at least; a query tile with its heads and a key tile stay within 1.25 MiB."""
    assert [_tile(512, n) for n in (5, 128, 129, 512, 700, 4096)] == [16, 128, 128, 256, 384, 512]

    def sizes(group, head_dim, dtype):
        q = jax.ShapeDtypeStruct((1, 4096, 2 * group, head_dim), dtype)
        k = jax.ShapeDtypeStruct((1, 4096, 2, head_dim), dtype)
        return _sizes(Mosaic(), q, k)[:2]

    assert sizes(8, 128, jnp.bfloat16) == sizes(4, 128, jnp.float32) == (512, 512)
    assert sizes(16, 128, jnp.bfloat16) == sizes(2, 256, jnp.float32) == (256, 512)
    assert sizes(4, 512, jnp.bfloat16) == (128, 512) and sizes(2, 512, jnp.float32) == (128, 256)
    with pytest.raises(NotImplementedError, match="32 heads a group of head_dim 128 in float32"):
        sizes(32, 128, jnp.float32)
