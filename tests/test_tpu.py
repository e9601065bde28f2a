"""TPU programs, compiled ahead of time by libtpu on a machine without a TPU.

What they compute is test_mosaic.py's subject; here it is whether Mosaic takes them on each chip and
what the compiled programs hold.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bdjax.hlo import mosaic_calls
from bdjax.plan import tpu_slice
from bdjax.sharding import make_mesh
from pallas_kernels import Intervals, Mosaic

pytest.importorskip("libtpu", reason="pip install 'bdjax[plan]'")

CHIPS = {"v5e-4": "TPU v5 lite", "v5p-8": "TPU v5", "v6e-4": "TPU v6 lite", "7x-8": "TPU7x"}
SHAPES = {"64": 64, "80": 80, "256": 256, "float32": 128}


def compiled(topology: str, function, *shapes):
    """`function` of replicated arrays, compiled for one device of a slice."""
    mesh = make_mesh(devices=tpu_slice(topology)[:1])
    placed = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes
    )
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def shape(*dims, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def bounds(rows: int, length: int) -> Intervals:
    return Intervals(*[shape(rows, length, dtype="int32")] * 4)


def training(topology: str, head_dim: int, dtype: str = "bfloat16", tile: int = 256):
    """Forward and backward of a row of 2 x 512, four heads over two."""
    impl = Mosaic(query_tile=tile, key_tile=tile)

    def both(q, k, v, bounds, d_out, d_lse):
        found, pull = jax.vjp(lambda q, k, v: impl.attention(q, k, v, bounds), q, k, v)
        return found, pull((d_out, d_lse))

    q, k = shape(2, 1024, 4, head_dim, dtype=dtype), shape(2, 1024, 2, head_dim, dtype=dtype)
    lse = shape(2, 1024, 4, dtype="float32")
    return compiled(topology, both, q, k, k, bounds(2, 1024), q, lse)


@pytest.mark.parametrize("topology", CHIPS)
def test_forward_and_backward_compile_for_every_chip(topology):
    assert tpu_slice(topology)[0].device_kind == CHIPS[topology]
    found = mosaic_calls(training(topology, 128).as_text())
    assert list(found.values()) == [1, 1, 1]
    for name in ("two_stream_forward", "two_stream_backward_queries", "two_stream_backward_keys"):
        assert any(name in call for call in found), found


@pytest.mark.slow
@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("what", SHAPES)
def test_every_head_dim_and_float32_compile(topology, what):
    dtype = what if what == "float32" else "bfloat16"
    assert sum(mosaic_calls(training(topology, SHAPES[what], dtype).as_text()).values()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("topology", CHIPS)
def test_the_tiles_of_the_table_compile(topology):
    for head_dim in (64, 128):
        tile = Mosaic.tuned(CHIPS[topology], head_dim).query_tile
        assert sum(mosaic_calls(training(topology, head_dim, tile=tile).as_text()).values()) == 3


@pytest.mark.parametrize("topology", CHIPS)
def test_the_window_kernel_reads_a_long_cache_in_place(topology):
    """28 layers of 8 rows, 8 KV heads, 5000 slots: no layer of it is ever copied."""
    q = shape(8, 32, 16, 128)
    cache = shape(28, 8, 8, 5000, 128)
    impl = Mosaic.tuned(CHIPS[topology], 128)
    program = compiled(
        topology, impl.prefix_attention, q, cache, cache, shape(dtype="int32"), bounds(8, 32)
    )
    assert mosaic_calls(program.as_text()) == {"window_forward": 1}
    layer = math.prod(cache.shape[1:]) * 2
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * layer
