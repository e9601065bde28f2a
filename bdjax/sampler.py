"""The denoising loop: one flat while loop in which one iteration is one forward pass.

Every row goes through its blocks by itself. With fused commit a row's window holds the block it has
just finished (clean, to be written to the cache) and its next canvas; with separate commit the
finished block gets a forward of its own. Blocks to the right of the canvas do not exist yet: given
tokens inside a canvas are seen by it, given tokens further right only when their block comes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax import cache as caches
from bdjax import sharding
from bdjax.cache import Cache
from bdjax.layout import Places, join, join_places, window_places
from bdjax.objective import Alignment
from bdjax.policies import Policy, View
from bdjax.readout import Shaping
from bdjax.step import Model, block_step

UNLIMITED = jnp.iinfo(jnp.int32).max


class Controls(NamedTuple):
    """What may change between calls without a recompilation.

    temperature, top_k, top_p: per row. bias: on the logits. stop: ids that end a row.
    """

    policy: Policy
    temperature: Float[Array, "N"]
    top_k: Int[Array, "N"] | None
    top_p: Float[Array, "N"] | None
    bias: Float[Array, "V"] | None
    stop: Int[Array, "n"]


class Record(NamedTuple):
    """Per position: denoising step of its block at which it was filled (-1: given or not yet),
    entropy before that, log-probability at temperature 1 and under the distribution drawn from.
    """

    step: Int[Array, "N S"]
    entropy: Float[Array, "N S"]
    logprob_raw: Float[Array, "N S"]
    logprob_drawn: Float[Array, "N S"]


class Request(NamedTuple):
    """Rows to write. events (N, S): prompts and other given tokens; given (N, S) says which.

    prompt: length of the unbroken prefix that counts as the prompt. limit: total length at most.
    size: block size. row: the caller's row id, which the noise is keyed by.
    """

    events: Array
    given: Bool[Array, "N S"]
    prompt: Int[Array, "N"]
    limit: Int[Array, "N"]
    size: Int[Array, "N"]
    row: Int[Array, "N"]


class State(NamedTuple):
    """The loop's carry, one row per request; donated and returned by `advance`.

    pending: the block before the canvas is finished but not in the cache. carry: hidden state of
    the last clean token before the canvas. forwards and commits count what the row has used.
    """

    events: Array
    filled: Bool[Array, "N S"]
    prompt: Int[Array, "N"]
    limit: Int[Array, "N"]
    size: Int[Array, "N"]
    block: Int[Array, "N"]
    step: Int[Array, "N"]
    pending: Bool[Array, "N"]
    done: Bool[Array, "N"]
    carry: Float[Array, "N D"]
    cache: Cache
    keys: Key[Array, "N"]
    forwards: Int[Array, "N"]
    commits: Int[Array, "N"]
    record: Record
    controls: Controls


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What is fixed per compilation. canvas: slots per window, at least the largest block size."""

    model: Model
    process: Any
    canvas: int
    alignment: Alignment = Alignment.SAME_POSITION
    fused: bool = True

    def __post_init__(self):
        if self.fused and self.alignment is Alignment.SHIFTED_NOISY:
            raise ValueError(
                "alignment=shifted_first_noisy takes a block's first token out of a separate "
                "commit; type fused=False"
            )


def _at(x: Array, index: Int[Array, "N W"]) -> Array:
    """x[n, index[n, w]], clipped to the row."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(x, index)


def _put(x: Array, index: Int[Array, "N W"], value: Array, where: Bool[Array, "N W"]) -> Array:
    """x with x[n, index[n, w]] = value[n, w] at the slots `where`."""
    index = jnp.where(where, index, x.shape[1])
    return jax.vmap(lambda row, i, v: row.at[i].set(v, mode="drop"))(x, index, value)


def _wide(mask: Array, like: Array) -> Array:
    """mask with trailing axes, to broadcast against events of any rank."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))


@partial(jax.jit, static_argnames=("sampler", "prefill"))
def start(
    sampler: Sampler,
    params,
    request: Request,
    controls: Controls,
    key: Key[Array, ""],
    prefill: int,
) -> State:
    """The state before the first iteration: whole blocks of the prompts are in the cache.

    `prefill` is a static length that covers every row's floor(prompt / size) * size; the rest of a
    prompt stands unmasked in the first canvas, which is what training does.
    """
    config = sampler.model.decoder
    rows, slots = request.given.shape
    index = jnp.arange(slots) + request.given * 0
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, request.row)
    prior = sampler.process.prior(jax.vmap(_slot_keys, (0, 0))(keys, index))
    events = jnp.where(_wide(request.given, request.events), request.events, prior)
    block = request.prompt // request.size
    head = block * request.size
    cache = caches.empty(
        config.num_layers, rows, slots, config.num_kv_heads, config.head_dim, config.dtype
    )
    carry = sharding.zeros((rows, config.width), config.dtype, "batch", "embed")
    if prefill:
        at = index[:, :prefill]
        real = at < head[:, None]
        segment = real.astype(jnp.int32)
        places = Places(at * 0, segment, at // request.size[:, None], at, at)
        hidden, new = block_step(sampler.model, params, events[:, :prefill], places)
        cache = caches.write(cache, new, places, real)
        last = _at(hidden, jnp.maximum(head - 1, 0)[:, None])[:, 0]
        # A row without a whole block has no last clean token, however long its neighbours' are.
        carry = jnp.where(head[:, None] > 0, last, carry)
    zero = request.prompt * 0
    nothing = index * 0.0
    return State(
        events=events,
        filled=request.given,
        prompt=request.prompt,
        limit=jnp.minimum(request.limit, slots),
        size=jnp.minimum(request.size, sampler.canvas),
        block=block,
        step=zero,
        pending=zero > 0,
        done=request.prompt >= request.limit,
        carry=carry,
        cache=cache,
        keys=keys,
        forwards=zero,
        commits=zero,
        record=Record(index * 0 - 1, nothing, nothing, nothing),
        controls=controls,
    )


def _slot_keys(key, positions):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


class _Output(NamedTuple):
    """One forward: the canvas's hidden rows, the last clean one before it, keys and values."""

    hidden: Float[Array, "N C D"]
    last: Float[Array, "N D"]
    new: caches.KeyValues
    places: Places


def _clean_window(sampler: Sampler, state: State, valid: Bool[Array, "N"]) -> Places:
    """The finished block before the canvas, for the rows that are `valid`."""
    slots = valid[:, None] & (jnp.arange(sampler.canvas) < state.size[:, None])
    before = (state.block - 1) * state.size
    return window_places(before, state.block - 1, sampler.canvas, slots, valid | True)


def _canvas(sampler: Sampler, state: State, valid: Bool[Array, "N"]) -> Places:
    """The canvas, cut off at the row's limit."""
    begin = state.block * state.size
    slot = jnp.arange(sampler.canvas)
    inside = (slot < state.size[:, None]) & (begin[:, None] + slot < state.limit[:, None])
    return window_places(begin, state.block, sampler.canvas, valid[:, None] & inside, valid & False)


def _forward(sampler: Sampler, params, state: State, canvas: Places) -> _Output:
    """The iteration's one call of the network, at the width that its rows need."""
    run = partial(block_step, sampler.model, params)
    commit = state.pending & ~state.done
    clean = _clean_window(sampler, state, commit)
    last_slot = (state.size - 1)[:, None]

    def last_of(hidden):
        return jnp.where(commit[:, None], _at(hidden, last_slot)[:, 0], state.carry)

    if not sampler.fused:
        places = Places(
            *(jnp.where(commit[:, None], a, b) for a, b in zip(clean, canvas, strict=True))
        )
        hidden, new = run(_at(state.events, places.position), places, state.cache)
        return _Output(hidden, last_of(hidden), new, places)

    def both():
        places = join_places(clean, canvas)
        hidden, new = run(_at(state.events, places.position), places, state.cache)
        first = jax.tree.map(lambda x: x[:, :, : sampler.canvas], new)
        return hidden[:, sampler.canvas :], last_of(hidden[:, : sampler.canvas]), first

    def canvas_only():
        hidden, new = run(_at(state.events, canvas.position), canvas, state.cache)
        return hidden, state.carry, new

    hidden, last, new = lax.cond(commit.any(), both, canvas_only)
    return _Output(hidden, last, new, clean)


def _aligned(sampler: Sampler, output: _Output) -> Float[Array, "N C D"]:
    """For each slot the hidden row that names its token (`Alignment`)."""
    if sampler.alignment is Alignment.SAME_POSITION:
        return output.hidden
    return join(output.last[:, None], output.hidden[:, :-1])


def _seeded(sampler: Sampler, params, state: State) -> State:
    """Rows at the start of a block with its first token, out of the last clean hidden state.

    What Fast-dLLM v2 does: no noisy row ever names a block's first token, so it stands before the
    block's first forward, whatever the policy. The first block has none: there is nothing before.
    """
    begin = (state.block * state.size)[:, None]
    empty = ~_at(state.filled, begin) & (begin > 0) & (begin < state.limit[:, None])
    needed = empty & (~state.done & ~state.pending & (state.step == 0))[:, None]

    def write(state: State) -> State:
        keys = jax.vmap(_slot_keys)(state.keys, begin)
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))(keys, state.step)
        controls = state.controls
        temperature = controls.temperature[:, None] + begin * 0.0
        shaping = Shaping(temperature, controls.top_k, controls.top_p, controls.bias)
        stats = sampler.model.readout.stats(params, state.carry[:, None], shaping, keys)
        record = Record(
            _put(state.record.step, begin, begin * 0, needed),
            _put(state.record.entropy, begin, stats.entropy, needed),
            _put(state.record.logprob_raw, begin, stats.logprob_raw, needed),
            _put(state.record.logprob_drawn, begin, stats.logprob_drawn, needed),
        )
        return state._replace(
            events=_put(state.events, begin, stats.token, needed),
            filled=_put(state.filled, begin, needed, needed),
            record=record,
        )

    return lax.cond(needed.any(), write, lambda state: state, state)


def _iterate(sampler: Sampler, params, state: State) -> State:
    """One forward for every row that is not done."""
    if sampler.alignment is Alignment.SHIFTED_NOISY:
        state = _seeded(sampler, params, state)
    live = ~state.done
    denoising = live & (~state.pending | sampler.fused)
    canvas = _canvas(sampler, state, denoising)
    output = _forward(sampler, params, state, canvas)
    written = (output.places.stream == 0) & (output.places.segment != 0)
    cache = caches.write(state.cache, output.new, output.places, written)

    position, exists = canvas.position, canvas.segment != 0
    events, filled = _at(state.events, position), _at(state.filled, position)
    slot_keys = jax.vmap(_slot_keys)(state.keys, position)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))(slot_keys, state.step)
    controls = state.controls
    shaping = Shaping(
        controls.temperature[:, None] + position * 0.0,
        controls.top_k,
        controls.top_p,
        controls.bias,
    )
    stats = sampler.model.readout.stats(params, _aligned(sampler, output), shaping, keys)
    masked = exists & ~filled
    fresh = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, 1)
    view = View(masked, state.step, state.size, position, fresh)
    update = controls.policy.update(stats, view, events)
    changed, done_slots = update.changed & masked, update.filled & masked

    now = jnp.where(_wide(changed, events), update.events, events)
    filled |= done_slots
    record = Record(
        _put(state.record.step, position, state.step[:, None] + position * 0, done_slots),
        _put(state.record.entropy, position, stats.entropy, done_slots),
        _put(state.record.logprob_raw, position, stats.logprob_raw, done_slots),
        _put(state.record.logprob_drawn, position, stats.logprob_drawn, done_slots),
    )

    full = denoising & (filled | ~exists).all(axis=1)
    at_limit = (state.block + 1) * state.size >= state.limit
    done = state.done | (full & (at_limit | _stops(controls.stop, now, position, exists, state)))
    onward = full & ~done
    return state._replace(
        events=_put(state.events, position, now, changed),
        filled=_put(state.filled, position, filled, exists),
        block=state.block + onward,
        step=jnp.where(onward, 0, state.step + denoising),
        pending=onward,
        done=done,
        carry=output.last,
        cache=cache,
        forwards=state.forwards + live,
        commits=state.commits + (live & ~denoising),
        record=record,
    )


def _stops(stop, events, position, exists, state: State) -> Bool[Array, "N"]:
    """Whether a row's canvas holds a stop id at or after its prompt."""
    if stop.shape[0] == 0:
        return state.done
    written = exists & (position >= state.prompt[:, None])
    return ((events[..., None] == stop).any(axis=-1) & written).any(axis=1)


@partial(jax.jit, static_argnames="sampler", donate_argnames="state")
def advance(sampler: Sampler, params, state: State, budget: Int[Array, ""] | int) -> State:
    """Up to `budget` iterations, one forward each, until all rows are done.

    The budget is traced: batch generation passes UNLIMITED, watching and streaming a small number.
    A row that is done costs nothing of its own and changes no more.
    """

    def more(carry):
        used, state = carry
        return (used < budget) & jnp.any(~state.done)

    def step(carry):
        used, state = carry
        return used + 1, _iterate(sampler, params, state)

    return lax.while_loop(more, step, (0, state))[1]
