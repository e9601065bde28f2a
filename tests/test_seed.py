"""Fast-dLLM v2's seed: the first token of a block comes out of the commit before it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import MASK, PREFILL, SLOTS, controls, tiny, weights

from bdjax.layout import Places
from bdjax.noise import Absorbing
from bdjax.objective import Alignment
from bdjax.policies import Static
from bdjax.sampler import UNLIMITED, Request, Sampler, advance, start
from bdjax.step import block_step
from pallas_kernels import CleanMode

BLOCK, ROWS = 4, 4
# Prompts that end inside a block, at its end, and in the first one.
PROMPTS, LIMITS = np.array([1, 4, 6, 8]), np.array([12, 14, 20, 20])


@pytest.fixture(scope="module")
def written():
    """The last state of four rows, written greedily, one token a step."""
    model = tiny(CleanMode.BLOCK)
    sampler = Sampler(
        model=model,
        process=Absorbing(mask_id=MASK),
        canvas=BLOCK,
        alignment=Alignment.SHIFTED_NOISY,
        fused=False,
    )
    at = np.arange(SLOTS)
    given = at < PROMPTS[:, None]
    events = np.random.default_rng(5).integers(0, MASK, (ROWS, SLOTS)).astype(np.int32)
    request = Request(
        *(
            jnp.asarray(x, jnp.int32 if x.dtype != bool else bool)
            for x in (events, given, PROMPTS, LIMITS, np.full(ROWS, BLOCK), np.arange(ROWS))
        )
    )
    policy = Static(steps=BLOCK)
    control = controls(policy=policy, temperature=0.0, rows=ROWS)
    state = start(sampler, weights(), request, control, jax.random.key(0), PREFILL)
    state = advance(sampler, weights(), state, UNLIMITED)._replace(keys=None)
    return model, jax.tree.map(np.asarray, state)


@partial(jax.jit, static_argnames="model")
def logits_of(model, params, tokens, places):
    hidden, _ = block_step(model, params, tokens, places)
    logits = hidden @ model.readout.matrix(params, hidden.dtype).T
    return jax.nn.log_softmax(logits.at[..., MASK].set(-1e30))


def test_the_first_token_of_a_block_is_named_by_the_clean_token_before_it(written):
    model, state = written
    tokens = jnp.asarray(state.events)
    at = jnp.broadcast_to(jnp.arange(SLOTS), tokens.shape)
    segment = (at < LIMITS[:, None]).astype(jnp.int32)
    clean = Places(at * 0, segment, at // BLOCK, at, at)
    said = np.asarray(logits_of(model, weights(), tokens, clean))
    seeds = 0
    for row in range(ROWS):
        for begin in range(BLOCK, LIMITS[row], BLOCK):
            if begin < PROMPTS[row]:
                continue
            seeds += 1
            assert state.events[row, begin] == said[row, begin - 1].argmax()
            assert state.record.step[row, begin] == 0
            raw = state.record.logprob_raw[row, begin]
            np.testing.assert_allclose(raw, said[row, begin - 1].max(), atol=1e-4)
    assert seeds == 2 + 3 + 3 + 3


def test_the_rest_of_a_block_is_denoised_with_its_seed_in_place(written):
    """The first forward of a block sees the seed: it fills what such a window names."""
    model, state = written
    record = state.record
    for row, begin in ((1, 4), (2, 8), (3, 12)):
        here = slice(begin, begin + BLOCK)
        first = np.flatnonzero(record.step[row, here] == 0)
        assert first[0] == 0 and len(first) == 2
        tokens = state.events[row].copy()
        tokens[begin + 1 : begin + BLOCK] = MASK
        at = np.arange(begin + BLOCK)
        stream = (at >= begin).astype(np.int32)
        places = Places(*(jnp.asarray(x[None]) for x in (stream, at * 0 + 1, at // BLOCK, at, at)))
        said = logits_of(model, weights(), jnp.asarray(tokens[None, : begin + BLOCK]), places)
        slot = begin + first[1]
        assert np.asarray(said)[0, slot - 1].argmax() == state.events[row, slot]


def test_a_seeded_block_takes_a_forward_less(written):
    _, state = written
    for row in range(ROWS):
        denoising = 0
        for begin in range(0, LIMITS[row], BLOCK):
            end = min(begin + BLOCK, LIMITS[row])
            open_ = end - max(begin, PROMPTS[row])
            seeded = begin > 0 and begin >= PROMPTS[row]
            denoising += max(open_ - seeded, 1 if open_ > 0 else 0)
        assert state.forwards[row] - state.commits[row] == denoising
