"""Every implementation of attention obeys the same laws; the door to them merges and chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BLOCK,
    AttentionCases,
    Document,
    assert_close,
    find,
    make_case,
    merge_jit,
    pack,
    reference,
    stack,
    with_views,
)

from bdjax import sharding
from bdjax.attention import Prefix, attend, candidates, first_that_serves, prefix_candidates
from pallas_kernels import (
    Blockwise,
    CleanMode,
    Cudnn,
    Dense,
    Hopper,
    Intervals,
    Meta,
    Mosaic,
)
from pallas_kernels.merge import EMPTY


class TestDense(AttentionCases):
    impl = Dense()


class TestBlockwise(AttentionCases):
    """Tiles that divide the row."""

    impl = Blockwise(query_tile=16, key_tile=16)


class TestBlockwiseRaggedTiles(AttentionCases):
    """Tiles that divide nothing: the last key tile overlaps the one before it."""

    impl = Blockwise(query_tile=13, key_tile=7)


@pytest.mark.slow
class TestBlockwiseOneKeyTile(AttentionCases):
    """Key tiles longer than the keys, small query tiles: both intervals lie in one tile."""

    impl = Blockwise(query_tile=5, key_tile=128)


@pytest.mark.parametrize("clean", CleanMode)
def test_rows_packed_with_documents_of_24_tokens(clean):
    """Three to a stream, in tiles that end inside of them."""
    cases = TestBlockwise()
    cases.length = 144
    cases.check(cases.case(cases.row([Document(8, 5), Document(8, 4), Document(8, 24)]), clean))


def test_the_reference_gradients_are_the_slopes_of_its_outputs():
    """Central differences of the float64 reference itself, along random directions."""
    meta = stack(with_views(pack(8, [Document(3, 2, 1), Document(4, 3)]), 1))
    case = make_case(meta, meta, BLOCK, heads=4, kv_heads=2, width=4)
    base = reference(case.q, case.k, case.v, case.d_out, case.d_lse, case.seen)
    rng = np.random.default_rng(0)
    steps = [rng.standard_normal(x.shape) for x in (case.q, case.k, case.v)]
    some = case.seen.any(axis=-1)

    def value(size):
        moved = (x + size * d for x, d in zip((case.q, case.k, case.v), steps, strict=True))
        r = reference(*moved, case.d_out, case.d_lse, case.seen)
        return (r.out * case.d_out).sum() + (r.lse * case.d_lse)[some].sum()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    analytic = sum((g * d).sum() for g, d in zip(base[2:], steps, strict=True))
    assert abs(slope - analytic) < 1e-6 * abs(analytic)


def test_merging_with_nothing_changes_nothing():
    """An empty part (lse EMPTY) is the neutral element, on both sides, gradients included."""
    rng = np.random.default_rng(0)
    out, d_out = (jnp.asarray(rng.standard_normal((1, 3, 2, 4)), jnp.float32) for _ in range(2))
    lse, d_lse = (jnp.asarray(rng.standard_normal((1, 3, 2)), jnp.float32) for _ in range(2))
    nothing = jnp.zeros_like(out), jnp.full_like(lse, EMPTY)
    for left, right, at in (((out, lse), nothing, 0), (nothing, (out, lse), 2)):
        merged, pulled = merge_jit([*left, *right], d_out, d_lse)
        assert np.array_equal(merged[0], out) and np.array_equal(merged[1], lse)
        assert np.array_equal(pulled[at], d_out)
        assert_close(pulled[at + 1], np.asarray(d_lse, np.float64), 1e-6)
        assert (np.asarray(pulled[(at + 3) % 4]) == 0).all()
    merged, pulled = merge_jit([*nothing, *nothing], d_out, d_lse)
    assert (np.asarray(merged[0]) == 0).all() and (np.asarray(merged[1]) == EMPTY).all()
    assert all(np.isfinite(np.asarray(x)).all() for x in pulled)


def test_tiles_must_be_positive():
    with pytest.raises(ValueError, match="query_tile"):
        Blockwise(query_tile=0)
    with pytest.raises(ValueError, match="key_tile"):
        Blockwise(key_tile=-1)


def test_the_choice_goes_by_chip_and_number_of_pairs():
    """Each list ends with something that serves any shape and holds no T x S of a long row."""
    tpu, gpu, older = "TPU v5 lite", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
    assert candidates("cpu", 64, 64, 64) == (Dense(),)
    assert candidates("cpu", 8192, 8192, 64) == (Blockwise(),)
    assert candidates(tpu, 8192, 8192, 128) == (Mosaic.tuned(tpu, 128), Blockwise())
    assert candidates(gpu, 8192, 8192, 128) == (Hopper(), Cudnn(), Blockwise())
    assert candidates("NVIDIA H200", 256, 256, 64) == (Hopper(), Cudnn(), Dense())
    assert candidates(older, 8192, 8192, 128) == (Cudnn(), Blockwise())
    assert candidates(tpu, 64, 64, 128) == candidates(gpu, 64, 64, 128) == (Dense(),)
    assert prefix_candidates(gpu, 512, 64) == prefix_candidates(tpu, 512, 64) == (Dense(),)
    assert prefix_candidates(tpu, 4096, 64) == (Mosaic.tuned(tpu, 64), Blockwise())
    assert prefix_candidates("cpu", 4096, 64) == (Blockwise(),)
    assert prefix_candidates(gpu, 8192, 64) == (Hopper(), Blockwise(key_tile=4096))
    assert prefix_candidates(older, 8192, 64) == (Blockwise(key_tile=4096),)


@pytest.mark.parametrize(
    "impl, needs", [(Hopper(), "H100"), (Cudnn(), "NVIDIA"), (Mosaic(), "TPU")]
)
def test_an_implementation_of_another_chip_says_so(impl, needs):
    x, ends = jnp.ones((1, 8, 2, 8)), jnp.full((1, 8), 8, jnp.int32)
    with pytest.raises(NotImplementedError, match=f"needs an? .*{needs}.*this is cpu"):
        attend(x, x, x, Intervals(ends * 0, ends, ends * 0, ends * 0), impl=impl)


def test_a_refusal_is_passed_over_with_its_reason_and_the_last_one_is_raised(caplog):
    """The choice and each reason are logged once however often it is made."""

    def call(impl):
        if impl == Dense():
            return "served"
        raise NotImplementedError(f"no {impl} on Sundays")

    refusing, serving = Mosaic(query_tile=384), Dense()
    with caplog.at_level("INFO", logger="bdjax.attention"):
        for _ in range(2):
            assert first_that_serves("attention", (refusing, serving), call) == "served"
    said = [r.getMessage() for r in caplog.records]
    assert len([text for text in said if "on Sundays" in text]) == 1
    with pytest.raises(NotImplementedError, match="on Sundays"):
        first_that_serves("attention", (refusing,), call)


@pytest.mark.parametrize("impl", [None, Blockwise(query_tile=4, key_tile=8)], ids=["none", "tiles"])
def test_a_window_over_its_own_keys_and_a_cached_prefix(impl):
    """`attend` on a mesh equals one softmax over the cached and the own keys together."""
    rng = np.random.default_rng(0)
    rows, slots, width = 4, 21, 8
    clean = pack(slots, [Document(slots, 4)])
    own = [np.arange(8) // 4 * 0 + 1 for _ in range(rows)]
    queries, keys = [], []
    for row, length in enumerate([0, 4, 12, 16]):  # cached tokens: whole blocks of 4
        order = length + np.arange(8)
        stream = (np.arange(8) >= 4).astype(np.int32)
        queries.append(Meta(*(x.astype(np.int32) for x in (stream, own[row], order // 4, order))))
        filled = (np.arange(slots) < length).astype(np.int32)
        keys.append(clean._replace(segment=filled))
    query, key = stack(*queries), stack(*keys)
    both = Meta(*(np.concatenate(x, axis=1) for x in zip(key, query, strict=True)))
    case = make_case(query, both, BLOCK, heads=4, kv_heads=2, width=width)
    expected = reference(case.q, case.k, case.v, case.d_out, case.d_lse, case.seen).out
    cache_k, cache_v = (rng.standard_normal((2, rows, 2, slots, width)) for _ in range(2))
    cache_k[1], cache_v[1] = (x[:, :slots].swapaxes(1, 2) for x in (case.k, case.v))
    arrays = (case.q, case.k[:, slots:], case.v[:, slots:], cache_k, cache_v)
    bounds = find(query, query, BLOCK), find(query, key, BLOCK)

    def run(q, k, v, cache_k, cache_v, layer, own, seen):
        return attend(q, k, v, own, Prefix(cache_k, cache_v, layer, seen), impl)

    with jax.set_mesh(sharding.make_mesh(data=4, tensor=2)):
        shards = [
            sharding.reshard(jnp.asarray(x, jnp.float32), *axes)
            for x, axes in zip(
                arrays,
                [("batch", None, heads, None) for heads in ("heads", "kv_heads", "kv_heads")]
                + [(None, "batch", "kv_heads", None, None)] * 2,
                strict=True,
            )
        ]
        spread = [jax.tree.map(lambda x: sharding.reshard(x, "batch", None), b) for b in bounds]
        out = jax.jit(run)(*shards, jnp.asarray(1), *spread)
    assert_close(out, expected, 1e-5)
