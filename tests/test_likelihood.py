"""The numbers that evaluation prints, against enumeration, plain float64 and the bootstrap."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bdjax.layout import Places, clean_places
from bdjax.likelihood import EXACT_UP_TO, evaluate, evaluate_batch
from bdjax.noise import Absorbing, Bernoulli
from bdjax.objective import BlockSize, Objective
from bdjax.sharding import make_mesh
from bdjax.step import block_step

LENGTH = 12
OBJECTIVE = Objective(
    process=Absorbing(mask_id=tiny.MASK), block_size=BlockSize(first=4), ar_weight=1.0
)
MODEL = tiny.model()
# Ids of 0 to 3 bytes each: nats per token and bits per byte have denominators of their own.
BYTES = (np.arange(tiny.VOCAB) % 4).astype(np.int32)


@cache
def params(seed=0):
    return MODEL.init(jax.random.key(seed))


def host(batch):
    return {name: np.asarray(x) for name, x in batch._asdict().items()}


@cache
def data(rows=4, seed=0):
    return host(tiny.random_batch(rows, LENGTH, seed))


def measured(batches, objective=OBJECTIVE, **options):
    return evaluate(objective, MODEL, params(), batches, BYTES, **options)


@jax.jit
def _hidden(params, tokens, places):
    return block_step(MODEL, params, tokens, places)[0]


def log_softmax(hidden):
    """log p of every id in float64, banned ids left out."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(params()["head"], np.float64).T
    logits[..., list(MODEL.readout.banned)] = -np.inf
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def ar_nats(batch):
    """Per row, -sum log p(x_i | x_<i) of one forward over the clean stream, in float64."""
    places = clean_places(jnp.asarray(batch["segment"]), jnp.asarray(batch["position"]), 1)
    table = log_softmax(_hidden(params(), jnp.asarray(batch["tokens"]), places))
    scored = batch["trainable"][:, 1:]
    picked = np.take_along_axis(table[:, :-1], batch["tokens"][:, 1:, None], axis=2)[..., 0]
    return -(picked * scored).sum(axis=1)


@pytest.mark.parametrize("size", range(1, EXACT_UP_TO + 1))
def test_the_exact_bound_is_the_mean_of_many_draws(size):
    exact = measured([data()], block_size=size, exact=True).diffusion.nats_per_token
    draws = np.array(
        [
            measured([data()], block_size=size, seed=seed).diffusion.nats_per_token
            for seed in range(150)
        ]
    )
    error = draws.std(ddof=1) / math.sqrt(len(draws))
    # With one token per block there is one pattern only, and every draw is the exact bound.
    assert abs(draws.mean() - exact) <= 4 * error + 1e-6
    together = measured([data()], block_size=size, draws=150, seed=1000).diffusion.nats_per_token
    assert abs(together - exact) <= 4 * error + 1e-6
    assert error < 0.05 * exact


def test_an_exact_bound_of_five_tokens_is_refused():
    with pytest.raises(ValueError, match=r"31 forwards.*type --block-size 4 or less"):
        measured([data()], block_size=5, exact=True)


@pytest.mark.parametrize("options", [{"block_size": 0}, {"block_size": -1}, {"draws": 0}])
def test_what_cannot_be_measured_is_refused(options):
    with pytest.raises(ValueError, match=r"must be at least 1; type --"):
        measured([data()], **options)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        measured([])


def test_block_size_one_reads_each_token_from_a_mask_after_its_past():
    # One document of LENGTH tokens; entry i holds its first i tokens and a mask for the next.
    document = np.random.default_rng(0).integers(0, tiny.MASK, LENGTH)
    index = np.arange(LENGTH)
    past = index[None] < index[:, None]
    tokens = np.concatenate([np.where(past, document, 0), np.full((LENGTH, 1), tiny.MASK)], axis=1)
    place = np.concatenate([np.tile(index, (LENGTH, 1)), index[:, None]], axis=1)
    seen = np.concatenate([past, np.ones((LENGTH, 1), bool)], axis=1).astype(np.int32)
    stream = np.concatenate([np.zeros((LENGTH, LENGTH)), np.ones((LENGTH, 1))], axis=1)
    fields = (stream.astype(np.int32), seen, place, place, place)
    hidden = _hidden(params(), jnp.asarray(tokens), Places(*map(jnp.asarray, fields)))
    nats = -log_softmax(hidden[:, -1])[index, document][1:].sum()
    batch = host(tiny.batch([document.tolist()], length=LENGTH))
    found = measured([batch], block_size=1, exact=True)
    assert found.tokens == LENGTH - 1
    np.testing.assert_allclose(found.diffusion.nats_per_token * found.tokens, nats, rtol=1e-5)


def test_the_ar_likelihood_is_the_clean_stream_s_log_softmax():
    found = measured([data(), data(seed=1)])
    nats = ar_nats(data()).sum() + ar_nats(data(seed=1)).sum()
    np.testing.assert_allclose(found.ar.nats_per_token * found.tokens, nats, rtol=1e-5)


def test_the_ar_likelihood_knows_neither_noise_nor_blocks():
    first, second = measured([data()], block_size=2, seed=1), measured([data()], draws=2)
    np.testing.assert_allclose(first.ar.nats_per_token, second.ar.nats_per_token, rtol=1e-6)
    assert first.diffusion.nats_per_token != second.diffusion.nats_per_token


def test_bits_per_byte_are_the_same_nats_in_other_units():
    found = measured([data()])
    trainable = data()["trainable"]
    assert found.tokens == trainable.sum()
    assert found.bytes == BYTES[data()["tokens"][trainable]].sum()
    for part in (found.diffusion, found.ar):
        nats = part.nats_per_token * found.tokens
        np.testing.assert_allclose(part.bits_per_byte, nats / math.log(2) / found.bytes)


def test_the_standard_error_is_that_of_the_bootstrap_over_rows():
    rows = data(rows=128, seed=2)
    found = measured([rows]).ar
    nats, tokens = ar_nats(rows), rows["trainable"].sum(axis=1)
    sizes = (BYTES[rows["tokens"]] * rows["trainable"]).sum(axis=1)
    chosen = np.random.default_rng(0).integers(0, 128, (4000, 128))
    per_token = nats[chosen].sum(axis=1) / tokens[chosen].sum(axis=1)
    per_byte = nats[chosen].sum(axis=1) / math.log(2) / sizes[chosen].sum(axis=1)
    np.testing.assert_allclose(found.nats_se, per_token.std(), rtol=0.08)
    np.testing.assert_allclose(found.bits_se, per_byte.std(), rtol=0.08)


def test_rows_of_one_length_have_the_standard_error_of_a_mean():
    documents = np.random.default_rng(1).integers(0, tiny.MASK, (3, LENGTH)).tolist()
    rows = host(tiny.batch(*([document] for document in documents), length=LENGTH))
    means = ar_nats(rows) / (LENGTH - 1)
    wanted = means.std(ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(measured([rows]).ar.nats_se, wanted, rtol=1e-4)


def test_one_row_has_no_standard_error():
    batch = host(tiny.batch([[1, 2, 3]], length=LENGTH))
    assert math.isnan(measured([batch]).ar.nats_se)


def test_rows_that_fill_the_last_batch_change_nothing():
    full = data()
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in full.items()}
    a, b = measured([full], exact=True), measured([padded], exact=True)
    assert (a.tokens, a.bytes) == (b.tokens, b.bytes)
    for name in ("diffusion", "ar"):
        for field in ("nats_per_token", "nats_se", "bits_per_byte", "bits_se"):
            one, other = (getattr(getattr(x, name), field) for x in (a, b))
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_bound_does_not_depend_on_how_the_model_was_trained():
    # A clipped Bernoulli draw is biased on purpose: evaluation must not use it.
    biased = Objective(
        process=Absorbing(mask_id=tiny.MASK, draw=Bernoulli(low=0.4, high=0.6)),
        block_size=BlockSize(first=4),
        views=2,
        ar_weight=1.0,
    )
    assert measured([data()], objective=biased) == measured([data()])


def test_what_was_not_trained_is_not_reported():
    ar = Objective(process=OBJECTIVE.process, block_size=BlockSize(first=1), views=0, ar_weight=1.0)
    found = measured([data()], objective=ar)
    assert found.diffusion is None
    np.testing.assert_allclose(found.ar.nats_per_token * found.tokens, ar_nats(data()).sum(), 1e-5)
    masks = Objective(process=OBJECTIVE.process, block_size=BlockSize(first=4))
    assert measured([data()], objective=masks).ar is None


def test_two_devices_measure_what_one_does():
    alone = measured([data()], exact=True)
    with jax.set_mesh(make_mesh(data=2)):
        split = evaluate(
            OBJECTIVE, MODEL, MODEL.init(jax.random.key(0)), [data()], BYTES, exact=True
        )
    for name in ("diffusion", "ar"):
        one, other = (getattr(x, name).nats_per_token for x in (alone, split))
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_block_size_draw_and_pattern_are_data():
    measured([data()], exact=True)
    measured([data()])
    before = evaluate_batch._cache_size()
    for size in (1, 2, 3, 4, 7):
        measured([data()], block_size=size, draws=2, seed=size)
    for size in (1, 2, 3):
        measured([data()], block_size=size, exact=True)
    assert evaluate_batch._cache_size() == before
