"""The chunks of queries that cuDNN is called for: by XLA here, by cuDNN where there is a GPU."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BLOCK,
    TOKEN,
    AttentionCases,
    Document,
    find,
    make_case,
    pack,
    run_jit,
    stack,
    with_views,
)
from jax import lax

from pallas_kernels import Blockwise, Cudnn, Dense, Intervals, Mosaic
from pallas_kernels.cudnn import _chunk, _chunked


class TestChunks(AttentionCases):
    """Chunks that do not divide the row, through jax's own attention instead of cuDNN's."""

    impl = Cudnn(query_chunk=14, backend="xla")
    halves = ("bfloat16",)  # XLA's CPU products take no float16


@pytest.mark.gpu
class TestCudnn(AttentionCases):
    """Rows of one call."""

    impl = Cudnn()
    width = 64
    dtype = "bfloat16"

    def test_vmap_is_a_loop(self):
        """jax has no batching rule for cuDNN under a mask; it says so."""
        with pytest.raises(NotImplementedError):
            super().test_vmap_is_a_loop()


@pytest.mark.gpu
class TestCudnnInChunks(TestCudnn):
    """Several chunks a row, the last one partly empty."""

    impl = Cudnn(query_chunk=64)
    length = 240
    width = 128


def test_what_a_chunk_gathers_is_what_its_queries_see():
    """Every visible key stands once in the gathered order, and goes back to where it came from."""
    meta = stack(
        with_views(pack(24, [Document(9, 4, 2), Document(11, 3)]), 2), with_views(pack(24, []), 2)
    )
    bounds, at = find(meta, meta, TOKEN), jnp.arange(72)
    for first in range(0, 72, 8):
        own = Intervals(*(x[:, first : first + 8] for x in bounds))
        chunk = _chunk(own)
        key, (place, there) = chunk.key(at), chunk.place(at)
        seen = np.asarray(own.mask(72)).any(axis=1)
        for row in range(2):
            order = list(np.asarray(key)[row, : int(chunk.length[row])])
            assert len(set(order)) == len(order)
            assert set(np.flatnonzero(seen[row])) <= set(order)
            for one in range(72):
                assert bool(there[row, one]) == (one in order)
                assert not there[row, one] or order[int(place[row, one])] == one


def shapes(jaxpr):
    """Of everything that a jaxpr computes, its bodies included."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        for body in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            body = getattr(body, "jaxpr", body)
            if hasattr(body, "eqns"):
                yield from shapes(body)


def layers(attention):
    """Two layers of attention whose log-sum-exp nobody uses."""

    def run(x, bounds):
        step = jax.checkpoint(lambda x: attention(x, x, x, bounds))
        return lax.scan(lambda x, _: (step(x), None), x, length=2)[0].sum()

    return jax.grad(run)


@pytest.mark.parametrize(
    "impl, pairs",
    [(Cudnn(query_chunk=64, backend="xla"), 64 * 4096), (Blockwise(), 128**2), (Mosaic(), 512**2)],
    ids=["cudnn", "blockwise", "mosaic"],
)
def test_nothing_of_a_long_row_is_as_large_as_its_square(impl, pairs):
    """Outputs and gradients, the log-sum-exp's included, by `pairs` of a query and a key."""
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    bounds = Intervals(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 4)

    def run(q, k, v, bounds):
        out, lse = impl.attention(q, k, v, bounds)
        return out.sum() + lse.sum()

    jaxpr = jax.make_jaxpr(jax.grad(run, argnums=(0, 1, 2)))(x, x, x, bounds)
    found = {math.prod(shape) for shape in shapes(jaxpr.jaxpr)}
    assert pairs in found and max(found) < length**2 // 8


def test_the_log_sum_exp_costs_nothing_where_nobody_uses_it():
    """The gradient through two rematerialised layers computes the products of the output alone."""
    impl = Cudnn(query_chunk=8, backend="xla")
    x = jax.ShapeDtypeStruct((1, 16, 1, 8), jnp.float32)
    bounds = Intervals(*[jax.ShapeDtypeStruct((1, 16), jnp.int32)] * 4)

    def products(attention):
        compiled = jax.jit(layers(attention)).lower(x, bounds).compile()
        return compiled.as_text().count(" dot(")

    alone = products(lambda q, k, v, bounds: _chunked(impl, q, k, v, bounds))
    assert 0 < products(lambda *x: impl.attention(*x)[0]) == alone


def test_one_call_and_chunks_agree():
    """The same row as one call and as chunks: outputs and gradients to rounding."""
    meta = stack(with_views(pack(24, [Document(13, 4), Document(11, 5)]), 1))
    case = make_case(meta, meta, BLOCK, heads=2, kv_heads=1, width=8)
    arrays = [jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v)]
    cotangents = [jnp.asarray(x, jnp.float32) for x in (case.d_out, case.d_lse)]
    one, many = (
        run_jit(Cudnn(query_chunk=size, backend="xla"), *arrays, case.intervals, *cotangents)
        for size in (48, 10)
    )
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_cudnn_says_what_it_cannot_serve():
    meta = stack(with_views(pack(8, [Document(8, 4)]), 1))
    case = make_case(meta, meta, BLOCK, heads=2, kv_heads=1, width=8)
    arrays = [jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v)]
    with pytest.raises(NotImplementedError, match="not float32; use Dense"):
        Cudnn().attention(*arrays, case.intervals)
    narrow = [x.astype(jnp.bfloat16)[..., :4] for x in arrays]
    with pytest.raises(NotImplementedError, match="head_dim in eights, not 4"):
        Cudnn().attention(*narrow, case.intervals)
    odd = [x.astype(jnp.bfloat16)[:, :15] for x in arrays]
    fewer = Intervals(*(x[:, :15] for x in case.intervals))
    for found, wanted in zip(
        Cudnn().attention(*odd, fewer), Dense().attention(*odd, fewer), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="query_chunk=7 must be even"):
        Cudnn(query_chunk=7)
