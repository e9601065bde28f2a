"""The Hopper window kernel: its chunks, its numbers and barriers in the interpreter, and a GPU."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BLOCK, TOKEN, AttentionCases, assert_close, reference
from gpu_interpret import interpreted

from pallas_kernels import Blockwise, Intervals
from pallas_kernels.gpu_chunks import chunk_counts, cut
from pallas_kernels.gpu_window import WindowSizes, _Plan, window_attention
from pallas_kernels.merge import EMPTY

SLOTS = 256


class Window(NamedTuple):
    """Queries and a stacked cache; what nobody sees, and other layers, hold NaN."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bounds: Intervals


def window(ends, heads, kv_heads, width=64, layer=1, slots=SLOTS) -> Window:
    """ends: (4, B, T), the fields of the intervals."""
    rng = np.random.default_rng(0)
    bounds = Intervals(*np.asarray(ends, np.int32))
    rows, queries = bounds.a0.shape
    q = rng.standard_normal((rows, queries, heads, width))
    k, v = rng.standard_normal((2, 3, rows, kv_heads, slots, width))
    seen = visible(bounds, slots).any(axis=1)
    for cache in (k, v):
        cache[np.arange(3) != layer] = np.nan
        cache[layer] = np.where(seen[:, None, :, None], cache[layer], np.nan)
    return Window(q, k, v, bounds)


def prefixes(lengths, queries):
    """Rows of these lengths, of which the first half of the queries sees five keys less."""
    ends = np.repeat(np.array(lengths)[:, None], queries, axis=1)
    ends[:, : queries // 2] = np.maximum(ends[:, : queries // 2] - 5, 0)
    return [ends * 0, ends, ends * 0, ends * 0]


def visible(bounds: Intervals, slots: int) -> np.ndarray:
    key = np.arange(slots)
    a0, a1, b0, b1 = (np.asarray(x)[..., None] for x in bounds)
    return ((key >= a0) & (key < a1)) | ((key >= b0) & (key < b1))


def run(made: Window, dtype="bfloat16", layer=1, **sizes):
    """The kernel's answer from the interpreter, which raises for a race or a barrier left over."""
    q, k, v = (jnp.asarray(x, dtype) for x in made[:3])
    bounds = Intervals(*(jnp.asarray(x) for x in made.bounds))
    with interpreted():
        call = jax.jit(partial(window_attention, sizes=WindowSizes(**sizes)))
        out, lse = jax.block_until_ready(call(q, k, v, jnp.int32(layer), bounds))
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def check(made: Window, dtype="bfloat16", layer=1, **sizes):
    """The law: the float64 reference over the slots that are seen; zeros and EMPTY for nothing."""
    out, lse = run(made, dtype, layer, **sizes)
    q, k, v = (np.nan_to_num(np.asarray(jnp.asarray(x, dtype), np.float64)) for x in made[:3])
    k, v = (x[layer].swapaxes(1, 2) for x in (k, v))
    seen = visible(made.bounds, k.shape[1])
    expected = reference(q, k, v, np.zeros_like(q), np.zeros(q.shape[:3]), seen)
    some = seen.any(axis=-1)
    assert_close(out, expected.out, 1e-2, "out", by_norms=True)
    assert_close(lse[some], expected.lse[some], 1e-3, "lse")
    assert (out[~some] == 0).all() and (lse[~some] == np.float32(EMPTY)).all()


# --- The chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(0, 0, 0), (200, 200, 200), (1, 200, 64), (130, 0, 7)])
@pytest.mark.parametrize("blocks", [1, 7, 12, 40])
def test_chunks_are_each_tile_of_the_covers_once(lengths, blocks):
    """As equal as their number allows, in order, full tiles inside."""
    bounds = Intervals(*(jnp.asarray(x, jnp.int32) for x in prefixes(lengths, 4)))
    total, most = chunk_counts(len(lengths), 2, 13, blocks)
    found = jax.tree.map(np.asarray, cut(bounds, 16, total, most, 13))
    tiles = [
        (row, tile)
        for row, begin, count in zip(found.row, found.begin, found.count, strict=True)
        for tile in range(begin, begin + count)
    ]
    assert tiles == [(row, t) for row, n in enumerate(lengths) for t in range(-(-n // 16))]
    assert (found.chunks <= most).all() and found.chunks.sum() <= total
    for row, (start, chunks) in enumerate(zip(found.start, found.chunks, strict=True)):
        assert (found.row[start : start + chunks] == row).all()
    if sum(lengths) == 600:
        assert found.count.max() <= -(-13 // (total // 3))
    end, full_end = found.begin + found.count, found.full + found.full_count
    assert (found.full >= found.begin).all() and (full_end <= np.maximum(end, found.begin)).all()
    seen = np.asarray(bounds.mask(208)).reshape(3, 4, 13, 16).all(axis=(1, 3))
    full = {
        (row, tile)
        for row, begin, count in zip(found.row, found.full, found.full_count, strict=True)
        for tile in range(begin, begin + count)
    }
    assert full == {(row, tile) for row, tile in tiles if seen[row, tile]}


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 12, 64, 200])
def test_equal_rows_fill_the_chip(batch):
    """At most a quarter of the multiprocessors idles in the last wave."""
    total, most = chunk_counts(batch, 8, 512, 132)
    blocks = total // batch * batch * 8
    assert total >= batch and most >= total // batch
    assert blocks / (132 * -(-blocks // 132)) > 0.75


# --- The interpreter ------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_of_any_length_in_chunks():
    """Lengths 0 and between, two KV heads, queries that fill no tile of rows."""
    check(window(prefixes((0, 130), 4), 4, 2), blocks=8)


@pytest.mark.slow
def test_several_warpgroups_two_intervals_holes_and_idle_queries():
    """Keys between the intervals that nobody sees hold NaN, and so do idle queries."""
    a0 = [[3] * 6, [0] * 2 + [70] * 4]
    a1 = [[30] * 6, [0] * 2 + [190] * 4]
    b0 = [[50] * 6, [0] * 6]
    b1 = [[60] * 6, [0] * 6]
    made = window([a0, a1, b0, b1], 16, 1)
    idle = ~visible(made.bounds, SLOTS).any(axis=2)
    assert idle.any()
    check(made._replace(q=np.where(idle[..., None, None], np.nan, made.q)), blocks=2, stages=2)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, None])
def test_two_warpgroups_take_turns_over_full_tiles(stages):
    """Chunks of full tiles alone, of full and masked ones, of a masked one, of none: groups of 3.

    Both warpgroups arrive equally often on every way, or the interpreter would wait for ever.
    """
    made = window(prefixes((256, 60, 0), 24), 9, 3)
    assert _Plan.of(WindowSizes(), 3 * 24, 64, 2).warpgroups == 2
    check(made, key_tile=64, blocks=12, stages=stages)


@pytest.mark.slow
def test_float16_wide_heads_large_scores_and_one_row():
    """Scores of hundreds; another layer; one row, whose chunks are merged without a gather."""
    made = window(prefixes((150,), 4), 2, 1, width=128, layer=2)
    check(made._replace(q=made.q * 64), dtype="float16", layer=2, blocks=2)


@pytest.mark.slow
def test_a_nan_that_is_seen_stays_seen():
    """In keys or in values; a row without is untouched."""
    made = window(prefixes((70, 40, 20), 2), 1, 1)
    made.k[1, 0, 0, 3] = made.v[1, 1, 0, 39] = np.nan
    out, _ = run(made, blocks=3)
    sees = visible(made.bounds, SLOTS)
    for row, slot in ((0, 3), (1, 39)):
        assert sees[row, :, slot].any() and np.isnan(out[row, sees[row, :, slot]]).all()
    assert np.isfinite(out[2]).all()


def test_what_it_refuses():
    def refuses(made, match, dtype="bfloat16"):
        with pytest.raises(NotImplementedError, match=match):
            run(made, dtype)

    refuses(window(prefixes((4,), 257), 1, 1, slots=8), "up to 256, not 257; use Blockwise")
    refuses(window(prefixes((4,), 2), 1, 1, slots=9), "slots in eights, not 9; give")
    refuses(window(prefixes((4,), 2), 1, 1, width=80, slots=8), "64, 128 and 256, not 80")
    refuses(window(prefixes((4,), 2), 1, 1, slots=8), "bfloat16 or float16, not float32", "float32")
    with pytest.raises(ValueError, match="key_tile=100 must be a multiple of 64"):
        WindowSizes(key_tile=100)
    for name in ("stages", "blocks"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            WindowSizes(**{name: 0})


def test_warpgroups_leave_shared_memory_for_two_stages():
    """Three of 64 rows of head_dim 256 would not: two compute. Where one does not, a refusal."""
    assert _Plan.of(WindowSizes(warpgroups=3), 512, 256, 2).warpgroups == 2
    assert _Plan.of(WindowSizes(warpgroups=3), 512, 128, 2).warpgroups == 3
    with pytest.raises(NotImplementedError, match="use a smaller key_tile"):
        _Plan.of(WindowSizes(key_tile=128), 512, 256, 2)


# --- A GPU ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Kernel:
    """The kernel as an implementation; its attention is not this file's."""

    sizes: WindowSizes = WindowSizes()

    def prefix_attention(self, q, cache_k, cache_v, layer, intervals):
        return window_attention(q, cache_k, cache_v, layer, intervals, sizes=self.sizes)


@pytest.mark.gpu
class TestOnGpu:
    """The prefix laws of every implementation, with several sizes."""

    @pytest.mark.parametrize("queries, keys", [(10, 40), (64, 200), (256, 4096)])
    @pytest.mark.parametrize("width", [64, 128, 256])
    @pytest.mark.parametrize(
        "sizes", [WindowSizes(), WindowSizes(warpgroups=3), WindowSizes(stages=2)], ids=str
    )
    def test_prefix(self, queries, keys, width, sizes):
        cases = AttentionCases()
        cases.impl, cases.dtype, cases.width = _Kernel(sizes=sizes), "bfloat16", width
        cases.window = queries, keys
        cases.test_prefix_attention_reads_one_layer_of_a_stacked_cache()

    @pytest.mark.parametrize("clean", [TOKEN, BLOCK])
    def test_bits_repeat_and_agree_with_blockwise(self, clean):
        cases = AttentionCases()
        cases.dtype, cases.width, cases.window = "bfloat16", 128, (32, 1000)
        case = cases.window_case(clean)
        q, k, v = (jnp.asarray(x, "bfloat16") for x in (case.q, case.k, case.v))
        k, v = (x.swapaxes(1, 2)[None] for x in (k, v))
        arguments = q, k, v, jnp.int32(0), case.intervals
        one, two = (jax.jit(_Kernel().prefix_attention)(*arguments) for _ in range(2))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
        want = Blockwise().prefix_attention(*arguments)
        assert_close(one[0], np.asarray(want[0], np.float64), 1e-2, "out", by_norms=True)
