"""The loop: what it may change, what it must not depend on, and what it costs."""

import re
from functools import cache, partial
from itertools import pairwise
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import (
    BLOCK,
    DENSE,
    KEY,
    MASK,
    PREFILL,
    ROWS,
    RULES,
    SLOTS,
    STOP,
    TEMPERATURE,
    TILES,
    VOCAB,
    Rows,
    begin,
    controls,
    finish,
    host,
    infilled_rows,
    mixed_rows,
    oracle,
    sampled,
    sampler,
    tiny,
    weights,
    zoo,
)

from bdjax.embedding import TokenEmbedding
from bdjax.layout import Places
from bdjax.model import DecoderConfig, Remat
from bdjax.noise import Absorbing
from bdjax.objective import Alignment
from bdjax.policies import Threshold
from bdjax.readout import Shaping, TokenReadout
from bdjax.sampler import UNLIMITED, Controls, Request, Sampler, advance, start
from bdjax.sharding import make_mesh, reshard
from bdjax.step import Model, block_step
from pallas_kernels import Blockwise, CleanMode

POSITION = np.arange(SLOTS)
SHIFTED = Alignment.SHIFTED_CLEAN
# (clean mode, fused, alignment, attention) of the shared runs.
RUNS = [
    (CleanMode.TOKEN, True, Alignment.SAME_POSITION, DENSE),
    (CleanMode.TOKEN, False, Alignment.SAME_POSITION, DENSE),
    (CleanMode.BLOCK, True, Alignment.SAME_POSITION, TILES),
    (CleanMode.BLOCK, False, Alignment.SAME_POSITION, DENSE),
    (CleanMode.TOKEN, True, SHIFTED, DENSE),
    (CleanMode.TOKEN, False, SHIFTED, DENSE),
]


def named(x):
    return type(x).__name__ if x in (DENSE, TILES) else str(getattr(x, "value", x))


every_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(named, run)))


def kind(name):
    """Rows of the default `zoo` that follow a rule."""
    return np.arange(ROWS) % len(RULES) == RULES.index(name)


def inside(rows: Rows):
    return rows.limit[:, None] > POSITION


def blocks_of(rows: Rows):
    """(N, S): the block of every position."""
    return POSITION // rows.size[:, None]


def steps_used(state, rows: Rows):
    """(N, blocks): denoising steps of each block, from the record."""
    table = np.zeros((ROWS, SLOTS), int)
    for n, s in zip(*np.nonzero(state.record.step >= 0), strict=True):
        block = blocks_of(rows)[n, s]
        table[n, block] = max(table[n, block], state.record.step[n, s] + 1)
    return table


@every_run
def test_every_step_writes_and_everything_gets_written(run):
    """Each denoising forward of a row writes at least one masked slot, until exactly the slots
    below the limit are filled. The mask is never written and given tokens stay."""
    state, rows = sampled(*run), mixed_rows()
    assert state.done.all()
    np.testing.assert_array_equal(state.filled, inside(rows))
    assert not (state.events[inside(rows)] == MASK).any()
    assert (state.events[~inside(rows)] == MASK).all()
    assert ((state.events >= 0) & (state.events < VOCAB)).all()
    np.testing.assert_array_equal(state.events[rows.given], rows.events[rows.given])
    np.testing.assert_array_equal(state.record.step >= 0, inside(rows) & ~rows.given)
    used = steps_used(state, rows)
    for n in range(ROWS):
        for block in np.flatnonzero(used[n]):
            steps = state.record.step[n, blocks_of(rows)[n] == block]
            assert set(range(used[n, block])) <= set(steps.tolist())
    np.testing.assert_array_equal(state.forwards - state.commits, used.sum(axis=1))


@partial(jax.jit, static_argnames="model")
def clean_pass(model, params, tokens, length, size):
    """The clean stream of every row: hidden states, keys and values."""
    at = jnp.arange(SLOTS) + length[:, None] * 0
    segment = (at < length[:, None]).astype(jnp.int32)
    return block_step(model, params, tokens, Places(at * 0, segment, at // size[:, None], at, at))


@every_run
def test_committed_keys_are_those_of_a_prefill(run):
    """After the loop the cache holds what one clean pass over the same tokens gives, 1e-5, up to
    the last canvas, which nobody needs."""
    state, rows = sampled(*run), mixed_rows()
    np.testing.assert_array_equal(state.cache.length, state.block * rows.size)
    assert (state.cache.length > rows.prompt).sum() > ROWS // 2
    model = tiny(run[0])
    _, clean = clean_pass(model, weights(), state.events, rows.limit, rows.size)
    held = state.cache.length[:, None] > POSITION
    np.testing.assert_array_equal(state.cache.block[held], blocks_of(rows)[held])
    for got, wanted in zip(state.cache[:2], clean, strict=True):
        got = got.swapaxes(2, 3)
        np.testing.assert_allclose(got[:, held], np.asarray(wanted)[:, held], atol=1e-5)
        assert not got[:, ~held].any()


@pytest.mark.parametrize("one, other", [RUNS[0:2], RUNS[2:4], RUNS[4:6]], ids=str)
def test_fused_commit_writes_the_same_and_saves_a_forward_per_block(one, other):
    """Exactly one forward less for every block that another block follows."""
    fused, separate, rows = sampled(*one), sampled(*other), mixed_rows()
    np.testing.assert_array_equal(fused.events, separate.events)
    np.testing.assert_array_equal(fused.record.step, separate.record.step)
    np.testing.assert_allclose(fused.record.entropy, separate.record.entropy, atol=2e-5)
    followed = -(-rows.limit // rows.size) - 1 - rows.prompt // rows.size
    np.testing.assert_array_equal(fused.commits, 0)
    np.testing.assert_array_equal(separate.commits, followed)
    np.testing.assert_array_equal(separate.forwards - fused.forwards, followed)


def test_fusing_refuses_models_that_read_a_separate_commit():
    with pytest.raises(ValueError, match="type fused=False"):
        sampler(fused=True, alignment=Alignment.SHIFTED_NOISY)
    sampler(fused=False, alignment=Alignment.SHIFTED_NOISY)


@cache
def watched(fused: bool, stop: int):
    """Every state of the default run, one forward at a time."""
    plan, control = sampler(fused=fused), controls(temperature=TEMPERATURE, stop=stop)
    state = begin(plan, mixed_rows(), control)
    states = [host(state)]
    while not states[-1].done.all():
        state = advance(plan, weights(), state, 1)
        states.append(host(state))
    return states


def equal_bitwise(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("fused", [True, False])
def test_streaming_equals_one_call(fused):
    """Many calls with a budget of one forward end bitwise where one unlimited call ends."""
    equal_bitwise(watched(fused, -1)[-1], sampled(fused=fused))
    assert len(watched(fused, -1)) - 1 == sampled(fused=fused).forwards.max()


@pytest.mark.parametrize("fused, stop", [(True, -1), (False, -1), (True, STOP)])
def test_what_is_written_stays(fused, stop):
    """Filled slots, their records, committed keys and finished rows never change again."""
    for before, after in pairwise(watched(fused, stop)):
        filled = before.filled
        assert (after.filled >= filled).all()
        np.testing.assert_array_equal(after.events[filled], before.events[filled])
        for old, new in zip(before.record, after.record, strict=True):
            np.testing.assert_array_equal(new[filled], old[filled])
        held = before.cache.length[:, None] > POSITION
        assert (after.cache.length >= before.cache.length).all()
        for old, new in zip(before.cache[:2], after.cache[:2], strict=True):
            np.testing.assert_array_equal(new.swapaxes(2, 3)[:, held], old.swapaxes(2, 3)[:, held])
        done = before.done
        assert (after.done >= done).all()
        for name in ("events", "filled", "block", "forwards", "commits"):
            np.testing.assert_array_equal(getattr(after, name)[done], getattr(before, name)[done])
        np.testing.assert_array_equal(after.forwards[~done], before.forwards[~done] + 1)


def test_canvases_stay_inside_the_block_and_the_limit():
    """A forward changes slots of the row's current block alone, below its limit."""
    rows = mixed_rows()
    for before, after in pairwise(watched(True, -1)):
        changed = after.filled & ~before.filled
        assert (blocks_of(rows) == before.block[:, None])[changed].all()
        assert inside(rows)[changed].all()


def test_a_stop_token_ends_the_row_with_its_block():
    """Rows end when the block that holds a stop id at or after the prompt is full. Up to there they
    are what they would have been; afterwards nothing is written and nothing is spent."""
    rows, whole, stopped = mixed_rows(), watched(True, -1)[-1], watched(True, STOP)[-1]
    hit = (whole.events == STOP) & (rows.prompt[:, None] <= POSITION) & inside(rows)
    first = np.where(hit.any(axis=1), np.where(hit, blocks_of(rows), SLOTS).min(axis=1), SLOTS)
    kept = inside(rows) & (blocks_of(rows) <= first[:, None])
    np.testing.assert_array_equal(stopped.filled, kept)
    np.testing.assert_array_equal(stopped.events, np.where(kept, whole.events, MASK))
    used = steps_used(whole, rows) * (first[:, None] >= POSITION)
    np.testing.assert_array_equal(stopped.forwards, used.sum(axis=1))
    first_canvas = blocks_of(rows) == (rows.prompt // rows.size)[:, None]
    in_prompt = (rows.events == STOP) & rows.given
    for prompted in (in_prompt & first_canvas, in_prompt & ~first_canvas):
        assert (prompted.any(axis=1) & (stopped.block > rows.prompt // rows.size)).any()
    assert 0 < (first < SLOTS).sum() < ROWS and (whole.forwards > stopped.forwards).any()


def pick(index) -> tuple[Rows, Controls]:
    """Some of the default rows with their own rules and temperatures."""
    index = np.asarray(index)
    policy = zoo(kind=index % len(RULES), rows=len(index))
    return mixed_rows().take(index), controls(policy, TEMPERATURE[index], rows=len(index))


def test_a_row_does_not_depend_on_its_neighbours():
    """Any order, any neighbours, alone, and whatever length the prefill is padded to."""
    wanted = sampled()
    index = np.random.default_rng(3).integers(0, ROWS, ROWS)
    got = finish(sampler(), *pick(index))
    np.testing.assert_array_equal(got.events, wanted.events[index])
    np.testing.assert_array_equal(got.record.step, wanted.record.step[index])
    np.testing.assert_array_equal(got.forwards, wanted.forwards[index])
    for row in (4, 6, 7, 12):  # prompts of 5 to 8 tokens: one to three blocks prefilled
        got = finish(sampler(), *pick([row]), prefill=8)
        np.testing.assert_array_equal(got.events[0], wanted.events[row])
        np.testing.assert_array_equal(got.record.step[0], wanted.record.step[row])
        raw = got.record.logprob_raw[0]
        np.testing.assert_allclose(raw, wanted.record.logprob_raw[row], atol=1e-5)


@pytest.mark.parametrize("alignment", [Alignment.SAME_POSITION, SHIFTED], ids=named)
def test_an_empty_prompt_does_not_see_how_long_the_prefill_is(alignment):
    """A batch-mate's long prompt makes the prefill longer, not another text."""
    rows = mixed_rows()
    rows = rows._replace(prompt=rows.prompt * 0, given=rows.given & False)
    outcomes = [
        finish(sampler(alignment=alignment), rows, controls(), prefill=n) for n in (0, PREFILL)
    ]
    np.testing.assert_array_equal(outcomes[0].events, outcomes[1].events)


def test_row_ids_keep_noise_apart():
    """Rows with equal prompts write different texts, unless they share a row id."""
    rows = mixed_rows().take([1] * ROWS)._replace(row=np.arange(ROWS) % 12)
    got = finish(sampler(), rows, controls(zoo(kind=1)))
    texts = {tuple(text) for text in got.events[:12].tolist()}
    assert len(texts) == 12
    np.testing.assert_array_equal(got.events[12:], got.events[:4])
    other = host(
        advance(
            sampler(),
            weights(),
            start(
                sampler(),
                weights(),
                rows.request(),
                controls(zoo(kind=1)),
                jax.random.key(KEY + 1),
                PREFILL,
            ),
            UNLIMITED,
        )
    )
    assert (other.events != got.events).any(axis=1).all()


def test_given_tokens_stay_and_are_seen():
    """Given tokens anywhere below the limit stay; their canvas sees them, earlier blocks do not."""
    rows = infilled_rows()
    state = sampled(infilled=True)
    assert (rows.given & (rows.prompt[:, None] <= POSITION)).sum() > ROWS
    np.testing.assert_array_equal(state.events[rows.given], rows.events[rows.given])
    assert (state.record.step[rows.given] == -1).all()
    assert state.done.all() and (state.filled == inside(rows)).all()

    # One more token is given, in the third block of every row; its value is changed.
    at = rows.size * (rows.prompt // rows.size + 2) + rows.size // 2
    here = np.where(at < rows.limit, at, SLOTS)[:, None] == POSITION
    outcomes = []
    for value in (3, 4):
        events = np.where(here, value, rows.events)
        edited = rows._replace(events=events, given=rows.given | here)
        outcomes.append(finish(sampler(), edited, controls(temperature=TEMPERATURE)))
    one, other = outcomes
    earlier = blocks_of(rows) < (at // rows.size)[:, None]
    np.testing.assert_array_equal(one.events[earlier], other.events[earlier])
    np.testing.assert_array_equal(one.record.entropy[earlier], other.record.entropy[earlier])
    same_canvas = (blocks_of(rows) == (at // rows.size)[:, None]) & here.any(axis=1)[:, None]
    # Entropies at a block's first step see the same canvas but for the edited token.
    first = same_canvas & (one.record.step == 0) & (other.record.step == 0)
    assert first.sum() > 10
    assert (np.abs(one.record.entropy - other.record.entropy)[first] > 1e-4).all()


@every_run
def test_records(run):
    """Step -1 and zeros where nothing was drawn. At temperature 1 without filters a token is drawn
    from the model's own distribution; at temperature 0 it is drawn with certainty."""
    state, rows = sampled(*run), mixed_rows()
    drawn = inside(rows) & ~rows.given
    record = state.record
    assert (record.step[~drawn] == -1).all() and (record.step[drawn] < BLOCK).all()
    for values in record[1:]:
        assert (values[~drawn] == 0).all()
    assert (record.entropy[drawn] >= 0).all() and (record.entropy[drawn] <= log(VOCAB - 1)).all()
    assert (record.logprob_raw[drawn] < 0).all()
    plain = drawn & (TEMPERATURE == 1)[:, None]
    np.testing.assert_allclose(
        record.logprob_drawn[plain], record.logprob_raw[plain], atol=1e-5, rtol=1e-5
    )
    assert (record.logprob_drawn[drawn & (TEMPERATURE == 0)[:, None]] == 0).all()
    sharper = drawn & (np.float32(0.7) == TEMPERATURE)[:, None]
    assert (np.abs(record.logprob_drawn - record.logprob_raw)[sharper] > 1e-4).all()


def test_one_compilation_for_every_number():
    """Rules, thresholds, temperatures, top-k, top-p, stop ids, prompts, limits, block sizes, row
    ids and budgets may all change: `start` and `advance` compile once."""
    plan, rows = sampler(), mixed_rows()
    smaller = rows._replace(size=np.maximum(rows.size - 1, 1))
    tighter = rows._replace(limit=np.minimum(rows.limit, 15))
    shorter = rows._replace(
        prompt=np.maximum(rows.prompt - 1, 1),
        given=np.maximum(rows.prompt - 1, 1)[:, None] > POSITION,
        row=rows.row + 100,
    )
    sweep = [
        (rows, controls(top_k=VOCAB, top_p=1.0), UNLIMITED),
        (rows, controls(top_k=3, top_p=1.0), UNLIMITED),
        (rows, controls(top_k=VOCAB, top_p=np.linspace(0.1, 1, ROWS)), UNLIMITED),
        (rows, controls(zoo(threshold=0.8), 0.5, VOCAB, 1.0), UNLIMITED),
        (rows, controls(zoo(steps=3, budget=0.2), 0.0, VOCAB, 1.0), UNLIMITED),
        (rows, controls(top_k=VOCAB, top_p=1.0, stop=STOP), 5),
        (smaller, controls(top_k=VOCAB, top_p=1.0), UNLIMITED),
        (tighter, controls(top_k=VOCAB, top_p=1.0), UNLIMITED),
        (shorter, controls(top_k=VOCAB, top_p=1.0), UNLIMITED),
    ]
    outcomes, sizes = [], []
    for request, control, budget in sweep:
        state = begin(plan, request, control)
        outcomes.append(host(advance(plan, weights(), state, jnp.int32(budget))))
        sizes.append((start._cache_size(), advance._cache_size()))
    assert set(sizes) == {sizes[0]}
    texts = {outcome.events.tobytes() for outcome in outcomes}
    assert len(texts) == len(sweep)  # every number had an effect

    free, narrow, nucleus = (outcome.record for outcome in outcomes[:3])
    drawn = inside(rows) & ~rows.given
    np.testing.assert_array_equal(  # a filter that keeps everything draws what no filter draws
        outcomes[0].events, finish(plan, rows, controls()).events
    )
    np.testing.assert_allclose(free.logprob_drawn[drawn], free.logprob_raw[drawn], atol=1e-5)
    for record in (narrow, nucleus):
        assert (record.logprob_drawn[drawn] >= record.logprob_raw[drawn] - 1e-5).all()
    gained = narrow.logprob_drawn - narrow.logprob_raw
    assert (gained[drawn] > 1e-3).mean() > 0.9


def test_block_size_one_is_autoregressive_sampling():
    """Read from the clean token before, blocks of one token make any rule the AR sampler of the
    clean stream: greedy at temperature 0, the same draws from the same noise above."""
    rows = mixed_rows()._replace(size=np.ones(ROWS, int))
    model, params = tiny(), weights()
    got = finish(
        sampler(alignment=SHIFTED),
        rows,
        controls(temperature=TEMPERATURE),
    )

    @jax.jit
    def next_token(tokens, at):
        """One AR step on the prefix of `at` tokens, by the step and the readout alone."""
        length = at + jnp.zeros(ROWS, jnp.int32)
        hidden, _ = clean_pass(model, params, tokens, length, jnp.ones(ROWS, jnp.int32))
        last = jax.lax.dynamic_slice_in_dim(hidden, at - 1, 1, axis=1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(KEY), rows.row)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        shaping = Shaping(jnp.asarray(TEMPERATURE)[:, None])
        stats = model.readout.stats(params, last, shaping, keys[:, None])
        return stats.token[:, 0], stats.logprob_raw[:, 0]

    tokens, raw = np.where(rows.given, rows.events, 0), np.zeros((ROWS, SLOTS))
    for at in range(1, SLOTS):
        token, logprob = next_token(tokens, at)
        write = (at >= rows.prompt) & (at < rows.limit)
        tokens[:, at] = np.where(write, token, tokens[:, at])
        raw[:, at] = np.where(write, logprob, 0)
    np.testing.assert_array_equal(np.where(inside(rows), got.events, 0), tokens)
    np.testing.assert_allclose(got.record.logprob_raw, raw, atol=2e-5)
    np.testing.assert_array_equal(got.forwards, rows.limit - rows.prompt)


@pytest.mark.parametrize("fused", [True, False])
def test_an_oracle_denoiser_is_obeyed_by_every_rule(fused):
    """A network that knows the answer x*: every rule returns x*, those that follow confidence or
    entropy in one forward per block."""
    rows, plan = mixed_rows(), sampler(fused=fused)
    answer = np.random.default_rng(7).integers(0, MASK, (ROWS, SLOTS))
    state = begin(plan, rows, controls(zoo(threshold=0.9, steps=BLOCK, budget=0.1)), oracle(20.0))
    secret = jnp.where(state.filled, state.events, VOCAB + answer)  # masks that hide nothing
    state = host(advance(plan, oracle(20.0), state._replace(events=secret), UNLIMITED))
    wanted = np.where(rows.given, rows.events, answer)
    np.testing.assert_array_equal(state.events[inside(rows)], wanted[inside(rows)])
    blocks = -(-rows.limit // rows.size) - rows.prompt // rows.size
    at_once = kind("dynamic") | kind("threshold") | kind("eb") | kind("sdar")
    np.testing.assert_array_equal((state.forwards - state.commits)[at_once], blocks[at_once])
    slow = kind("static") | kind("sequential") | kind("random")
    tokens = rows.limit - rows.prompt
    np.testing.assert_array_equal((state.forwards - state.commits)[slow], tokens[slow])


def test_a_uniform_denoiser_is_never_sure():
    """All distributions uniform over V ids: above 1/V a threshold, and below ln V an entropy
    budget, writes one slot a step; below 1/V and from (B - 1) ln V on one step is enough."""
    rows, v = mixed_rows(), VOCAB - 1
    tokens = rows.limit - rows.prompt
    blocks = -(-rows.limit // rows.size) - rows.prompt // rows.size
    strict = zoo(threshold=1.01 / v, steps=BLOCK, budget=0.99 * log(v))
    state = finish(sampler(), rows, controls(strict), oracle(0.0))
    np.testing.assert_array_equal(state.forwards, tokens)
    drawn = inside(rows) & ~rows.given
    np.testing.assert_allclose(state.record.entropy[drawn], log(v), atol=1e-5)
    np.testing.assert_allclose(state.record.logprob_raw[drawn], -log(v), atol=1e-5)
    counts = np.bincount(state.events[drawn], minlength=VOCAB)[:v]
    expected = drawn.sum() / v
    assert ((counts - expected) ** 2 / expected).sum() < 42.3  # 99.9 % of 18 degrees of freedom
    lenient = zoo(threshold=0.99 / v, steps=BLOCK, budget=(BLOCK - 1) * log(v) + 0.01)
    state = finish(sampler(), rows, controls(lenient), oracle(0.0))
    sure = kind("dynamic") | kind("threshold") | kind("eb")
    np.testing.assert_array_equal(state.forwards[sure], blocks[sure])
    assert (state.forwards[kind("random")] == tokens[kind("random")]).all()


@pytest.mark.parametrize(
    "data, tensor",
    [
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(8, 1, marks=pytest.mark.slow),
        (4, 2),
    ],
)
def test_any_mesh_writes_the_same(data, tensor):
    """Rows, heads and vocabulary split over devices give the tokens of one device."""
    # First, so that the weights, which other tests share, are made on one device.
    wanted = sampled()
    with jax.set_mesh(make_mesh(data=data, tensor=tensor)):
        params = jax.tree.map(lambda p, x: reshard(x, *p.axes), tiny().table(), weights())
        got = finish(sampler(), mixed_rows(), controls(temperature=TEMPERATURE), params)
    np.testing.assert_array_equal(got.events, wanted.events)
    np.testing.assert_array_equal(got.record.step, wanted.record.step)
    np.testing.assert_allclose(got.record.logprob_raw, wanted.record.logprob_raw, atol=2e-5)


BIG = {"rows": 4, "slots": 4096, "canvas": 32, "vocab": 5003, "layers": 8}


@cache
def compiled_at_size():
    """`advance` of a long cache, compiled for shapes alone."""
    model = Model(
        decoder=DecoderConfig(
            num_layers=BIG["layers"],
            width=256,
            num_heads=8,
            num_kv_heads=4,
            head_dim=64,
            mlp_width=512,
            dtype="float32",
            remat=Remat.NONE,
            attention=Blockwise(),
        ),
        embedding=TokenEmbedding(vocab_size=BIG["vocab"], width=256, dtype="float32"),
        readout=TokenReadout(vocab_size=BIG["vocab"], width=256, vocab_chunk=512),
    )
    plan = Sampler(model=model, process=Absorbing(mask_id=MASK), canvas=BIG["canvas"])
    n, s = BIG["rows"], BIG["slots"]
    shape = jax.ShapeDtypeStruct
    integers = [shape((n,), jnp.int32)] * 4
    request = Request(shape((n, s), jnp.int32), shape((n, s), bool), *integers)
    control = Controls(
        Threshold(threshold=0.9), shape((n,), jnp.float32), None, None, None, jnp.zeros((1,), int)
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(partial(start, plan, prefill=0), params, request, control, key)
    cache_bytes = sum(x.size * x.dtype.itemsize for x in state.cache[:2])
    return advance.lower(plan, params, state, UNLIMITED).compile(), cache_bytes


def test_the_cache_is_never_copied():
    """Temporaries of the whole loop stay under 15 % of the cache that it updates in place."""
    compiled, cache_bytes = compiled_at_size()
    memory = compiled.memory_analysis()
    assert cache_bytes == 2 * 8 * 4 * 4096 * 4 * 64 * 4
    print("temporaries / cache:", memory.temp_size_in_bytes / cache_bytes)
    assert memory.temp_size_in_bytes < 0.15 * cache_bytes
    assert memory.alias_size_in_bytes > cache_bytes


def test_nothing_of_size_queries_by_keys_or_rows_by_vocabulary_exists():
    """In the compiled text an axis as long as the cache belongs to the cache or to one number per
    row and slot; an axis as long as the vocabulary belongs to the embedding or the head."""
    compiled, _ = compiled_at_size()
    found = {
        tuple(int(n) for n in dims.split(","))
        for dims in re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
    }
    n, s, v = BIG["rows"], BIG["slots"], BIG["vocab"]
    long = {dims for dims in found if s in dims}
    assert (BIG["layers"], n, 4, s, 64) in long
    for dims in long:
        assert dims[0] == BIG["layers"] or np.prod(dims) <= 2 * n * s, dims
    wide = {dims for dims in found if v in dims}
    assert (v, 256) in wide
    assert all(np.prod(dims) <= v * 256 and dims in {(v, 256), (256, v), (v,)} for dims in wide)
