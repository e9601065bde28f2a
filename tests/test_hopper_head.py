"""The head's Hopper kernels in jax's interpreter: equal to float64, without races or lost waits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpret import interpreted

from bdjax import nll, stats
from bdjax.readout import Shaping, TokenReadout, readout_stats
from pallas_kernels import hopper_head, hopper_product, hopper_stats

INTERPRETED = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="this jax interprets no accumulators of warpgroups"
)
WIDTH, VOCAB, BANNED = 256, 300, 7
RNG = np.random.default_rng(0)


def normals(*shape):
    return jnp.asarray(RNG.standard_normal(shape) / 4, jnp.bfloat16)


HEAD = normals(VOCAB, WIDTH)


def distance(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.fixture(params=[1, 2], ids=["alone", "pairs"])
def small_chip(request, monkeypatch):
    """One or two blocks for each chip, with and without the multicast; counts its rows."""
    monkeypatch.setattr(hopper_product, "BLOCKS", 2)
    monkeypatch.setattr(hopper_product, "CLUSTER", request.param)
    monkeypatch.setattr(hopper_head, "_SPLITS", 2)
    return hopper_product.tall()


@INTERPRETED
@pytest.mark.parametrize("width", [WIDTH, pytest.param(192, marks=pytest.mark.slow)])
def test_row_statistics_and_gradients(width, small_chip):
    """Of a count that fills no tile, with a last chunk of ids that is no tile either.

    192 columns are no tile of gradients.
    """
    head = HEAD[:, :width]
    rows, count = small_chip + 128, small_chip + 40
    rows += -rows % small_chip
    live = np.arange(rows) < count
    x = jnp.where(live[:, None], normals(rows, width), 0)
    target = jnp.asarray(np.where(live, RNG.integers(8, VOCAB, rows), -1), jnp.int32)
    scale = jnp.asarray(np.where(live, RNG.standard_normal(rows), 0), jnp.float32)
    logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64).T
    logits[:, BANNED] = -np.inf
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1)
    log_total = top + np.log(total)
    banned = (jnp.int32(BANNED),)
    with interpreted():
        found = hopper_head.statistics(x, head, target, jnp.int32(count), banned)
    expected = top, total, logits[np.arange(rows), target]
    for one, want in zip(found, expected, strict=True):
        assert distance(one[:count], want[:count]) < 1e-5
    with interpreted():
        d_x, d_head = hopper_head.gradients(
            x,
            head,
            target,
            jnp.asarray(log_total, jnp.float32),
            scale,
            jnp.int32(count),
            banned,
            dtype=jnp.float32,
            chunk=256,
        )
    hit = np.arange(VOCAB) == np.asarray(target)[:, None]
    d_logits = np.asarray(scale)[:, None] * (np.exp(logits - log_total[:, None]) - hit)
    assert distance(d_x, d_logits @ np.asarray(head, np.float64)) < 4e-3
    assert distance(d_head, d_logits.T @ np.asarray(x, np.float64)) < 4e-3
    assert (np.asarray(d_head)[BANNED] == 0).all()


@INTERPRETED
def test_nothing_scored_is_zero(small_chip):
    x, nothing = normals(small_chip, WIDTH), jnp.zeros((small_chip,))
    target = jnp.full((small_chip,), -1, jnp.int32)
    with interpreted():
        grads = hopper_head.gradients(
            x, HEAD, target, nothing, nothing, jnp.int32(0), dtype=jnp.bfloat16, chunk=512
        )
    assert all((np.asarray(g) == 0).all() for g in grads)


@pytest.fixture
def hopper(monkeypatch):
    """The readout believes to be on an H100."""
    monkeypatch.setattr(nll, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(hopper_product, "BLOCKS", 2)
    monkeypatch.setattr(hopper_head, "_SPLITS", 2)
    monkeypatch.setattr(hopper_stats, "BLOCKS", 2)


@INTERPRETED
def test_the_readout_s_nll_by_kernels_is_that_of_its_loops(hopper, monkeypatch):
    """Rows read twice, rows and entries that are not scored."""
    hidden = normals(2, 24, WIDTH)
    rows = jnp.asarray(RNG.integers(0, 24, (2, 40)), jnp.int32)
    labels = jnp.asarray(RNG.integers(8, VOCAB, (2, 40)), jnp.int32)
    scored = jnp.asarray(RNG.random((2, 40)) < 0.6)
    weight = jnp.asarray(RNG.standard_normal((2, 40)), jnp.float32)
    chunks = nll.Chunks((BANNED,), 16, 100)

    def both():
        value, pull = jax.vjp(
            lambda h, w: nll.scored_nll(chunks, h, w, rows, labels, scored), hidden, HEAD
        )
        return value, *pull(weight)

    with interpreted():
        found = both()
    monkeypatch.setattr(nll, "device_kind", lambda: "cpu")
    for one, want in zip(found, both(), strict=True):
        assert one.dtype == want.dtype and distance(one, want) < 4e-3


@INTERPRETED
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_draws_by_the_kernel_are_those_of_the_loop(with_bias, hopper, monkeypatch):
    """The same token for every key, and equal statistics; 70 slots are no full tile of rows."""
    hidden = normals(2, 35, WIDTH)
    bias = jnp.asarray(RNG.standard_normal(VOCAB), jnp.float32) if with_bias else None
    temperature = jnp.asarray(RNG.choice([0.0, 0.5, 1.0, 1.7], (2, 35)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), (2, 35))
    it = TokenReadout(
        vocab_size=VOCAB,
        width=WIDTH,
        banned=(BANNED, 299),
        vocab_chunk=100,
    )

    def draw():
        return readout_stats.__wrapped__(it, hidden, HEAD, Shaping(temperature, bias=bias), keys)

    with interpreted():
        found = draw()
    monkeypatch.setattr(nll, "device_kind", lambda: "cpu")
    want = draw()
    assert (np.asarray(found.token) == np.asarray(want.token)).all()
    for name in stats.Stats._fields[1:]:
        a, b = (np.asarray(getattr(x, name)) for x in (found, want))
        assert np.abs(a - b).max() < 2e-5, name


def test_the_kernel_s_noise_is_the_sampler_s():
    """Bit for bit the hash of `fold_in`; noise to 2e-6, where it is largest too."""
    keys = jax.random.split(jax.random.key(3), 8)
    ids = jnp.arange(4096)
    first, second = jax.random.key_data(keys).T
    bits = hopper_stats._threefry((first[:, None], second[:, None]), ids.astype(jnp.uint32)[None])
    folded = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, ids)
    assert (bits == jax.random.key_data(folded)[..., 0]).all()
    noise = np.asarray(hopper_stats._gumbel(bits), np.float64)
    assert np.abs(noise - np.asarray(stats.gumbel(keys, ids))).max() < 2e-6
    few = jnp.arange(64, dtype=jnp.uint32)
    uniform = (np.arange(64) + 0.5) * 2.0**-32
    assert np.abs(np.asarray(hopper_stats._gumbel(few)) + np.log(-np.log1p(-uniform))).max() < 1e-5


def test_what_the_kernels_cannot_serve_is_refused():
    with pytest.raises(NotImplementedError, match="16-bit"):
        hopper_head.check(256, jnp.float32)
    for width in (64, 128, 320, 100):
        with pytest.raises(NotImplementedError, match=f"steps of 256, not {width}"):
            hopper_head.check(width, jnp.bfloat16)


@pytest.mark.parametrize("width", [192, 576, 896, 960, 1536, 2048])
def test_a_third_of_zeros_is_served(width):
    """Those of small models: SmolLM2's 576 and 960, Qwen2.5's 896."""
    hopper_head.check(width, jnp.bfloat16)


def test_tiles_of_ids_are_whole_pieces_of_noise():
    """Ids behind the last piece would have no noise and never be drawn."""
    x, ones = normals(64, WIDTH), jnp.ones(64)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 64))
    for width in (0, 128, 168):
        with pytest.raises(ValueError, match=f"width={width} must be a multiple of 24 up to 144"):
            hopper_stats.statistics(x, HEAD, ones, keys, width=width)
    assert all(width % 24 == 0 for width in hopper_stats.WIDTHS)


def test_chunks_of_gradients_are_whole_tiles():
    x, ones = normals(hopper_head.ROWS, WIDTH), jnp.ones(hopper_head.ROWS)
    target = jnp.zeros(hopper_head.ROWS, jnp.int32)
    with pytest.raises(ValueError, match="chunk=300 must be a multiple of 256"):
        hopper_head.gradients(
            x, HEAD, target, ones, ones, jnp.int32(1), dtype=jnp.float32, chunk=300
        )
