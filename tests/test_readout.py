"""Chunked losses and statistics equal a dense float64 softmax, whatever the chunks and the mesh."""

import re
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats

from bdjax import nll, sharding
from bdjax.nll import over_ids, queue_of
from bdjax.readout import Shaping, TokenReadout
from bdjax.stats import gumbel, joined
from pallas_kernels import hopper_stats

ROWS, SLOTS, ENTRIES, WIDTH, VOCAB = 8, 3, 5, 8, 20
BANNED = (3, 19)


class Problem(NamedTuple):
    """Arguments of `nll` and a cotangent; some entries unscored, one hidden row read twice."""

    hidden: np.ndarray
    head: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    d_nll: np.ndarray


def make_problem(rows=ROWS, slots=SLOTS, entries=ENTRIES, width=WIDTH, vocab=VOCAB) -> Problem:
    rng = np.random.default_rng(0)
    allowed = [i for i in range(vocab) if i not in BANNED]
    return Problem(
        rng.standard_normal((rows, slots, width)).astype(np.float32),
        rng.standard_normal((vocab, width)).astype(np.float32),
        rng.integers(0, slots, (rows, entries)).astype(np.int32),
        rng.choice(allowed, (rows, entries)).astype(np.int32),
        rng.random((rows, entries)) < 0.6,
        rng.standard_normal((rows, entries)).astype(np.float32),
    )


PROBLEM = make_problem()


def dense(problem: Problem):
    """NLL, d hidden, d head in float64 with all logits at once."""
    hidden, head, d_nll = (x.astype(np.float64) for x in problem[:2] + problem[-1:])
    batch = np.arange(hidden.shape[0])[:, None]
    x = hidden[batch, problem.rows]
    logits = x @ head.T
    logits[..., list(BANNED)] = -np.inf
    log_probs = special.log_softmax(logits, axis=-1)
    picked = np.take_along_axis(log_probs, problem.labels[..., None], axis=-1)[..., 0]
    onehot = np.eye(head.shape[0])[problem.labels]
    weight = np.where(problem.scored, d_nll, 0)[..., None]
    d_logits = weight * (np.exp(log_probs) - onehot)
    d_hidden = np.zeros_like(hidden)
    np.add.at(d_hidden, (batch, problem.rows), d_logits @ head)
    d_head = np.einsum("brv,brd->vd", d_logits, x)
    return np.where(problem.scored, -picked, 0), d_hidden, d_head


@partial(jax.jit, static_argnums=0)
def nll_and_grads(readout, hidden, head, rows, labels, scored, d_nll):
    name = "embed" if readout.tied else "head"
    nll, pull = jax.vjp(lambda h, w: readout.nll({name: w}, h, rows, labels, scored), hidden, head)
    return nll, *pull(d_nll)


def readout(vocab=VOCAB, width=WIDTH, banned=BANNED, **chunks) -> TokenReadout:
    return TokenReadout(vocab_size=vocab, width=width, banned=banned, **chunks)


# Neither 20 ids nor half of them are a multiple of 3.
RAGGED = readout(row_chunk=7, vocab_chunk=3)


def assert_all_close(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == e.shape and np.isfinite(a).all()
        assert np.abs(a - e).max() <= tolerance * max(1, np.abs(e).max())


def on_mesh(axes, *arrays):
    """Arrays laid out by their meanings on the mesh in force."""
    return [
        sharding.reshard(jnp.asarray(x), *meanings)
        for x, meanings in zip(arrays, axes, strict=True)
    ]


LAID_OUT = [("batch",), ("vocab", "embed")] + [("batch",)] * 4


@pytest.mark.parametrize(
    "chunks",
    [(1024, 8192), (7, 3), (16, 7), (1, 20)],
    ids=["one", "ragged", "tied", "single_rows"],
)
def test_nll_and_gradients_are_those_of_the_dense_softmax(chunks):
    """Row and vocabulary chunks that divide nothing, banned ids, unscored entries, shared rows."""
    it = readout(row_chunk=chunks[0], vocab_chunk=chunks[1], tied=chunks[0] == 16)
    assert_all_close(nll_and_grads(it, *PROBLEM), dense(PROBLEM))


def test_unscored_entries_are_zero_and_their_labels_free():
    """Exactly 0 in the loss, also when the label is banned or no id at all."""
    wild = np.where(PROBLEM.scored, PROBLEM.labels, 3 + 1000 * (np.arange(ENTRIES) % 2))
    results = nll_and_grads(RAGGED, *PROBLEM._replace(labels=wild.astype(np.int32)))
    assert (np.asarray(results[0])[~PROBLEM.scored] == 0).all()
    assert_all_close(results, dense(PROBLEM))


def test_banned_ids_get_no_gradient():
    _, _, d_head = nll_and_grads(RAGGED, *PROBLEM)
    assert (np.asarray(d_head)[list(BANNED)] == 0).all()


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 4, "tensor": 2}], ids=["8x1", "4x2"])
def test_meshes_agree(mesh):
    """Rows over data, the vocabulary over tensor; V/2 is no multiple of the vocabulary chunk."""
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        results = nll_and_grads(RAGGED, *on_mesh(LAID_OUT, *PROBLEM))
    assert_all_close(results, dense(PROBLEM))


def partly_read(all_scored: bool) -> Problem:
    """Scored entries read slots 1 and 2 only; the last chunk of seven is not full."""
    scored = PROBLEM.scored | all_scored
    scored[0, 0] = all_scored
    rows = np.where(scored, np.maximum(PROBLEM.rows, 1), 0).astype(np.int32)
    assert scored.sum() % RAGGED.row_chunk
    return PROBLEM._replace(rows=rows, scored=scored)


@pytest.mark.parametrize("all_scored", [False, True], ids=["unscored", "past_the_end"])
@pytest.mark.parametrize("garbage", [1e3, np.nan], ids=["large", "nan"])
def test_rows_that_nobody_scores_have_no_influence(garbage, all_scored):
    """Hidden rows without a scored entry may hold anything: logits in the thousands, NaN."""
    problem = partly_read(all_scored)
    expected = dense(problem)
    hidden = problem.hidden.copy()
    hidden[:, 0] *= np.float32(garbage)
    nll, d_hidden, d_head = nll_and_grads(RAGGED, *problem._replace(hidden=hidden))
    assert_all_close((nll, d_hidden, d_head), expected)
    assert (np.asarray(d_hidden)[:, 0] == 0).all()


def test_large_logits_are_finite():
    """Logits of several hundred in scored and unscored rows, last chunk of rows not full."""
    problem = partly_read(False)
    problem = problem._replace(hidden=problem.hidden * 100)
    nll, d_hidden, d_head = nll_and_grads(RAGGED, *problem)
    expected = dense(problem)
    assert expected[0].max() > 200
    assert_all_close((nll,), expected[:1], 1e-6)
    assert_all_close((d_hidden, d_head), expected[1:], 1e-3)


def test_nothing_scored_is_zero_with_zero_gradients():
    results = nll_and_grads(RAGGED, *PROBLEM._replace(scored=PROBLEM.scored & False))
    assert all((np.asarray(x) == 0).all() for x in results)


def test_the_queue_holds_the_scored_entries_first_and_by_rising_row():
    """Its count, which bounds the loops over rows, is data; the rest has no hidden row."""
    rows = (np.arange(ROWS)[:, None] * SLOTS + PROBLEM.rows).reshape(-1)
    for count in (0, 1, 7, 8, 14, 15, ROWS * ENTRIES):
        scored = (np.arange(ROWS * ENTRIES) < count).reshape(ROWS, ENTRIES)[::-1]
        queue = queue_of(jnp.asarray(PROBLEM.rows), jnp.asarray(scored), SLOTS, 7)
        assert int(queue.count) == count and queue.order.size % 7 == 0
        first = np.asarray(queue.order)[:count]
        assert sorted(first.tolist()) == np.flatnonzero(scored).tolist()
        assert np.array_equal(np.asarray(queue.row)[:count], np.sort(rows[scored.reshape(-1)]))
        assert (np.asarray(queue.row)[count:] == ROWS * SLOTS).all()


def test_chunks_of_ids_are_alike_in_length():
    """Qwen's 151,936 ids in chunks of at most 8192 are 19 of 8064: few are computed twice."""
    head = jax.ShapeDtypeStruct((151_936, 4), jnp.float32)
    for most, number, size in ((8192, 19, 8064), (4096, 38, 4096), (1 << 20, 1, 151_936)):
        it, found = readout(vocab=151_936, vocab_chunk=most), []

        def read(head, it=it, found=found):
            count, reader = over_ids(it.chunks, head)
            found.append(count)
            return reader(0)[1]

        assert jax.eval_shape(read, head).shape[0] == size and found == [number]


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """All array shapes a compiled program mentions."""
    found = re.findall(r"\b(?:f32|bf16|s32|u32|pred|f64|s8)\[([\d,]+)\]", text)
    return [tuple(int(n) for n in dims.split(",")) for dims in found]


def test_no_buffer_of_rows_by_vocabulary_exists():
    """Neither forward nor backward holds logits of all rows; the dense program does."""
    problem = make_problem(rows=4, slots=64, entries=64, vocab=1000)
    entries, vocab = problem.rows.size, problem.head.shape[0]
    it = readout(vocab, row_chunk=16, vocab_chunk=100)

    def total(nll_of):
        return lambda h, w: (nll_of(h, w) * problem.d_nll).sum()

    entry = [jnp.asarray(x) for x in (problem.rows, problem.labels, problem.scored)]

    def chunked(h, w):
        return it.nll({"head": w}, h, *entry)

    def plain(h, w):
        x = jnp.take_along_axis(h, problem.rows[..., None], axis=1)
        return -jnp.take_along_axis(
            jax.nn.log_softmax(x @ w.T), problem.labels[..., None], axis=-1
        )[..., 0]

    def largest(nll_of):
        grads = jax.jit(jax.value_and_grad(total(nll_of), argnums=(0, 1)))
        compiled = grads.lower(problem.hidden, problem.head).compile()
        return max(np.prod(shape) for shape in shapes_in(compiled.as_text()))

    assert largest(plain) >= entries * vocab
    assert largest(chunked) <= vocab * WIDTH < entries * vocab / 16


# Statistics and draws.

N, W = 4, 6
TEMPERATURE = np.array([1.0, 0.7, 1.9, 0.0, 0.3, 1.0], np.float32) * np.ones((N, 1), np.float32)
HIDDEN = np.random.default_rng(1).standard_normal((N, W, WIDTH)).astype(np.float32)
HEAD = np.random.default_rng(2).standard_normal((VOCAB, WIDTH)).astype(np.float32)
BIAS = np.random.default_rng(3).standard_normal(VOCAB).astype(np.float32)
NO_BIAS = np.zeros(VOCAB, np.float32)


def slot_keys(rows: int, slots: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), (rows, slots))


@partial(jax.jit, static_argnums=0)
def draw(readout, hidden, head, shaping, keys):
    return readout.stats({"head": head}, hidden, shaping, keys)


def log_probs_of(hidden, head, bias, temperature):
    """Raw and tempered log-probabilities in float64."""
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64) + bias
    logits[..., [i for i in BANNED if i < logits.shape[-1]]] = -np.inf
    scale = np.where(temperature > 0, temperature, 1).astype(np.float64)[..., None]
    return special.log_softmax(logits, axis=-1), special.log_softmax(logits / scale, axis=-1)


def kept_by(log_probs, top_k=None, top_p=None):
    """Which ids survive, per slot: the top_k most probable, then the fewest reaching top_p."""
    probs = np.exp(log_probs)
    order = np.argsort(-probs, axis=-1, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=-1)
    keep = ranked > 0
    if top_k is not None:
        keep &= np.arange(ranked.shape[-1]) < top_k[:, None, None]
    ranked = np.where(keep, ranked, 0)
    if top_p is not None:
        before = np.cumsum(ranked, axis=-1) - ranked
        keep &= before < top_p[:, None, None] * ranked.sum(axis=-1, keepdims=True)
    kept = np.zeros_like(keep)
    np.put_along_axis(kept, order, keep, axis=-1)
    return kept


def check_stats(stats, hidden, head, bias, temperature, top_k=None, top_p=None, tolerance=1e-5):
    """Every field against float64; the token against the set it may come from."""
    raw, tempered = log_probs_of(hidden, head, bias, temperature)
    kept = kept_by(tempered, top_k, top_p)
    token = np.asarray(stats.token)[..., None]

    def at(x):
        return np.take_along_axis(x, token, axis=-1)[..., 0]

    probs = np.exp(tempered)
    ranked = np.sort(probs, axis=-1)
    greedy = temperature == 0
    assert (token[greedy, 0] == tempered.argmax(axis=-1)[greedy]).all()
    assert at(kept)[~greedy].all()
    filtered = at(tempered) - np.log(np.where(kept, probs, 0).sum(axis=-1))
    expected = {
        "prob": at(probs),
        "top_prob": ranked[..., -1],
        "gap": ranked[..., -1] - ranked[..., -2],
        "entropy": special.entr(probs).sum(axis=-1),
        "logprob_raw": at(raw),
        "logprob_drawn": np.where(greedy, 0, filtered),
    }
    for name, want in expected.items():
        got = np.asarray(getattr(stats, name), np.float64)
        error = np.abs(got - want) / np.maximum(1, np.abs(want))
        assert error.max() <= tolerance, (name, error.max())
    return kept


@pytest.fixture(scope="module")
def unfiltered():
    """The draws of one shaping without filters, which chunks and meshes must reproduce."""
    shaping = Shaping(TEMPERATURE, bias=BIAS)
    return draw(RAGGED, HIDDEN, HEAD, shaping, slot_keys(N, W))


def test_stats_are_those_of_the_dense_softmax(unfiltered):
    """Token, probabilities, gap, entropy and both log-probabilities, a temperature per slot."""
    check_stats(unfiltered, HIDDEN, HEAD, BIAS, TEMPERATURE)


def test_bias_acts_and_can_forbid_or_force():
    """One program: the bias is data. -inf-like forbids an id, a large one forces it."""
    keys = slot_keys(N, W)
    for bias, force in ((NO_BIAS, None), (np.where(np.arange(VOCAB) == 7, 99, NO_BIAS), 7)):
        shaping = Shaping(TEMPERATURE, bias=bias.astype(np.float32))
        stats = draw(RAGGED, HIDDEN, HEAD, shaping, keys)
        check_stats(stats, HIDDEN, HEAD, bias, TEMPERATURE)
        if force is not None:
            assert (np.asarray(stats.token) == force).all()
    forbid = np.where(np.arange(VOCAB) < 15, -1e9, 0).astype(np.float32)
    stats = draw(RAGGED, HIDDEN, HEAD, Shaping(TEMPERATURE, bias=forbid), keys)
    assert (np.asarray(stats.token) >= 15).all()


FILTERS = {
    "none": (None, None),
    "top_k": (np.array([1, 2, 5, 20], np.int32), None),
    "top_p": (None, np.array([1e-6, 0.5, 0.9, 1.0], np.float32)),
    "both": (np.array([1, 4, 6, 20], np.int32), np.array([0.9, 0.6, 0.8, 1.0], np.float32)),
}


@pytest.fixture(scope="module")
def many():
    """1024 slots per row of one distribution each: one draw per key."""
    hidden = np.broadcast_to(HIDDEN[:, :1], (N, 1024, WIDTH)).copy()
    temperature = np.broadcast_to(np.array([[1.0], [0.8], [1.5], [2.0]], np.float32), (N, 1024))
    return hidden, temperature.copy(), slot_keys(N, 1024, seed=5)


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_filtered_softmax(filters, many):
    """1024 keys per row: chi-square of the counts, nothing outside the kept set, exact stats."""
    hidden, temperature, keys = many
    top_k, top_p = FILTERS[filters]
    stats = draw(RAGGED, hidden, HEAD, Shaping(temperature, top_k, top_p, NO_BIAS), keys)
    kept = check_stats(stats, hidden, HEAD, NO_BIAS, temperature, top_k, top_p)[:, 0]
    _, tempered = log_probs_of(hidden[:, 0], HEAD, NO_BIAS, temperature[:, 0])
    for row in range(N):
        probs = np.where(kept[row], np.exp(tempered[row]), 0)
        probs /= probs.sum()
        counts = np.bincount(np.asarray(stats.token)[row], minlength=VOCAB)
        some = np.argsort(-probs)[: max(1, (probs * 1024 >= 5).sum())]  # the rest is one cell
        observed, expected = counts[some], probs[some] * 1024
        if expected.sum() < 1024 - 1e-6:
            observed = np.append(observed, 1024 - observed.sum())
            expected = np.append(expected, 1024 - expected.sum())
        if len(observed) > 1:
            chi = ((observed - expected) ** 2 / expected).sum()
            assert scipy_stats.chi2.sf(chi, len(observed) - 1) > 1e-3, row
        else:
            assert observed[0] == 1024


@pytest.mark.parametrize("other", ["chunks", "8x1", "4x2"])
def test_draws_do_not_depend_on_chunks_or_mesh(other, many):
    """The same tokens for the same keys, with both filters on, and equal statistics."""
    hidden, temperature, keys = (x[:, :16] for x in many)
    hidden, temperature = (np.concatenate([x, x]) for x in (hidden, temperature))
    keys = slot_keys(2 * N, 16, seed=9)
    top_k, top_p = (np.concatenate([x, x]) for x in FILTERS["both"])
    arguments = hidden, HEAD, Shaping(temperature, top_k, top_p, BIAS), keys
    one = draw(RAGGED, *arguments)
    if other == "chunks":
        two = draw(readout(row_chunk=1, vocab_chunk=20), *arguments)
    else:
        mesh = {"8x1": {"data": 8}, "4x2": {"data": 4, "tensor": 2}}[other]
        with jax.set_mesh(sharding.make_mesh(**mesh)):
            slots, rows = ("batch", None), ("batch",)
            shaped = Shaping(*on_mesh([slots, rows, rows, ("vocab",)], *arguments[2]))
            laid = on_mesh([slots + (None,), ("vocab", "embed")], hidden, HEAD)
            two = draw(RAGGED, *laid, shaped, sharding.reshard(keys, *slots))
    assert np.array_equal(np.asarray(one.token), np.asarray(two.token))
    assert_all_close(two[1:], [np.asarray(x, np.float64) for x in one[1:]])


FLAT = 2000


@pytest.fixture(scope="module")
def wide():
    """A nearly flat distribution over 2000 ids, of which about 1800 make up 0.9."""
    rng = np.random.default_rng(7)
    hidden = np.zeros((3, 8, 2), np.float32)
    hidden[:2, :, 0] = 1.0
    hidden[2, :, 1] = 1.0  # peaked: its nucleus is small although its neighbours' is not
    head = np.stack([0.3 * rng.standard_normal(FLAT), 3 * rng.standard_normal(FLAT)], axis=1)
    return hidden, head.astype(np.float32)


@pytest.mark.parametrize("mesh", [None, {"tensor": 2}], ids=["1", "1x2"])
def test_a_nucleus_wider_than_the_candidates_is_exact(mesh, wide):
    """V = 2000, top_p 0.9 and 0.3: the kept mass and the kept set are those of a sorted nucleus."""
    hidden, head = wide
    it = TokenReadout(vocab_size=FLAT, width=2, banned=BANNED, vocab_chunk=300)
    temperature = np.ones(hidden.shape[:2], np.float32)
    top_p = np.array([0.9, 0.3, 0.9], np.float32)
    shaping, keys = Shaping(temperature, None, top_p), slot_keys(*hidden.shape[:2])
    if mesh is None:
        stats = draw(it, hidden, head, shaping, keys)
    else:
        with jax.set_mesh(sharding.make_mesh(**mesh)):
            stats = draw(
                it,
                jnp.asarray(hidden),
                sharding.reshard(jnp.asarray(head), "vocab", "embed"),
                jax.tree.map(jnp.asarray, shaping),
                keys,
            )
    kept = check_stats(stats, hidden, head, 0.0, temperature, None, top_p, tolerance=3e-4)
    sizes = kept[:, 0].sum(axis=-1)
    assert sizes[0] > 1500 and 256 < sizes[1] < 700 and sizes[2] < 256
    assert len(set(np.asarray(stats.token)[0].tolist())) > 4


def test_temperature_zero_is_the_most_probable_token_with_certainty(many):
    """Whatever the keys and filters; the other statistics are those of temperature 1."""
    hidden, temperature, keys = many
    for top_k, top_p in FILTERS.values():
        stats = draw(RAGGED, hidden, HEAD, Shaping(temperature * 0, top_k, top_p, NO_BIAS), keys)
        raw, _ = log_probs_of(hidden, HEAD, NO_BIAS, temperature)
        assert (np.asarray(stats.token) == raw.argmax(axis=-1)).all()
        assert (np.asarray(stats.logprob_drawn) == 0).all()
        assert np.allclose(stats.logprob_raw, raw.max(axis=-1), atol=1e-5)
        assert np.allclose(stats.prob, np.exp(raw.max(axis=-1)), atol=1e-5)


def test_noise_is_standard_gumbel():
    """Mean, variance and tail of 2^16 numbers (4 sigma); the same number for a key and an id."""
    ids = jnp.arange(1 << 12)
    keys = jax.random.split(jax.random.key(1), 16)
    noise = np.asarray(jax.jit(gumbel)(keys, ids), np.float64)
    count = noise.size
    assert abs(noise.mean() - np.euler_gamma) < 4 * np.pi / np.sqrt(6 * count)
    assert abs(noise.var() - np.pi**2 / 6) < 4 * np.sqrt(4.4 * (np.pi**2 / 6) ** 2 / count)
    tail = (noise > 5).sum(), count * (1 - np.exp(-np.exp(-5)))
    assert abs(tail[0] - tail[1]) < 4 * np.sqrt(tail[1])
    again = jax.jit(gumbel)(keys, ids[::-1])
    assert np.array_equal(np.asarray(again)[:, ::-1], noise.astype(np.float32))


def test_noise_is_finite_for_every_hash():
    """This key and id hash to 24 leading ones: no draw may become certain because of that."""
    key, unlucky = jax.random.key(62), 172642
    bits = jax.random.key_data(jax.random.fold_in(key, unlucky))[0]
    assert int(bits) >> 8 == (1 << 24) - 1
    assert np.isfinite(np.asarray(gumbel(key[None], jnp.array([unlucky])))).all()


# A bias of the logits.


def test_a_bias_of_the_logits_counts_in_losses_gradients_and_draws():
    """Its column of ones: the head of hidden rows that have a one behind."""
    it = replace(RAGGED, bias=True)
    wide = PROBLEM._replace(
        hidden=np.concatenate([PROBLEM.hidden, np.ones_like(PROBLEM.hidden[..., :1])], axis=-1),
        head=np.concatenate([PROBLEM.head, BIAS[:, None]], axis=-1),
    )
    nll, d_hidden, d_head = dense(wide)
    expected = nll, d_hidden[..., :-1], d_head[:, :-1], d_head[:, -1]

    @jax.jit
    def found(hidden, head, bias, *entry, d_nll):
        def loss(h, w, b):
            return it.nll({"head": w, "head_bias": b}, h, *entry)

        nll, pull = jax.vjp(loss, hidden, head, bias)
        return nll, *pull(d_nll)

    arrays = PROBLEM.hidden, PROBLEM.head, BIAS, *PROBLEM[2:5]
    assert_all_close(found(*arrays, d_nll=PROBLEM.d_nll), expected)
    assert np.abs(expected[3]).max() > 0.1
    for mesh in ({"data": 8}, {"data": 4, "tensor": 2}):
        with jax.set_mesh(sharding.make_mesh(**mesh)):
            axes = [*LAID_OUT[:2], ("vocab",), *LAID_OUT[2:]]
            *laid, d_nll = on_mesh(axes, *arrays, PROBLEM.d_nll)
            assert_all_close(found(*laid, d_nll=d_nll), expected)


def test_a_bias_of_the_head_is_one_that_a_policy_asks_for():
    """Bit by bit: the two are added up."""
    keys = slot_keys(N, W)
    own = replace(RAGGED, bias=True)
    for asked in (None, BIAS[::-1].copy()):
        shaping = Shaping(TEMPERATURE, bias=asked)
        both = Shaping(TEMPERATURE, bias=BIAS if asked is None else BIAS + asked)
        params = {"head": HEAD, "head_bias": BIAS}
        stats = jax.jit(own.stats)(params, HIDDEN, shaping, keys)
        for one, other in zip(stats, draw(RAGGED, HIDDEN, HEAD, both, keys), strict=True):
            assert np.array_equal(one, other)


def test_the_loss_kernel_does_not_serve_a_bias_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(nll, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    hidden = jnp.zeros((4, 256), jnp.bfloat16)
    with caplog.at_level("INFO", logger="bdjax.nll"):
        assert nll.by_kernel(hidden)
        assert not nll.by_kernel(hidden, jnp.zeros(64))
    assert "the Hopper kernel cannot serve: the logits have a bias" in caplog.text


@pytest.mark.parametrize("tiles", [1, 2, 3, 12, 13, 50])
def test_statistics_of_tiles_join_to_those_of_the_whole(tiles):
    """Any number of tiles, in float64: a row's own temperature, ties go to the lower id."""
    rows, each = 3, 4
    draw = np.random.default_rng(tiles)
    # Far below 0, which must not count where tiles are filled up.
    logits = draw.normal(size=(rows, tiles * each)).round(1) - 9
    temperature = np.array([0.5, 1.0, 2.0])
    scaled = logits / temperature[:, None]
    noisy = (scaled + draw.gumbel(size=scaled.shape).round(1)).round(2)
    split = scaled.reshape(rows, tiles, each).swapaxes(0, 1)
    noise = noisy.reshape(rows, tiles, each).swapaxes(0, 1)
    first = np.arange(tiles)[:, None] * each
    top, at, drawn = split.max(axis=2), split.argmax(axis=2), noise.argmax(axis=2)
    share = np.exp(split - top[..., None])
    parts = hopper_stats.Parts(
        top,
        first + at,
        np.sort(split, axis=2)[..., -2],
        share.sum(axis=2),
        (split * share).sum(axis=2),
        np.exp((split - top[..., None]) * temperature[:, None]).sum(axis=2),
        noise.max(axis=2),
        first + drawn,
        np.take_along_axis(split, drawn[..., None], axis=2)[..., 0],
    )
    parts = hopper_stats.Parts(*(jnp.asarray(x, jnp.float32) for x in parts))
    scan = jax.jit(joined)(parts, jnp.asarray(temperature, jnp.float32), 100)
    assert (np.asarray(scan.top.token) == 100 + scaled.argmax(axis=1)).all()
    assert (np.asarray(scan.drawn.token) == 100 + noisy.argmax(axis=1)).all()
    highest = scaled.max(axis=1)
    share = np.exp(scaled - highest[:, None])
    wanted = {
        "second": np.sort(scaled, axis=1)[:, -2],
        "total": share.sum(axis=1),
        "weighted": (scaled * share).sum(axis=1),
        "raw_total": np.exp((scaled - highest[:, None]) * temperature[:, None]).sum(axis=1),
    }
    for name, value in wanted.items():
        assert np.allclose(getattr(scan, name), value, rtol=1e-4, atol=1e-4), name
    picked = np.take_along_axis(logits, noisy.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert np.allclose(scan.drawn.logit, picked, atol=1e-4)
