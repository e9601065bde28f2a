"""The objective: exact with an oracle, leak-free, invariant to packing, padding, mesh and views."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import special
from tiny import MASK, VOCAB

from bdjax import sharding
from bdjax.layout import Places, clean_places, join_places, noisy_places
from bdjax.loss import Pair, losses, token_losses, total
from bdjax.noise import (
    Absorbing,
    Bernoulli,
    Beta,
    Complement,
    Corruption,
    Draw,
    Masks,
    Ramp,
    Scope,
)
from bdjax.objective import (
    Alignment,
    Batch,
    BlockSize,
    BlockStages,
    Normaliser,
    Objective,
    build_row,
    corruptions,
    next_token,
    output_rows,
    places_of,
)
from bdjax.step import block_step
from pallas_kernels import CleanMode, Meta, dense_mask

TOKEN, BLOCK = CleanMode


# The oracle: a joint distribution over short documents that answers exactly what it is asked.

SYMBOLS = 3  # its vocabulary; the mask token is the id after it
ROW = 8


class Oracle:
    """A random joint table over documents of each length, and everything that follows from it."""

    def __init__(self, seed: int = 0):
        self.seed, self.tables = seed, {}

    def table(self, length: int) -> np.ndarray:
        """Probabilities of all documents of a length, far from independent."""
        if length not in self.tables:
            rng = np.random.default_rng([self.seed, length])
            logits = 1.5 * rng.standard_normal((SYMBOLS,) * length)
            self.tables[length] = np.exp(logits - special.logsumexp(logits))
        return self.tables[length]

    def mass(self, length: int, known: dict[int, int]) -> float:
        """Probability of a partial assignment position -> symbol."""
        return self.table(length)[tuple(known.get(i, slice(None)) for i in range(length))].sum()

    def log_prob(self, length: int, position: int, symbol: int, known: dict[int, int]) -> float:
        """log q(x_position = symbol | known)."""
        assert position not in known, "asked for a token that it can see"
        return np.log(self.mass(length, {**known, position: symbol}) / self.mass(length, known))

    def losses(self, places: Places, tokens, entries, clean: CleanMode) -> np.ndarray:
        """-log q of every scored entry given what its output row sees: (B, R)."""
        meta = Meta(*(np.asarray(x) for x in places.meta))
        seen = np.asarray(dense_mask(meta, meta, clean))
        position, tokens = np.asarray(places.position), np.asarray(tokens)
        rows, labels, targets = (np.asarray(x) for x in entries)
        found = np.zeros(rows.shape)
        for b, m in zip(*np.nonzero(targets >= 0), strict=True):
            r = rows[b, m]
            keys = np.flatnonzero(seen[b, r])
            known = {position[b, k]: tokens[b, k] for k in keys if tokens[b, k] != SYMBOLS}
            inside = meta.segment[b] == meta.segment[b, r]
            length = position[b][inside].max() + 1
            found[b, m] = -self.log_prob(length, targets[b, m], labels[b, m], known)
        return found

    def nll(self, batch: Batch, block: int) -> float:
        """-log p of the trainable tokens, block by block: given the past and the block's prompt."""
        result = 0.0
        tokens, segment, trainable = (
            np.asarray(x) for x in (batch.tokens, batch.segment, batch.trainable)
        )
        for b, s in itertools.product(range(len(tokens)), range(1, segment.max() + 1)):
            text, train = tokens[b][segment[b] == s], trainable[b][segment[b] == s]
            for start in range(0, len(text), block):
                stop = min(start + block, len(text))
                past = dict(enumerate(text[:start]))
                given = past | {i: text[i] for i in range(start, stop) if not train[i]}
                after = dict(enumerate(text[:stop]))
                result -= np.log(self.mass(len(text), after) / self.mass(len(text), given))
        return result


@partial(jax.jit, static_argnums=0)
def enumerated_row(objective, batch, block_size, pattern):
    places = places_of(objective, batch, block_size)
    view = objective.process.enumerate(pattern, batch.tokens, places, batch.trainable)
    return build_row(objective, batch, block_size, [view] * objective.views)


def oracle_bound(objective: Objective, batch: Batch, block: int, clean: CleanMode) -> float:
    """The exact bound (2.2) by enumeration, with the oracle in place of the network."""
    oracle, bound = Oracle(), 0.0
    length = batch.tokens.shape[1]
    positions = np.tile(np.asarray(batch.position), (1, objective.views))
    for pattern in range(1, 1 << min(block, length)):
        row = enumerated_row(objective, batch, jnp.asarray(block), jnp.asarray(pattern))
        scored = np.asarray(row.diffusion.scored)
        entries = row.diffusion.rows, row.diffusion.labels, np.where(scored, positions, -1)
        nll = oracle.losses(row.places, row.tokens, entries, clean)
        bound += (np.asarray(row.diffusion.weight, np.float64) * nll).sum()
    return bound


def symbols(*rows, prompt=0) -> Batch:
    return tiny.batch(*rows, length=ROW, prompt=prompt)


EOS = 2
TEXTS = {
    "one": symbols([[0, 2, 1, 1, 0, 2]], [[2, 2, 0, 1, 0, 0]]),
    "prompt": symbols([[0, 2, 1, 1, 0, 2]], [[2, 1, 0, 1, 2, 0]], prompt=3),
    "packed": symbols([[0, 2, 1, 1, 0], [1, 2, 2]], [[1], None, [0, 2], [2, 1, 1, 0]]),
    "packed_prompts": symbols([[0, 2, 1, 1], [1, 2, 2]], [[1, 0, 0, 2], None, [2, 1]], prompt=1),
    "fill": symbols([[0, 1, 1, 0, 1, EOS, EOS, EOS]], [[1, 0, EOS, EOS], [0, EOS, EOS, EOS]]),
}


def oracle_objective(**kwargs) -> Objective:
    return Objective(process=Absorbing(mask_id=SYMBOLS), block_size=BlockSize(first=1), **kwargs)


@pytest.mark.parametrize("block", [1, 2, 4, 6])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bound_of_an_oracle_is_the_likelihood(text, block):
    """P5: the best denoiser's bound equals -log p for every block size, whatever the packing."""
    batch = TEXTS[text]
    if block == 6 and text == "fill":
        block = ROW
    bound = oracle_bound(oracle_objective(), batch, block, TOKEN)
    nll = Oracle().nll(batch, block)
    assert nll > 3
    assert abs(bound - nll) < 1e-6 * nll


def test_the_likelihood_of_an_oracle_does_not_depend_on_blocks():
    """The chain rule, on the reference itself: only prompts inside blocks could matter."""
    found = [Oracle().nll(TEXTS["packed_prompts"], block) for block in (1, 2, 4, 8)]
    assert np.allclose(found, found[0], rtol=1e-12)


def test_prompt_tokens_in_the_middle_of_blocks_condition_their_block():
    """P5 with untrainable tokens anywhere: each block is conditioned on its own given tokens."""
    batch = symbols([[0, 2, 1, 1, 0, 2, 1, 0]], [[2, 2, 0, 1, 0, 0, 1, 1]])
    holes = jnp.asarray(np.array([[1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1, 1, 0]], bool))
    batch = batch._replace(trainable=holes)
    bound, nll = oracle_bound(oracle_objective(), batch, 4, TOKEN), Oracle().nll(batch, 4)
    assert abs(bound - nll) < 1e-6 * nll


def test_the_bound_of_an_oracle_with_a_block_causal_clean_stream_and_two_views():
    """Neither the clean mode nor the number of views changes what noisy blocks are told."""
    bound = oracle_bound(oracle_objective(views=2), TEXTS["packed"], 4, BLOCK)
    assert np.isclose(bound, Oracle().nll(TEXTS["packed"], 4), rtol=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_next_token_losses_of_an_oracle_are_the_likelihood(text):
    """The clean stream scores every trainable token but a document's first, given the past."""
    batch = TEXTS[text]
    first = np.asarray(batch.position) == 0
    batch = batch._replace(trainable=batch.trainable & ~first)
    places = places_of(oracle_objective(), batch, 4)
    ar = next_token(batch, places)
    targets = np.where(ar.scored, np.asarray(batch.position) + 1, -1)
    nll = Oracle().losses(places, batch.tokens, (ar.rows, ar.labels, targets), TOKEN)
    assert np.isclose(nll.sum(), Oracle().nll(batch, 1), rtol=1e-9)
    assert int(ar.scored.sum()) == int(batch.trainable.sum())
    assert np.array_equal(ar.weight, ar.scored.astype(jnp.float32))


def test_blocks_of_one_read_from_the_clean_stream_are_the_likelihood():
    """shifted_first_clean with block size 1 reads every token where an AR model reads it."""
    batch = TEXTS["packed_prompts"]
    shifted = oracle_objective(alignment=Alignment.SHIFTED_CLEAN)
    bound = oracle_bound(shifted, batch, 1, TOKEN)
    assert np.isclose(bound, Oracle().nll(batch, 1), rtol=1e-6)


# The network.


def default(**kwargs) -> Objective:
    kwargs.setdefault("process", Absorbing(mask_id=MASK))
    kwargs.setdefault("block_size", BlockSize(first=1, last=8, double_every=10))
    return Objective(**kwargs)


MODEL = tiny.model()
LENGTH = 8


@pytest.fixture(scope="module")
def params():
    """The tiny model's parameters; the head is not small, so that losses differ."""
    return MODEL.init(jax.random.key(0))


@partial(jax.jit, static_argnums=(0, 1))
def parts_of(objective, model, params, batch, block_size, key):
    return losses(objective, model, params, batch, block_size, key)


@partial(jax.jit, static_argnums=(0, 1))
def losses_under(objective, model, params, batch, block_size, masked):
    """Per-token losses of fixed masks."""
    events = jnp.where(masked, MASK, batch.tokens)
    view = Corruption(events, batch.tokens, masked, masked.astype(jnp.float32))
    row = build_row(objective, batch, block_size, [view] * objective.views)
    return token_losses(model, params, row)


@partial(jax.jit, static_argnums=0)
def hidden_of(model, params, tokens, places):
    return block_step(model, params, tokens, places)[0]


def size(block: int):
    return jnp.asarray(block, jnp.int32)


def dense_nll(params, hidden, labels) -> np.ndarray:
    """-log softmax of the labels in float64, the mask id banned."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["head"], np.float64).T
    logits[..., MASK] = -np.inf
    log_probs = special.log_softmax(logits, axis=-1)
    return -np.take_along_axis(log_probs, np.asarray(labels)[..., None], axis=-1)[..., 0]


def test_blocks_of_one_are_an_autoregressive_model_that_is_asked_by_masks(params):
    """P1: with block size 1 the loss is sum_i -log p(x_i | x_<i), each by a forward of its own."""
    batch = tiny.batch([list(range(8))], [[3, 1, 4, 1, 5, 9]], length=LENGTH)
    parts = parts_of(default(), MODEL, params, batch, size(1), jax.random.key(1))
    # Row (b, i): the clean prefix x_<i of row b and one mask at position i.
    at = np.tile(np.arange(LENGTH), 2)
    text = np.repeat(np.asarray(batch.tokens), LENGTH, axis=0)
    before = (np.arange(LENGTH) < at[:, None]).astype(np.int32)
    along = np.tile(np.arange(LENGTH), (2 * LENGTH, 1))
    one = at[:, None]
    sides = (along * 0, before, *[along] * 3), (one * 0 + 1, one * 0 + 1, *[one] * 3)
    fields = (np.concatenate(side, axis=1) for side in zip(*sides, strict=True))
    places = Places(*(jnp.asarray(x, jnp.int32) for x in fields))
    tokens = jnp.asarray(np.concatenate([text, one * 0 + MASK], axis=1))
    hidden = hidden_of(MODEL, params, tokens, places)[:, -1]
    nll = dense_nll(params, hidden, text[np.arange(len(at)), at]).reshape(2, LENGTH)
    expected = nll[np.asarray(batch.trainable)].sum()
    assert parts["diffusion"].denominator == batch.trainable.sum()
    assert abs(parts["diffusion"].numerator - expected) < 1e-5 * expected


def test_one_block_per_row_needs_no_clean_stream(params):
    """P2: with one block per document the noisy view alone (MDLM) has the same losses."""
    batch = tiny.random_batch(8, LENGTH, seed=1)
    both, alone = (
        parts_of(default(clean_stream=c), MODEL, params, batch, size(LENGTH), jax.random.key(2))
        for c in (True, False)
    )
    assert np.isclose(both["diffusion"].numerator, alone["diffusion"].numerator, rtol=1e-6)
    assert both["diffusion"].denominator == alone["diffusion"].denominator


@partial(jax.jit, static_argnums=(0, 1))
def means_and_grads(objective, model, params, batch, block_size, key, weights):
    """The means of the parts, stacked, and the gradient of their weighted sum."""

    def means(p):
        parts = losses(objective, model, p, batch, block_size, key)
        return jnp.stack([part.mean for part in parts.values()])

    values, pull_back = jax.vjp(means, params)
    return values, pull_back(jnp.asarray(weights))[0]


JOINT = default(ar_weight=0.5)
BOTH = np.array([1.0, JOINT.ar_weight], np.float32)


def assert_trees_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= tolerance * max(1e-2, np.abs(y).max())


def test_the_clean_stream_is_an_autoregressive_model(params):
    """P8: its hidden states, next-token loss and gradient are those of the model run without views.

    And it is causal: a later token changes nothing before it.
    """
    batch = tiny.random_batch(8, LENGTH, seed=2)
    clean = clean_places(batch.segment, batch.position, 4)
    joined = join_places(clean, noisy_places(clean, 1))
    masked = jnp.full_like(batch.tokens, MASK)
    two = hidden_of(MODEL, params, jnp.concatenate([batch.tokens, masked], axis=1), joined)
    one = hidden_of(MODEL, params, batch.tokens, clean)
    assert np.abs(two[:, :LENGTH] - one).max() < 1e-6 * np.abs(one).max()
    other = hidden_of(MODEL, params, batch.tokens.at[:, 5].set(7), clean)
    assert np.array_equal(one[:, :5], other[:, :5]) and not np.array_equal(one, other)

    key, alone = jax.random.key(3), default(views=0, ar_weight=1.0)
    one, ones = np.ones(1, np.float32), np.array([0, 1], np.float32)
    ar, ar_grad = means_and_grads(alone, MODEL, params, batch, size(4), key, one)
    both, both_grad = means_and_grads(JOINT, MODEL, params, batch, size(4), key, ones)
    assert abs(both[1] - ar[0]) < 1e-6 * ar[0]
    assert_trees_close(both_grad, ar_grad, 1e-5)


@partial(jax.jit, static_argnums=0)
def pull(model, params, vectors, places, cotangent):
    return jax.vjp(lambda x: block_step(model, params, x, places)[0], vectors)[1](cotangent)[0]


@pytest.mark.parametrize("clean", CleanMode)
def test_outputs_depend_on_what_the_mask_shows_and_on_nothing_else(clean, params):
    """P9: d output / d input is exactly 0 for every invisible pair and not 0 for every visible one.

    So nothing of blocks >= b reaches noisy block b, through any number of layers.
    """
    model = tiny.model(clean, tiny.Vectors())
    trunk = {name: x for name, x in params.items() if name != "embed"}
    batch = tiny.batch([list(range(5)), [1, 2, 3]], [list(range(3)), None, [4, 5]], length=LENGTH)
    places = clean_places(batch.segment, batch.position, 2)
    places = join_places(places, noisy_places(places, 1))
    seen = np.asarray(dense_mask(places.meta, places.meta, clean))
    seen = seen | np.eye(2 * LENGTH, dtype=bool)  # residual stream
    rng = np.random.default_rng(0)
    shape = (2, 2 * LENGTH, tiny.WIDTH)
    vectors = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    cotangent = rng.standard_normal(shape).astype(np.float32)
    for query in range(2 * LENGTH):
        only = np.where(np.arange(2 * LENGTH)[:, None] == query, cotangent, 0)
        slope = np.asarray(pull(model, trunk, vectors, places, jnp.asarray(only)))
        assert np.array_equal((slope != 0).any(axis=-1), seen[:, query]), query


def test_what_a_mask_hides_has_no_influence(params):
    """P9: swapping the token under a mask changes no output of its block or of earlier ones."""
    batch = tiny.batch([list(range(8))], [[3, 1, 4, 1, 5, 9, 2, 6]], length=LENGTH)
    clean = clean_places(batch.segment, batch.position, 4)
    places = join_places(clean, noisy_places(clean, 1))
    view = batch.tokens.at[:, jnp.array([2, 3, 6])].set(MASK)
    swapped = batch.tokens.at[:, 2].set(11)
    a, b = (
        np.asarray(hidden_of(MODEL, params, jnp.concatenate([x, view], axis=1), places))
        for x in (batch.tokens, swapped)
    )
    noisy = slice(LENGTH, LENGTH + 4)
    assert np.array_equal(a[:, noisy], b[:, noisy]) and np.array_equal(a[:, :2], b[:, :2])
    assert (a[:, LENGTH + 4 :] != b[:, LENGTH + 4 :]).any(axis=-1).all()


def test_padding_has_no_influence_and_prompts_are_never_scored(params):
    """P10: other tokens in the padding change no bit of any loss; prompts have no entries."""
    batch = tiny.batch(
        [list(range(4)), None, [1, 2]], [None, [3, 1, 4, 1, 5]], length=LENGTH, prompt=2
    )
    objective = default(ar_weight=0.5, views=2)
    other = batch._replace(tokens=jnp.where(batch.segment == 0, 13, batch.tokens))
    a, b = (
        parts_of(objective, MODEL, params, x, size(4), jax.random.key(5)) for x in (batch, other)
    )
    assert jax.tree.map(float, a) == jax.tree.map(float, b)
    places = places_of(objective, batch, 4)
    for seed in range(4):
        views = corruptions(objective, batch, places, jax.random.key(seed))
        row = build_row(objective, batch, 4, views)
        scored = np.asarray(row.diffusion.scored).reshape(2, 2, LENGTH)
        assert not (scored & ~np.asarray(batch.trainable)[:, None]).any()
        events = np.asarray(row.tokens)[:, LENGTH:].reshape(2, 2, LENGTH)
        assert np.array_equal(events != np.asarray(batch.tokens)[:, None], scored)
        labels = np.asarray(row.ar.labels)[np.asarray(row.ar.scored)]
        assert labels.tolist() == [2, 3, 4, 1, 5]


def test_views_differ_and_are_averaged(params):
    """Two views draw their own masks; their weights add up to those of one view."""
    batch = tiny.random_batch(8, LENGTH, seed=3)
    objective = default(views=2)
    places = places_of(objective, batch, 4)
    views = corruptions(objective, batch, places, jax.random.key(0))
    assert not np.array_equal(views[0].scored, views[1].scored)
    row = build_row(objective, batch, 4, views)
    weight = np.asarray(row.diffusion.weight)
    expected = np.concatenate([v.weight for v in views], axis=1) / 2
    assert np.array_equal(weight, expected)
    (single,) = corruptions(default(), batch, places, jax.random.key(0))
    assert np.array_equal(single.scored, views[0].scored)


def test_packing_changes_nothing(params):
    """P7: documents packed into a row, or each in a row of its own, have the same losses."""
    texts = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 8, 7, 6], [5, 4, 3]]
    hidden = [[0, 1, 0, 1, 1], [0, 1, 1], [0, 0, 1, 0], [0, 1, 0]]
    objective = default(ar_weight=1.0)

    def run(groups):
        """Losses of each text; `groups` lists (offset, text) pairs per row."""
        rows = []
        masked = np.zeros((2, 12), bool)
        for r, group in enumerate(groups):
            row, at = [], 0
            for offset, i in group:
                row += [None] * (offset - at) + [texts[i]]
                at = offset + len(texts[i])
                masked[r, offset:at] = hidden[i]
            rows.append(row)
        batch = tiny.batch(*rows, length=12)
        diffusion, ar = losses_under(objective, MODEL, params, batch, size(2), jnp.asarray(masked))
        return {
            i: np.concatenate(
                [np.asarray(x)[r, offset : offset + len(texts[i])] for x in (diffusion, ar)]
            )
            for r, group in enumerate(groups)
            for offset, i in group
        }

    packed = run([[(0, 0), (5, 1), (8, 2)], [(0, 3), (4, 2)]])
    apart = run([[(0, 0)], [(0, 1)]]) | run([[(0, 2)], [(3, 3)]])
    for i in range(4):
        assert (apart[i] != 0).sum() == sum(hidden[i]) + len(texts[i]) - 1
        assert np.abs(packed[i] - apart[i]).max() < 1e-6 * np.abs(apart[i]).max()


MESHES = {
    "8x1": {"data": 8},
    "4x2": {"data": 4, "tensor": 2},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    "name", ["2x2x2", *(pytest.param(n, marks=pytest.mark.slow) for n in MESHES if n != "2x2x2")]
)
def test_meshes_agree_on_losses_and_gradients(name, params):
    """P16: parameters, noise, loss and gradient are those of one device."""
    batch = tiny.random_batch(8, LENGTH, seed=2)
    key = jax.random.key(3)
    here, grads = means_and_grads(JOINT, MODEL, params, batch, size(4), key, BOTH)
    with jax.set_mesh(sharding.make_mesh(**MESHES[name])):
        own = MODEL.init(jax.random.key(0))
        assert_trees_close(own, params, 1e-6)
        spread = Batch(*(sharding.reshard(x, "batch") for x in batch))
        there, there_grads = means_and_grads(JOINT, MODEL, own, spread, size(4), key, BOTH)
    assert np.abs(np.asarray(here) - np.asarray(there)).max() < 1e-5
    assert_trees_close(there_grads, grads, 1e-5)


# Integers, numbers and refusals.


def row_places(block: int):
    batch = tiny.batch([list(range(5)), [1, 2, 3]], [[4, 5], None, [1, 2, 3, 4]], length=LENGTH)
    clean = clean_places(batch.segment, batch.position, block)
    return batch, clean, noisy_places(clean, 2)


def test_alignments_differ_only_where_they_say():
    """P22: noisy and clean shifts differ at block-first tokens of blocks >= 1, nowhere else.

    There the clean one reads the last clean token of the block before; a document's first token has
    no row. Elsewhere both read the row before in the same view.
    """
    _, clean, noisy = row_places(2)
    rows, exists = {}, {}
    for alignment in Alignment:
        rows[alignment], exists[alignment] = (
            np.asarray(x) for x in output_rows(alignment, clean, noisy, LENGTH)
        )
    same, from_clean, from_noisy = Alignment
    position, real = np.asarray(noisy.position), np.asarray(noisy.segment) != 0
    index = np.arange(2 * LENGTH)
    assert np.array_equal(exists[same], real)
    assert (rows[same] == LENGTH + index).all()
    for shifted in (from_clean, from_noisy):
        assert np.array_equal(exists[shifted], real & (position > 0))
    there = exists[from_noisy]
    assert (rows[from_noisy] == LENGTH + index - 1)[there].all()
    first = there & (position % 2 == 0)
    assert np.array_equal((rows[from_noisy] != rows[from_clean]) & there, first)
    assert (rows[from_clean] == index % LENGTH - 1)[first].all()


def test_next_token_entries_by_hand():
    """Outputs name the next token of their document: never across documents, prompts or padding."""
    batch, clean, _ = row_places(2)
    batch = batch._replace(trainable=batch.trainable.at[0, 1].set(False))
    ar = next_token(batch, clean)
    entries = [
        [(int(ar.rows[b, i]), int(ar.labels[b, i])) for i in np.flatnonzero(ar.scored[b])]
        for b in range(2)
    ]
    assert entries[0] == [(1, 2), (2, 3), (3, 4), (5, 2), (6, 3)]
    assert entries[1] == [(0, 5), (3, 2), (4, 3), (5, 4)]


def test_without_documents_a_row_is_one_text():
    """documents=False: blocks, positions and mask run through; padding stays out."""
    batch, *_ = row_places(2)
    places = places_of(default(documents=False), batch, 4)
    assert np.array_equal(places.segment, np.asarray(batch.segment != 0))
    assert (np.asarray(places.position) == np.arange(LENGTH)).all()
    assert (np.asarray(places.block) == np.arange(LENGTH) // 4).all()


@pytest.mark.parametrize(
    "step, expected",
    [(0, 2), (9, 2), (10, 4), (19, 4), (20, 8), (29, 8), (30, 16), (39, 16), (10**6, 16)],
)
def test_block_size_doubles_at_its_steps(step, expected):
    """P17: the step before a boundary has the old size, the boundary the new one."""
    growing = BlockSize(first=2, last=16, double_every=10)
    assert growing.at(step) == growing.at(jnp.asarray(step)) == expected
    assert growing.largest == 16
    assert BlockSize(first=3).at(step) == 3 == BlockSize(first=3).largest


def test_a_growing_block_size_compiles_once(params):
    """P17: sizes 1, 2, 4 and 8 run in one program and give different losses."""
    batch = tiny.random_batch(8, LENGTH, seed=2)
    key = jax.random.key(3)

    def run(step):
        block = JOINT.block_size.at(jnp.asarray(step))
        return float(means_and_grads(JOINT, MODEL, params, batch, block, key, BOTH)[0][0])

    found = [run(0)]
    before = means_and_grads._cache_size()
    found += [run(step) for step in (10, 20, 30)]
    assert means_and_grads._cache_size() == before
    assert len(set(found)) == 4


def test_blocks_of_documents_may_differ_in_one_row():
    """A block size per token is data too: each document counts in its own."""
    batch, *_ = row_places(2)
    sizes = jnp.where(batch.segment == 1, 2, 3)
    places = clean_places(batch.segment, batch.position, sizes)
    assert np.asarray(places.block)[0].tolist() == [0, 0, 1, 1, 2, 0, 0, 0]


def test_pairs_are_summed_before_they_are_divided():
    """Two parts of different size: the mean of the sum, not the mean of the means."""
    parts = [Pair(jnp.asarray(6.0), jnp.asarray(2.0)), Pair(jnp.asarray(1.0), jnp.asarray(5.0))]
    whole = Pair(*(sum(x) for x in zip(*parts, strict=True)))
    assert whole.mean == 1.0 and parts[0].mean == 3.0
    assert Pair(jnp.zeros(()), jnp.zeros(())).mean == 0.0
    objective = default(ar_weight=0.25)
    assert total(objective, {"diffusion": whole, "ar": parts[0]}) == 1.0 + 0.25 * 3.0
    assert total(objective, {"diffusion": whole}) == 1.0


def test_denominators_count_what_the_normaliser_says(params):
    """Trainable tokens or all real ones: the numerator is the same."""
    batch = tiny.random_batch(8, LENGTH, seed=4)
    trainable, real = (
        parts_of(default(normaliser=n), MODEL, params, batch, size(4), jax.random.key(0))[
            "diffusion"
        ]
        for n in (Normaliser.TRAINABLE, Normaliser.REAL)
    )
    assert trainable.denominator == batch.trainable.sum() < real.denominator
    assert real.denominator == (batch.segment != 0).sum()
    assert np.isclose(trainable.numerator, real.numerator, rtol=1e-6)


class Everything(Draw):
    """Masks every trainable token with weight 1."""

    def masks(self, key, stratum, places, trainable, step, tokens):
        return Masks(trainable, trainable.astype(jnp.float32))


def test_another_draw_is_another_class(params):
    """The seam of the process: with every token masked the bound part is a plain sum of NLLs."""
    batch = tiny.random_batch(8, LENGTH, seed=4)
    objective = default(process=Absorbing(mask_id=MASK, draw=Everything()))
    part = parts_of(objective, MODEL, params, batch, size(4), jax.random.key(0))["diffusion"]
    clean = clean_places(batch.segment, batch.position, 4)
    places = join_places(clean, noisy_places(clean, 1))
    noisy = jnp.where(batch.trainable, MASK, batch.tokens)
    hidden = hidden_of(MODEL, params, jnp.concatenate([batch.tokens, noisy], axis=1), places)
    nll = dense_nll(params, hidden[:, LENGTH:], batch.tokens)
    expected = nll[np.asarray(batch.trainable)].sum()
    assert abs(part.numerator - expected) < 1e-5 * expected


REFUSED = {
    "views ar_weight": (default, {"views": 0}),
    "views=-1 views=1": (default, {"views": -1}),
    "ar_weight=nan ar_weight=0.5": (default, {"ar_weight": float("nan")}),
    "ar_weight finite": (default, {"ar_weight": Ramp(first=1.0, last=-1.0, end=9)}),
    "views=1 Complement views=2": (
        default,
        {"process": Absorbing(mask_id=MASK, draw=Complement())},
    ),
    "stages begins=(0,) begins=0,1000": (BlockStages, {"stages": (4, 8), "begins": (0,)}),
    "stages begins=(0, 0)": (BlockStages, {"stages": (4, 8), "begins": (0, 0)}),
    "stages=(0,) stages=4,8": (BlockStages, {"stages": (0,), "begins": (0,)}),
    "begin=5 begin=0": (BlockSize, {"first": 4, "begin": 5}),
    "draw.weight=Bound draw.weight=Flat": (Complement, {"draw": Bernoulli()}),
    "begin end": (Ramp, {"first": 1.0, "last": 0.0, "begin": 5, "end": 5}),
    "last_mean=1.0": (Beta, {"steps": 9, "last_mean": 1.0}),
    "ar_weight clean_stream": (default, {"clean_stream": False, "ar_weight": 0.5}),
    "alignment clean_stream": (
        default,
        {"clean_stream": False, "alignment": Alignment.SHIFTED_CLEAN},
    ),
    "first": (BlockSize, {"first": 0}),
    "last double_every": (BlockSize, {"first": 2, "last": 8}),
    "last= double_every=": (BlockSize, {"first": 2, "double_every": 8}),
    "last first": (BlockSize, {"first": 2, "last": 12, "double_every": 5}),
    "last= first=": (BlockSize, {"first": 8, "last": 4, "double_every": 5}),
    "double_every": (BlockSize, {"first": 1, "last": 4, "double_every": -5}),
}


@pytest.mark.parametrize("names", REFUSED)
def test_settings_that_cannot_work_are_refused_by_name(names):
    """The message names the fields in question."""
    kind, fields = REFUSED[names]
    with pytest.raises(ValueError) as error:
        kind(**fields)
    assert all(name in str(error.value) for name in names.split())


def test_a_next_token_loss_that_sees_its_label_is_refused():
    """ar_weight with a block-causal clean stream leaks from block size 2 on, also a grown one."""
    leaking = default(ar_weight=0.5, block_size=BlockSize(first=1, last=4, double_every=9))
    with pytest.raises(ValueError) as error:
        leaking.check(BLOCK)
    assert "ar_weight" in str(error.value) and "clean" in str(error.value)
    leaking.check(TOKEN)
    default(ar_weight=0.5, block_size=BlockSize(first=1)).check(BLOCK)
    default(ar_weight=0.0).check(BLOCK)


def test_the_vocabulary_of_these_tests_is_the_models():
    assert MODEL.table()["embed"].shape == (VOCAB, tiny.WIDTH) and MASK < VOCAB


def test_every_row_of_one_group_is_weighted_without_bias():
    """The levels of a batch are shuffled by keys that no row uses for its masks."""
    rows, length, draws = 8, 8, 4000
    plan = Objective(
        process=Absorbing(mask_id=tiny.MASK, draw=Bernoulli(scope=Scope.ROW)),
        block_size=BlockSize(first=length),
        clean_stream=False,
        documents=False,
    )
    batch = tiny.batch(*[[list(range(length))]] * rows, length=length, prompt=0)

    @jax.jit
    def mean_weight(batch):
        places = places_of(plan, batch, length)
        keys = jax.vmap(jax.random.key)(jnp.arange(draws))
        return jax.vmap(lambda k: corruptions(plan, batch, places, k)[0].weight)(keys).mean(axis=0)

    # Var(m / t) = E[1 / t] - 1 = log(1000) - 1 for t in [0.001, 1].
    error = np.sqrt((np.log(1000) - 1) / draws)
    assert np.abs(np.asarray(mean_weight(batch)) - 1).max() < 5 * error
