"""TPU programs, compiled ahead of time by libtpu on a machine without a TPU.

What they compute is test_mosaic.py's subject; here it is whether Mosaic takes them on each chip and
what the compiled programs hold.
"""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bdjax import apply_overrides, load_config
from bdjax.hlo import largest_buffers, mosaic_calls
from bdjax.plan import compile_step, tpu_slice
from bdjax.sharding import make_mesh
from pallas_kernels import Intervals, Mosaic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import compile_tpu

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


@pytest.mark.slow
def test_tiles_that_vmem_does_not_hold_shrink_until_they_compile():
    """Two heads of 256 a group in float32: asked for tiles of 512."""
    program = training("v5e-4", 256, "float32", tile=512)
    assert sum(mosaic_calls(program.as_text()).values()) == 3


# A small shape, with lengths and a vocabulary that nothing else has.
LENGTH, SLOTS, ROWS, WIDTH = 2048, 8192, 32, 384
SPINE = (
    f"mesh.data=1 mesh.fsdp=8 mesh.tensor=2 data.batch_size=8 data.row_length={LENGTH} "
    f"model.num_layers=2 model.width={WIDTH} model.num_heads=16 model.num_kv_heads=8 "
    "model.head_dim=128 model.mlp_width=512"
)


@pytest.fixture(scope="module")
def spine():
    return apply_overrides(load_config("configs/pod_1b.py"), SPINE.split())


def no_logits(text: str, rows: int, vocabulary: int) -> None:
    """No array of `rows` rows over the vocabulary or a device's half of it, but the weights."""
    for buffer in largest_buffers(text, rows * vocabulary // 2):
        long = set(buffer.shape) & {vocabulary, vocabulary // 2}
        assert not long or WIDTH in buffer.shape, buffer


@pytest.mark.long
def test_the_train_step_of_a_slice_calls_the_kernels_and_holds_no_square_and_no_logits(spine):
    """v5e-16, explicit sharding: forward twice (rematerialised), both backward kernels, a layer."""
    text = compile_step(spine, "v5e-16").compiled.as_text()
    assert mosaic_calls(text) == {
        "two_stream_forward": 2 * spine.model.num_layers,
        "two_stream_backward_queries": spine.model.num_layers,
        "two_stream_backward_keys": spine.model.num_layers,
    }
    assert largest_buffers(text, 1) and not largest_buffers(text, (2 * LENGTH) ** 2)
    no_logits(text, LENGTH, spine.vocab_size)


@pytest.mark.long
def test_the_sampler_of_a_slice_calls_the_window_kernel_and_copies_no_cache(spine):
    """The loop of `advance` on v5e-16: a window call a layer in each of its two forward passes
    (fused and not), and temporaries far below the cache of 4 rows and 4 heads a device."""
    program = compile_tpu.compile_sampler(spine, "v5e-16", ROWS, SLOTS)
    text, layers = program.as_text(), spine.model.num_layers
    assert mosaic_calls(text) == {"window_attention": 2 * layers}
    cache = (layers, ROWS // 8, 4, SLOTS, 128)
    window = 2 * spine.objective.block_size.largest
    for buffer in largest_buffers(text, ROWS // 8 * window * SLOTS):
        assert math.prod(buffer.shape) == math.prod(cache), buffer
    no_logits(text, ROWS // 8 * window, spine.vocab_size)
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * 2 * 2 * math.prod(cache)
