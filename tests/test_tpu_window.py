"""The TPU window kernel without a TPU: its numbers, its grid, races, and what it compiles to."""

import math
import re
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_close, reference
from jax.sharding import NamedSharding, PartitionSpec
from tpu_interpret import INTERPRET, assert_no_races

from bdjax.hlo import array_bytes, mosaic_calls
from bdjax.plan import tpu_slice
from bdjax.sharding import make_mesh
from pallas_kernels import Intervals
from pallas_kernels.merge import EMPTY
from pallas_kernels.tpu_window import cover, window_attention

SLOTS, TILE = 44, 16
LENGTHS = (0, 44, 19, 32)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class Window(NamedTuple):
    """Queries and a stacked cache; slots past a row's length, and other layers, hold NaN."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bounds: Intervals


def window(queries, heads, kv_heads, lengths=LENGTHS, width=8, layer=1, slots=SLOTS) -> Window:
    """A window per length: its second half sees all of the row, its first half all but five."""
    rng = np.random.default_rng(queries)
    rows = len(lengths)
    ends = np.repeat(np.array(lengths, np.int32)[:, None], queries, axis=1)
    ends[:, : queries // 2] = np.maximum(ends[:, : queries // 2] - 5, 0)
    zeros = np.zeros_like(ends)
    q = rng.standard_normal((rows, queries, heads, width)).astype(np.float32)
    k, v = rng.standard_normal((2, 3, rows, kv_heads, slots, width)).astype(np.float32)
    past = np.arange(slots) >= np.array(lengths)[:, None]
    for cache in (k, v):
        cache[np.arange(3) != layer] = np.nan
        cache[layer] = np.where(past[:, None, :, None], np.nan, cache[layer])
    return Window(q, k, v, Intervals(zeros, ends, zeros, zeros))


@partial(jax.jit, static_argnames=("tile", "interpret"))
def call(q, k, v, layer, bounds, tile=TILE, interpret=True):
    return window_attention(q, k, v, layer, bounds, key_tile=tile, interpret=interpret)


def run(made: Window, layer=1, dtype="float32", **options):
    """The kernel's answer as numpy arrays; without a race on the way, if that is looked for."""
    q, k, v = (jnp.asarray(x, dtype) for x in made[:3])
    bounds = Intervals(*(jnp.asarray(x, jnp.int32) for x in made.bounds))
    out, lse = jax.block_until_ready(call(q, k, v, jnp.asarray(layer), bounds, **options))
    if "interpret" in options:
        assert_no_races()
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def visible(bounds: Intervals, slots: int) -> np.ndarray:
    key = np.arange(slots)
    a0, a1, b0, b1 = (np.asarray(x)[..., None] for x in bounds)
    return ((key >= a0) & (key < a1)) | ((key >= b0) & (key < b1))


def check(made: Window, layer=1, dtype="float32", **options):
    """The law: the float64 reference over the slots that are seen; zeros and EMPTY for nothing."""
    out, lse = run(made, layer, dtype, **options)
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in made[:3]]
    q = rounded[0]
    k, v = (np.nan_to_num(x[layer]).swapaxes(1, 2) for x in rounded[1:])
    seen = visible(made.bounds, k.shape[1])
    expected = reference(q, k, v, np.zeros_like(q), np.zeros(q.shape[:3]), seen)
    some = seen.any(axis=-1)
    assert_close(out, expected.out, TOLERANCE[dtype], "out")
    assert_close(lse[some], expected.lse[some], TOLERANCE[dtype], "lse")
    assert (out[~some] == 0).all() and (lse[~some] == np.float32(EMPTY)).all()


@pytest.mark.parametrize("queries, heads, kv_heads, width", [(1, 1, 1, 8), (13, 4, 2, 128)])
def test_rows_of_any_length_without_races_in_a_grid_as_long_as_the_work(
    queries, heads, kv_heads, width
):
    """Lengths 0, S and between, S no multiple of the tile, NaN past them and in other layers.

    The grid: one step for a row that sees nothing, else the tiles up to its length, once for each
    of the groups of heads.
    """
    points = []

    def record(token, *point):
        points.append(point)
        return token

    seen = replace(INTERPRET, grid_point_recorder=record)
    check(window(queries, heads, kv_heads, width=width), interpret=seen)
    assert len(points) == kv_heads * (1 + 3 + 2 + 2)


@pytest.mark.parametrize("group, kv_heads", [(1, 8), (2, 3), (4, 1)])
def test_groups_of_heads_several_to_a_step(group, kv_heads):
    """Eight KV heads go by fours, three by ones."""
    check(window(8, group * kv_heads, kv_heads, lengths=(0, 19)))


@pytest.mark.parametrize("width", [8, 128])
def test_bfloat16(width):
    check(window(13, 4, 2, width=width), dtype="bfloat16")


def test_the_layer_is_data():
    """One compiled program reads any layer."""
    made = window(13, 4, 2, layer=2)
    check(made, layer=2)
    before = call._cache_size()
    check(window(13, 4, 2, layer=0), layer=0)
    assert call._cache_size() == before


@pytest.mark.parametrize("width", [8, 128])
def test_two_intervals_per_query_that_start_anywhere(width):
    """Clean and own intervals, apart and touching, rows with one of them and with none."""
    made = window(6, 4, 2, lengths=(44,) * 4, width=width)
    a0 = [[3] * 6, [0, 0, 7, 7, 0, 0], [20] * 6, [40, 0, 0, 0, 0, 1]]
    a1 = [[30] * 6, [7, 7, 12, 12, 0, 0], [20] * 6, [44, 0, 0, 0, 0, 2]]
    b0 = [[31] * 6, [9, 9, 12, 12, 33, 0], [17] * 6, [0, 0, 0, 0, 0, 43]]
    b1 = [[40] * 6, [13, 9, 44, 13, 34, 0], [31] * 6, [0, 0, 0, 0, 0, 44]]
    bounds = Intervals(*(np.array(x, np.int32) for x in (a0, a1, b0, b1)))
    low, high = [3, 0, 17, 1], [40, 44, 31, 44]
    assert [list(map(int, x)) for x in cover(bounds, TILE)[2:4]] == [low, high]
    slot = np.arange(SLOTS)
    outside = (slot < np.array(low)[:, None]) | (slot >= np.array(high)[:, None])
    k, v = (np.where(outside[None, :, None, :, None], np.nan, x) for x in (made.k, made.v))
    check(made._replace(k=k, v=v, bounds=bounds))


def test_more_rows_than_are_scored_at_once():
    """256 queries of a group of two: 512 rows of scores in parts."""
    check(window(256, 2, 1, lengths=(19,)))


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_every_head_dim(width):
    check(window(3, 2, 1, lengths=(20,), width=width, slots=24))


def test_scores_of_hundreds_do_not_overflow():
    made = window(13, 4, 2)
    out, lse = run(made._replace(q=made.q * 256))
    assert np.isfinite(out).all() and lse.max() > 100


def test_a_nan_that_is_seen_stays_seen():
    """In keys and in values, in full tiles and in others; other rows and KV heads are untouched."""
    made = window(13, 4, 2)
    quiet, _ = run(made)
    for name, slot in (("k", 3), ("v", 3), ("v", 40)):
        cache = getattr(made, name).copy()
        cache[1, 1, 0, slot] = np.nan
        out, _ = run(made._replace(**{name: cache}))
        sees = visible(made.bounds, SLOTS)[1, :, slot]
        assert sees.any() and np.isnan(out[1, sees][:, :2]).all()
        assert np.array_equal(out[[0, 2, 3]], quiet[[0, 2, 3]])
        assert np.array_equal(out[1, :, 2:], quiet[1, :, 2:])


def test_bits_repeat():
    made = window(13, 4, 2)
    for first, second in zip(run(made), run(made), strict=True):
        assert first.tobytes() == second.tobytes()


def test_what_it_refuses():
    made = window(257, 2, 1, lengths=(4,))
    with pytest.raises(NotImplementedError, match="up to 256, not 257; use Blockwise"):
        run(made)
    with pytest.raises(NotImplementedError, match="float16; use bfloat16"):
        run(window(2, 2, 1), dtype="float16")
    with pytest.raises(ValueError, match="key_tile=100 must be a multiple of 128"):
        run(window(2, 2, 1), tile=100, interpret=False)


# --- What it compiles to --------------------------------------------------------------------------


def compiled(topology, head_dim=128, slots=4104, tile=512, dtype="bfloat16", queries=32, heads=16):
    """28 layers of 4 rows, query heads over 8, compiled for one device of a slice."""
    pytest.importorskip("libtpu", reason="pip install 'bdjax[plan]'")
    mesh = make_mesh(devices=tpu_slice(topology)[:1])
    placed = NamedSharding(mesh, PartitionSpec())

    def shape(*dims, dtype=dtype):
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=placed)

    cache = shape(28, 4, 8, slots, head_dim)
    bounds = Intervals(*[shape(4, queries, dtype="int32")] * 4)
    arguments = shape(4, queries, heads, head_dim), cache, cache, shape(dtype="int32"), bounds
    function = partial(window_attention, key_tile=tile)
    with jax.set_mesh(mesh):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",)).compile(), cache


def check_program(program, cache):
    """One Mosaic call that reads the argument itself: nothing else is as long as a layer of it."""
    text = program.as_text()
    assert "tpu_custom_call" in text and mosaic_calls(text) == {"window_attention": 1}
    layer = math.prod(cache.shape[1:]) * cache.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * layer
    results = re.findall(r"^\s+(?:ROOT )?%?\S+ = (\S+) ([\w-]+)\(", text, re.MULTILINE)
    large = {opcode for shape, opcode in results if array_bytes(shape) >= layer}
    assert large <= {"parameter", "bitcast"} and "parameter" in large


@pytest.mark.parametrize("topology", ["v5e-4", "v5p-8", "v6e-4", "7x-8"])
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_it_reads_a_long_cache_in_place(topology, head_dim):
    check_program(*compiled(topology, head_dim))


def test_it_reads_a_long_cache_in_place_row_by_row():
    check_program(*compiled("v5e-4", 128))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e-4", "7x-8"])
@pytest.mark.parametrize(
    "what",
    [
        {"head_dim": 80},
        {"head_dim": 96},
        {"head_dim": 256, "tile": 1024},
        {"dtype": "float32", "tile": 1024},
        {"queries": 256},
        {"queries": 256, "heads": 64, "tile": 1024},
        {"heads": 8, "tile": 2048},
        {"queries": 1},
        {"slots": 100},
    ],
    ids=str,
)
def test_other_shapes_compile(topology, what):
    program, _ = compiled(topology, **what)
    assert mosaic_calls(program.as_text()) == {"window_attention": 1}
