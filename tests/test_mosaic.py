"""The TPU kernels in interpret mode: the laws of attention, races, and what a grid visits."""

import jax
from attention_cases import AttentionCases
from tpu_interpret import INTERPRET, assert_no_races

from pallas_kernels import Mosaic


class TestMosaic(AttentionCases):
    """Tiles that divide the row; queries and keys of tests shorter than a tile share it."""

    impl = Mosaic(query_tile=16, key_tile=16, interpret=True)

    def run(self, case, dtype="float32", bounds=None):
        result = super().run(case, dtype, bounds)
        jax.block_until_ready(result)
        assert_no_races()
        return result


class TestMosaicRaggedTiles(TestMosaic):
    """Tiles of different lengths that do not divide the row."""

    impl = Mosaic(query_tile=32, key_tile=16, interpret=INTERPRET)
