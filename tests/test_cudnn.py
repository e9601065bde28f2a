"""The chunks of queries that cuDNN is called for: by XLA here, by cuDNN where there is a GPU."""

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

from pallas_kernels import Cudnn, Dense, Intervals
from pallas_kernels.cudnn import _chunk


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
