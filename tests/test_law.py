"""The law: what a noisy block sees in a training row is what a canvas sees over the cache.

Rows hold packed documents with several views; windows hold one block of one view over a cache that
was filled from the clean tokens before it.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var
from sampling import (
    BLOCK,
    DENSE,
    KEY,
    MASK,
    PREFILL,
    ROWS,
    SLOTS,
    TEMPERATURE,
    TILES,
    WIDTH,
    controls,
    host,
    infilled_rows,
    mixed_rows,
    sampled,
    sampler,
    tiny,
    weights,
)

from bdjax import cache as caches
from bdjax.layout import (
    Places,
    clean_places,
    join,
    join_places,
    noisy_places,
    window_places,
)
from bdjax.loss import losses, token_losses, total
from bdjax.model import Mlp, Norm
from bdjax.noise import Absorbing, Corruption, Process
from bdjax.objective import (
    Alignment,
    Batch,
    BlockSize,
    Objective,
    build_row,
    corruptions,
    output_rows,
    places_of,
)
from bdjax.parameters import Parameter, Role
from bdjax.policies import Update
from bdjax.readout import Shaping
from bdjax.sampler import UNLIMITED, Sampler, advance, start
from bdjax.stats import Stats
from bdjax.step import Model, block_step
from pallas_kernels import CleanMode, Mosaic

L = 20
# (length, prompt) of the documents of each row: aligned to 4, short last blocks, prompts 0 .. 2B.
PACKS = [
    [(8, 0), (8, 4), (4, 1)],
    [(7, 2), (5, 3), (8, 8)],
    [(11, 5), (9, 6)],
    [(9, 7), (9, 8)],
]
WINDOWS = 96


@cache
def batch() -> Batch:
    """The packs as a batch; prompts are untrainable."""
    shape = len(PACKS), L
    segment, position, trainable = (np.zeros(shape, np.int32) for _ in range(3))
    for row, documents in enumerate(PACKS):
        begin = 0
        for number, (length, prompt) in enumerate(documents):
            here = slice(begin, begin + length)
            segment[row, here], position[row, here] = number + 1, np.arange(length)
            trainable[row, here] = np.arange(length) >= prompt
            begin += length
    tokens = np.random.default_rng(0).integers(0, MASK, shape)
    return Batch(*(jnp.asarray(x) for x in (tokens, segment, position, trainable.astype(bool))))


def objective(views: int = 1, alignment=Alignment.SAME_POSITION, process=None) -> Objective:
    """Exact-count masks by default."""
    process = Absorbing(mask_id=MASK) if process is None else process
    return Objective(
        process=process, block_size=BlockSize(first=BLOCK), views=views, alignment=alignment
    )


class Window(NamedTuple):
    """One block of one view: where it stands in the row and in its document."""

    row: int
    view: int
    begin: int  # of the document in the row
    block: int
    size: int
    length: int  # of the block; less than size if the document ends in it

    @property
    def columns(self) -> np.ndarray:
        """The block's columns in the clean stream."""
        first = self.begin + self.block * self.size
        return np.arange(first, first + self.length)


def windows_of(sizes: np.ndarray, views: int) -> list[Window]:
    """All blocks of all views under per-document block sizes, (row, document)."""
    found = []
    for row, documents in enumerate(PACKS):
        begin = 0
        for number, (length, _) in enumerate(documents):
            size = int(sizes[row, number])
            for block in range(-(-length // size)):
                wide = min(size, length - block * size)
                found += [Window(row, v, begin, block, size, wide) for v in range(views)]
            begin += length
    return found


def per_token(sizes: np.ndarray) -> jax.Array:
    """Block sizes of documents as one integer per token of the batch."""
    number = np.maximum(np.asarray(batch().segment) - 1, 0)
    return jnp.asarray(np.take_along_axis(sizes, number, axis=1))


class Cached(NamedTuple):
    """What the cached path gives, (window, slot, ...): the canvases' outputs, and the hidden row
    of the last clean token before each canvas; from separate windows and from fused ones."""

    separate: np.ndarray
    fused: np.ndarray
    last: np.ndarray
    fused_last: np.ndarray
    committed_error: np.ndarray  # keys and values of a fused commit against those of a prefill


def gather(events, windows, canvas: bool):
    """(window, BLOCK, ...) of the blocks, out of (views, B, L, ...); zeros beyond a block."""
    events = np.asarray(events)
    out = np.zeros((len(windows), BLOCK, *events.shape[3:]), events.dtype)
    for n, w in enumerate(windows):
        out[n, : w.length] = events[w.view if canvas else 0, w.row, w.columns]
    return out


def padded(windows) -> list[Window]:
    """WINDOWS windows by repetition: one shape for every block size."""
    assert len(windows) <= WINDOWS
    return (windows * WINDOWS)[:WINDOWS]


@partial(jax.jit, static_argnames="model")
def over_the_cache(model, params, documents, noisy, size, block, length) -> Cached:
    """Every window over a cache made by prefill, and again fused over one block less."""
    begin, slot = block * size, jnp.arange(BLOCK)
    always, nth = block >= 0, jnp.arange(WINDOWS)
    canvas = window_places(begin, block, BLOCK, slot < length[:, None], ~always)

    at = jnp.arange(documents.shape[1]) + begin[:, None] * 0
    real = at < begin[:, None]
    places = Places(at * 0, real.astype(jnp.int32), at // size[:, None], at, at)
    c = model.decoder
    empty = caches.empty(c.num_layers, *at.shape, c.num_kv_heads, c.head_dim, c.dtype)
    hidden, new = block_step(model, params, documents, places)
    full = caches.write(empty, new, places, real)
    separate, _ = block_step(model, params, noisy, canvas, full)
    last = hidden[nth, jnp.maximum(begin - 1, 0)]

    before = caches.write(empty, new, places, at < (begin - size)[:, None])
    valid = (block > 0)[:, None] & (slot < size[:, None])
    finished = window_places(begin - size, block - 1, BLOCK, valid, always)
    tokens = jax.vmap(lambda row, i: row[jnp.maximum(i, 0)])(documents, finished.position)
    both = join_places(finished, canvas)
    fused, new = block_step(model, params, join(tokens, noisy), both, before)
    committed = caches.write(before, jax.tree.map(lambda x: x[:, :, :BLOCK], new), finished, valid)
    filled = full.meta.segment[None, :, None, :, None]
    error = jnp.maximum(*(jnp.abs((full[i] - committed[i]) * filled).max() for i in (0, 1)))
    error += jnp.abs((full.block - committed.block) * full.meta.segment).max()
    error += jnp.abs(full.length - committed.length).max()
    fused_last = fused[nth, jnp.maximum(size - 1, 0)]
    return Cached(separate, fused[:, BLOCK:], last, fused_last, error)


def cached_path(model, params, clean, views, windows) -> Cached:
    """`over_the_cache` for a batch's blocks. clean (1, B, L, ...), views (views, B, L, ...)."""
    windows = padded(windows)
    documents = np.zeros((WINDOWS, L // 2 + 2, *clean.shape[3:]), clean.dtype)
    for n, w in enumerate(windows):
        upto = w.block * w.size
        documents[n, :upto] = clean[0, w.row, w.begin : w.begin + upto]
    integers = (np.array([getattr(w, f) for w in windows]) for f in ("size", "block", "length"))
    got = over_the_cache(model, params, documents, gather(views, windows, True), *integers)
    return Cached(*(np.asarray(x) for x in got))


@partial(jax.jit, static_argnames="plan")
def corrupted(plan, batch, sizes, seed) -> list[Corruption]:
    """The objective's own views of a batch."""
    return corruptions(plan, batch, places_of(plan, batch, sizes), jax.random.key(seed))


@partial(jax.jit, static_argnames=("plan", "model"))
def one_pass(plan, model, params, batch, sizes, views):
    """Outputs (B, L + views L, D) of the objective's own row through the step."""
    row = build_row(plan, batch, sizes, views)
    return block_step(model, params, row.tokens, row.places)[0]


def check_windows(hidden, got: Cached, windows, views: int):
    """The row's outputs against the windows', slot by slot, 1e-5."""
    hidden = np.asarray(hidden).reshape(len(PACKS), 1 + views, L, -1)
    assert got.committed_error < 1e-5
    for n, w in enumerate(windows):
        wanted = hidden[w.row, 1 + w.view, w.columns]
        for outputs in (got.separate, got.fused):
            np.testing.assert_allclose(outputs[n, : w.length], wanted, atol=1e-5, rtol=0)
        for last in (got.last, got.fused_last) if w.block else ():
            clean = hidden[w.row, 0, w.columns[0] - 1]
            np.testing.assert_allclose(last[n], clean, atol=1e-5, rtol=0)


SIZES = {
    "four": np.full((4, 3), 4),
    "three": np.full((4, 3), 3),
    "per document": np.array([[4, 2, 3], [3, 4, 2], [4, 3, 3], [2, 4, 4]]),
}
MOSAIC = Mosaic(query_tile=16, key_tile=16, window_tile=16, interpret=True)
# Every implementation, both clean modes and one to three views; all combinations are slow.
CASES = [(DENSE, CleanMode.TOKEN, 3), (DENSE, CleanMode.BLOCK, 1), (TILES, CleanMode.BLOCK, 2)]
CASES += [
    pytest.param(impl, clean, views, marks=pytest.mark.slow)
    for impl in (DENSE, TILES, MOSAIC)
    for clean in CleanMode
    for views in (1, 2, 3)
    if (impl, clean, views) not in CASES
]


def named(x):
    return type(x).__name__ if x in (DENSE, TILES, MOSAIC) else str(getattr(x, "value", x))


@pytest.mark.parametrize("impl, clean, views", CASES, ids=named)
def test_windows_over_the_cache_equal_the_training_row(impl, clean, views):
    """For packed, unaligned and prompted documents and block sizes that differ by document."""
    model, plan = tiny(clean, impl), objective(views)
    for seed, sizes in enumerate(SIZES.values()):
        noisy = corrupted(plan, batch(), per_token(sizes), seed)
        hidden = one_pass(plan, model, weights(), batch(), per_token(sizes), noisy)
        events = np.stack([view.events for view in noisy])
        assert (events == MASK).any() and (events[0] != events[-1]).any() == (views > 1)
        windows = windows_of(sizes, views)
        clean_events = np.asarray(batch().tokens)[None]
        got = cached_path(model, weights(), clean_events, events, windows)
        check_windows(hidden, got, windows, views)


def test_windows_equal_the_training_row_in_a_diffusion_transformer():
    """LayerNorms with biases and a GELU MLP, as BD3-LM's, its blocks seen whole by clean tokens."""
    model, plan, sizes = tiny(CleanMode.BLOCK), objective(2), SIZES["per document"]
    decoder = replace(model.decoder, num_kv_heads=4, norm=Norm.LAYER, mlp=Mlp.GELU)
    model = replace(model, decoder=decoder)
    # What starts as zeros and ones would leave the biases out of the law.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), model.init(jax.random.key(0))
    )
    assert {"attn_norm_bias", "b_up", "b_down"} <= params["layers"].keys()
    noisy = corrupted(plan, batch(), per_token(sizes), 0)
    hidden = one_pass(plan, model, params, batch(), per_token(sizes), noisy)
    windows, events = windows_of(sizes, 2), np.stack([view.events for view in noisy])
    got = cached_path(model, params, np.asarray(batch().tokens)[None], events, windows)
    check_windows(hidden, got, windows, 2)


class Bound(NamedTuple):
    """The one-pass loss, its unweighted NLL per noisy token, and the views' corruption."""

    sum: jax.Array
    count: jax.Array
    nll: jax.Array
    scored: jax.Array
    views: list[Corruption]


@partial(jax.jit, static_argnames=("plan", "model"))
def bound_of(plan, model, params, batch, sizes, key) -> Bound:
    """`losses` as training calls it, and its parts."""
    pair = losses(plan, model, params, batch, sizes, key)["diffusion"]
    noisy = corruptions(plan, batch, places_of(plan, batch, sizes), key)
    row = build_row(plan, batch, sizes, noisy)
    nll, _ = token_losses(model, params, row)
    return Bound(pair.numerator, pair.denominator, nll, row.diffusion.scored, noisy)


@partial(jax.jit, static_argnames="model")
def window_nll(model, params, hidden, labels, scored):
    rows = jnp.arange(BLOCK) + jnp.zeros_like(labels)
    return model.readout.nll(params, hidden, rows, labels, scored)


@pytest.mark.parametrize("alignment", Alignment, ids=lambda a: a.value)
def test_the_bound_through_the_cache_equals_the_one_pass_loss(alignment):
    """Exact for same_position and shifted_first_clean; shifted_first_noisy differs from what a
    sampler reads (the clean last token) at block-first slots, and nowhere else."""
    views, sizes, model = 2, SIZES["per document"], tiny()
    plan = objective(views, alignment)
    bound = bound_of(plan, model, weights(), batch(), per_token(sizes), jax.random.key(3))
    events, scored, weight = (
        np.stack([np.asarray(getattr(v, f)) for v in bound.views])
        for f in ("events", "scored", "weight")
    )
    clean = np.asarray(batch().tokens)[None]
    windows = padded(windows_of(sizes, views))
    real = len(windows_of(sizes, views))
    got = cached_path(model, weights(), clean, events, windows)
    first_of_document = np.array([w.block == 0 for w in windows])[:, None] & (np.arange(BLOCK) == 0)
    counted = gather(scored, windows, True)
    hidden = got.separate
    if alignment is not Alignment.SAME_POSITION:
        hidden = np.concatenate([got.last[:, None], hidden[:, :-1]], axis=1)
        counted &= ~first_of_document
    nll = np.asarray(window_nll(model, weights(), hidden, gather(clean, windows, False), counted))[
        :real
    ]

    def of_windows(x):
        return gather(np.reshape(x, (len(PACKS), views, L)).swapaxes(0, 1), windows, True)

    np.testing.assert_array_equal(of_windows(bound.scored), counted)
    difference = np.abs(nll - of_windows(bound.nll)[:real])
    if alignment is Alignment.SHIFTED_NOISY:
        block_first = counted[:real, 0]
        assert (difference[block_first, 0] > 1e-3).mean() > 0.9
        assert difference[:, 1:].max() < 1e-5
        return
    assert difference.max() < 1e-5
    weighted = (nll * gather(weight, windows, True)[:real]).sum() / views
    np.testing.assert_allclose(weighted, bound.sum, rtol=1e-5)
    assert bound.count == np.asarray(batch().trainable).sum()


class Replay(NamedTuple):
    """What training says of every (view, row, position)."""

    nll: np.ndarray
    entropy: np.ndarray


@partial(jax.jit, static_argnames=("model", "alignment"))
def replay(model, alignment, params, tokens, views, segment, size) -> Replay:
    """Scores `tokens` (N, S) in a training row with the given noisy views (N, views * S)."""
    clean = clean_places(segment, jnp.arange(SLOTS) + segment * 0, size[:, None] + segment * 0)
    noisy = noisy_places(clean, BLOCK)
    hidden, _ = block_step(model, params, join(tokens, views), join_places(clean, noisy))
    rows, exists = output_rows(alignment, clean, noisy, SLOTS)
    labels = jnp.tile(tokens, (1, BLOCK))
    nll = model.readout.nll(params, hidden, rows, labels, exists)
    keys = jax.random.split(jax.random.key(0), rows.shape)
    at = jnp.take_along_axis(hidden, rows[..., None], axis=1)
    entropy = model.readout.stats(params, at, Shaping(jnp.ones(rows.shape)), keys).entropy
    return Replay(*(x.reshape(ROWS, BLOCK, SLOTS).swapaxes(0, 1) for x in (nll, entropy)))


def slow_loop(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


LOOPS = [
    slow_loop(CleanMode.TOKEN, True, Alignment.SAME_POSITION, DENSE, False),
    (CleanMode.TOKEN, True, Alignment.SAME_POSITION, DENSE, True),
    slow_loop(CleanMode.TOKEN, False, Alignment.SAME_POSITION, DENSE, False),
    slow_loop(CleanMode.BLOCK, True, Alignment.SAME_POSITION, TILES, False),
    (CleanMode.BLOCK, True, Alignment.SAME_POSITION, TILES, True),
    slow_loop(CleanMode.BLOCK, False, Alignment.SAME_POSITION, DENSE, False),
    (CleanMode.TOKEN, True, Alignment.SHIFTED_CLEAN, DENSE, False),
    (CleanMode.TOKEN, False, Alignment.SHIFTED_CLEAN, DENSE, True),
]


@pytest.mark.parametrize("clean, fused, alignment, impl, infilled", LOOPS, ids=named)
def test_training_scores_every_step_as_the_loop_did(clean, fused, alignment, impl, infilled):
    """View s of a training row shows every block as it was at step s of sampling: the NLL and, at
    temperature 1, the entropy of the tokens written then are those that the loop recorded."""
    state = sampled(clean, fused, alignment, impl, infilled)
    rows = infilled_rows() if infilled else mixed_rows()
    step = state.record.step
    seen = (step[:, None] < np.arange(BLOCK)[:, None]) & state.filled[:, None]
    views = np.where(seen, state.events[:, None], MASK).reshape(ROWS, -1)
    segment = (np.arange(SLOTS) < rows.limit[:, None]).astype(np.int32)
    told = replay(tiny(clean, DENSE), alignment, weights(), state.events, views, segment, rows.size)
    written = 0
    for s in range(BLOCK):
        at = step == s
        written += at.sum()
        np.testing.assert_allclose(
            -np.asarray(told.nll)[s][at], state.record.logprob_raw[at], atol=2e-5
        )
        unscaled = at & (np.float32(0.7) != TEMPERATURE)[:, None]
        np.testing.assert_allclose(
            np.asarray(told.entropy)[s][unscaled], state.record.entropy[unscaled], atol=2e-5
        )
    assert written == (segment.astype(bool) & ~rows.given).sum()


CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Vector events (x_t, t) to hidden width by one matrix."""

    def table(self):
        init = jax.nn.initializers.normal(0.5)
        shape, axes = (CHANNELS + 1, WIDTH), ("head_dim", "embed_in")
        return {"patch": Parameter(shape=shape, axes=axes, init=init, role=Role.MATRIX)}

    def __call__(self, params, events):
        return events @ params["patch"]


@dataclass(frozen=True, kw_only=True)
class Velocity:
    """A linear head; its NLL is the squared error and its drawn "token" the velocity itself."""

    def table(self):
        init = jax.nn.initializers.normal(0.3)
        shape, axes = (CHANNELS, WIDTH), ("head_dim", "embed_in")
        return {"head": Parameter(shape=shape, axes=axes, init=init, role=Role.HEAD)}

    def nll(self, params, hidden, rows, labels, scored):
        velocity = jnp.take_along_axis(hidden, rows[..., None], axis=1) @ params["head"].T
        return jnp.where(scored, ((velocity - labels) ** 2).sum(axis=-1), 0.0)

    def stats(self, params, hidden, shaping, keys):
        nothing = jnp.zeros(hidden.shape[:2])
        return Stats(hidden @ params["head"].T, *[nothing] * 6)


@dataclass(frozen=True, kw_only=True)
class Flow(Process):
    """x_t = (1 - t) x_0 + t noise, one t per block; the network names noise - x_0."""

    def prior(self, keys):
        noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (CHANNELS,))))(keys)
        return jnp.concatenate([noise, jnp.ones((*noise.shape[:2], 1))], axis=-1)

    def corrupt(self, keys, strata, tokens, places, trainable, step):
        def one(key, segment, block, slot):
            own = jax.random.fold_in(jax.random.fold_in(key, segment), block)
            noise = jax.random.normal(jax.random.fold_in(key, slot), (CHANNELS,))
            return jax.random.uniform(own), noise

        slot = jnp.arange(tokens.shape[1])
        each = jax.vmap(jax.vmap(one, (None, 0, 0, 0)), (0, 0, 0, None))
        t, noise = each(keys, places.segment, places.block, slot)
        t, clean = t[..., None], tokens[..., :-1]
        noisy = jnp.concatenate([(1 - t) * clean + t * noise, t], axis=-1)
        events = jnp.where(trainable[..., None], noisy, tokens)
        return Corruption(events, noise - clean, trainable, trainable.astype(jnp.float32))


class Euler:
    """`steps` equal steps from t = 1 to 0; all slots move together and are filled by the last.

    It claims every slot: keeping given ones and those beyond the limit is the loop's business.
    """

    def __init__(self, steps):
        self.steps = steps

    def update(self, stats, view, canvas):
        left = 1 - (view.step + 1) / self.steps
        x = canvas[..., :-1] - stats.token / self.steps
        t = jnp.broadcast_to(left[:, None, None], canvas[..., -1:].shape)
        everywhere = view.masked | True
        last = (view.step + 1 >= self.steps)[:, None]
        return Update(jnp.concatenate([x, t], axis=-1), everywhere, everywhere & last)


jax.tree_util.register_pytree_node(
    Euler, lambda p: ((p.steps,), None), lambda _, children: Euler(*children)
)


def flow_model(clean) -> Model:
    return Model(decoder=tiny(clean).decoder, embedding=Patch(), readout=Velocity())


@cache
def flow_weights():
    return flow_model(CleanMode.TOKEN).init(jax.random.key(1))


def vectors(shape, seed=0):
    """Clean vector events: t = 0."""
    x = np.random.default_rng(seed).normal(size=(*shape, CHANNELS + 1)).astype(np.float32)
    x[..., -1] = 0
    return x


def test_a_vector_process_obeys_the_law():
    """Linear flow through the same rows, step, cache and readout seam: outputs and loss."""
    views, sizes, model = 2, SIZES["per document"], flow_model(CleanMode.TOKEN)
    plan, params = objective(views, process=Flow()), flow_weights()
    rows = batch()._replace(tokens=vectors((len(PACKS), L)))
    bound = bound_of(plan, model, params, rows, per_token(sizes), jax.random.key(3))
    events, labels, scored = (np.stack([v[f] for v in bound.views]) for f in (0, 1, 2))
    hidden = one_pass(plan, model, params, rows, per_token(sizes), bound.views)
    windows = windows_of(sizes, views)
    got = cached_path(model, params, rows.tokens[None], events, windows)
    check_windows(hidden, got, windows, views)
    velocity = got.separate @ np.asarray(params["head"]).T
    error = ((velocity - gather(labels, padded(windows), True)) ** 2).sum(axis=-1)
    counted = gather(scored, padded(windows), True)
    loss = (error * counted)[: len(windows)].sum() / views
    np.testing.assert_allclose(loss, bound.sum, rtol=1e-5)


STEPS = 3


@partial(jax.jit, static_argnames="model")
def velocity_in_row(model, params, clean_events, noisy_events, segment, size):
    """The velocity of a training row with one view, blocks of all rows at once."""
    clean = clean_places(segment, jnp.arange(SLOTS) + segment * 0, size[:, None] + segment * 0)
    places = join_places(clean, noisy_places(clean, 1))
    hidden, _ = block_step(model, params, join(clean_events, noisy_events), places)
    return hidden[:, SLOTS:] @ params["head"].T


@pytest.mark.parametrize(
    "clean, fused", [(CleanMode.TOKEN, True), slow_loop(CleanMode.BLOCK, False)]
)
def test_a_vector_process_goes_through_the_loop(clean, fused):
    """Euler steps of all blocks at once, in a training row whose clean stream is what the loop
    wrote, lead from the loop's noise to what it wrote."""
    model, rows = flow_model(clean), mixed_rows()
    rows = rows._replace(events=vectors((ROWS, SLOTS)))
    plan = Sampler(model=model, process=Flow(), canvas=BLOCK, fused=fused)
    control = controls(policy=Euler(jnp.asarray(STEPS)))._replace(stop=jnp.zeros((0,), jnp.int32))
    state = start(plan, flow_weights(), rows.request(), control, jax.random.key(KEY), PREFILL)
    x = np.array(state.events)
    state = host(advance(plan, flow_weights(), state, UNLIMITED))
    inside = np.arange(SLOTS) < rows.limit[:, None]
    moving = (inside & ~rows.given)[..., None]
    assert state.done.all() and (state.filled == inside).all()
    np.testing.assert_array_equal(state.events[rows.given], rows.events[rows.given])
    begun = x.copy()
    for step in range(STEPS):
        velocity = velocity_in_row(
            model, flow_weights(), state.events, x, inside.astype(np.int32), rows.size
        )
        t = np.full((ROWS, SLOTS, 1), 1 - (step + 1) / STEPS, np.float32)
        moved = np.concatenate([x[..., :-1] - np.asarray(velocity) / STEPS, t], axis=-1)
        x = np.where(moving, moved, x)
    np.testing.assert_allclose(np.where(inside[..., None], x - state.events, 0), 0, atol=2e-5)
    assert np.abs(np.where(moving, x - begun, 0)).max() > 0.1
    blocks = -(-rows.limit // rows.size) - rows.prompt // rows.size
    commits = 0 if fused else blocks - 1
    np.testing.assert_array_equal(state.forwards, blocks * STEPS + commits)


# What only a network does: products, rotations, normalisations, softmax and activations.
NETWORK = {"dot_general", "cos", "sin", "exp", "exp2", "rsqrt", "sqrt", "logistic", "tanh"}
CALLS = {"block_step", "readout_nll", "readout_stats"}


class Walk:
    """Reads a jaxpr down to its leaves: named calls met, network primitives outside of them, and
    operations outside of them that consume watched variables."""

    def __init__(self, inside: bool = False):
        self.calls, self.outside, self.consumers, self.inside = [], [], [], inside

    def visit(self, jaxpr, watched=frozenset()):
        for equation in jaxpr.eqns:
            name = equation.params.get("name")
            if name in CALLS and not self.inside:
                self.calls.append(name)
                continue
            inner = list(bodies(equation))
            read = {v for v in equation.invars if isinstance(v, Var) and v in watched}
            if not inner:
                if equation.primitive.name in NETWORK:
                    self.outside.append(equation.primitive.name)
                if read:
                    self.consumers.append(equation.primitive.name)
            for body in inner:
                # Operands of a call line up with its body from the right: a conditional's index
                # and a while loop's other constants stand before them.
                pairs = zip(reversed(equation.invars), reversed(body.invars), strict=False)
                if equation.primitive.name == "while":
                    pairs = while_pairs(equation, body)
                self.visit(body, frozenset(i for o, i in pairs if isinstance(o, Var) and o in read))
        return self


def bodies(equation):
    """The jaxprs an equation carries."""
    for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
        if hasattr(value, "jaxpr"):
            value = value.jaxpr
        if hasattr(value, "eqns"):
            yield value


def while_pairs(equation, body):
    """Operands of a while loop with the variables of its condition or body."""
    in_cond, in_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    carry = equation.invars[in_cond + in_body :]
    is_body = body is equation.params["body_jaxpr"].jaxpr
    constants = equation.invars[in_cond:][:in_body] if is_body else equation.invars[:in_cond]
    return zip([*constants, *carry], body.invars, strict=True)


def walk(function, *arguments, params_at: int) -> Walk:
    """`function`'s jaxpr, watching the trunk's parameters in argument number `params_at`."""
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = [jax.tree_util.tree_flatten_with_path(a)[0] for a in arguments]
    flat = [(n, path) for n, argument in enumerate(leaves) for path, _ in argument]
    trunk = tiny().decoder.table()
    watched = {
        variable
        for variable, (n, path) in zip(closed.jaxpr.invars, flat, strict=True)
        if n == params_at and path[0].key in trunk
    }
    assert len(watched) == len(jax.tree.leaves({k: weights()[k] for k in trunk}))
    return Walk().visit(closed.jaxpr, frozenset(watched))


def check_structure(found: Walk, calls: set):
    assert set(found.calls) == calls
    assert found.outside == [] and found.consumers == []


@pytest.mark.parametrize("alignment", Alignment, ids=lambda a: a.value)
def test_training_calls_the_network_through_the_step_alone(alignment):
    """In the jaxpr of loss and gradient nothing of the network stands outside the named calls."""
    plan = Objective(
        process=Absorbing(mask_id=MASK),
        block_size=BlockSize(first=BLOCK),
        ar_weight=0.5,
        alignment=alignment,
    )

    def loss(params, batch):
        return total(plan, losses(plan, tiny(), params, batch, BLOCK, jax.random.key(0)))

    found = walk(jax.value_and_grad(loss), weights(), batch(), params_at=0)
    check_structure(found, {"block_step", "readout_nll"})


@pytest.mark.parametrize("fused", [True, False])
def test_sampling_calls_the_network_through_the_step_alone(fused):
    """The same of `start` and `advance`, fused and separate."""
    plan, key = sampler(fused=fused), jax.random.key(KEY)
    request, control = mixed_rows().request(), controls()
    begin = lambda params: start(plan, params, request, control, key, PREFILL)  # noqa: E731
    check_structure(walk(begin, weights(), params_at=0), {"block_step"})
    state = jax.eval_shape(begin, weights())
    onward = lambda params, state: advance(plan, params, state, UNLIMITED)  # noqa: E731
    found = walk(onward, weights(), state, params_at=0)
    check_structure(found, {"block_step", "readout_stats"})
    assert found.calls.count("block_step") == (2 if fused else 1)  # fused: with or without a commit


def test_the_walk_sees_what_it_looks_for():
    """The same walk finds the network where it is: inside the step, and in a loop around it."""
    tokens = batch().tokens
    places = places_of(objective(), batch(), BLOCK)
    step = lambda params: block_step(tiny(), params, tokens, places)[0]  # noqa: E731
    closed = jax.make_jaxpr(step)(weights())
    assert {"dot_general", "cos", "sin", "exp", "rsqrt", "logistic"} <= set(
        Walk(inside=True).visit(closed.jaxpr).outside
    )

    def stray(params, n):
        norm = params["final_norm"]
        return jax.lax.fori_loop(0, n, lambda i, x: x + jnp.dot(norm, norm) * i, 0.0)

    found = walk(stray, weights(), jnp.int32(3), params_at=0)
    assert found.outside == ["dot_general"] and "dot_general" in found.consumers
