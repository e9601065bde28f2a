"""What a sampler needs to know of each slot's distribution, gathered in one pass over the ids.

Accumulators merge, so a pass may be cut into vocabulary chunks and devices in any way. Noise is a
function of (slot key, id) alone: the draw does not depend on chunking, mesh or batch-mates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from pallas_kernels import hopper_stats

# Top-k and top-p act on this many best ids; a larger nucleus costs further passes.
CANDIDATES = 256
_NONE = -1e30
# A float32's 32 sortable bits, found 11, 11 and 10 at a time.
_DIGITS = ((21, 11), (10, 11), (0, 10))


class Stats(NamedTuple):
    """Per slot, (N, W) each. Probabilities are of the temperature-scaled, unfiltered softmax.

    token: the drawn id. prob: its probability (the field's "confidence"). top_prob: the largest
    probability; gap: its lead over the second; entropy in nats. logprob_raw: of the token at
    temperature 1; logprob_drawn: under the distribution it was drawn from, filters included.
    """

    token: Int[Array, "N W"]
    prob: Float[Array, "N W"]
    top_prob: Float[Array, "N W"]
    gap: Float[Array, "N W"]
    entropy: Float[Array, "N W"]
    logprob_raw: Float[Array, "N W"]
    logprob_drawn: Float[Array, "N W"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A chunked view of R slots' logits: `chunk(i)` -> ids (v,), logits (R, v), for i < `count`.

    `axes`: mesh axes the vocabulary is split over. `temperature` is positive.
    """

    count: int
    chunk: Callable
    axes: tuple[str, ...]
    temperature: Float[Array, "R"]
    keys: Key[Array, "R"]


class Best(NamedTuple):
    """The largest of something and the id it belongs to."""

    value: Float[Array, "R"]
    token: Int[Array, "R"]
    logit: Float[Array, "R"]


class Scan(NamedTuple):
    """Accumulated over ids. Scaled logits s = logit / temperature.

    top: largest s. second: second largest. total = sum exp(s - top), weighted = sum s exp(s-top),
    raw_total = sum exp((s - top) temperature). drawn: largest s + Gumbel noise. candidates: the
    best ids in falling order of s, when filters asked for them.
    """

    top: Best
    second: Float[Array, "R"]
    total: Float[Array, "R"]
    weighted: Float[Array, "R"]
    raw_total: Float[Array, "R"]
    drawn: Best
    candidates: tuple[Float[Array, "R C"], Int[Array, "R C"]] | None


def gumbel(keys: Key[Array, "R"], ids: Int[Array, "*v"]) -> Float[Array, "R v"]:
    """Standard Gumbel noise of each (slot, id), from 32 bits of one hash of the two.

    Always finite: the uniform number stays inside (0, 1), finest where the noise is largest.
    """
    if ids.ndim == 1:
        ids = jnp.broadcast_to(ids, (keys.shape[0], ids.shape[0]))
    mixed = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, ids)
    bits = jax.random.key_data(mixed)[..., 0]
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _best(value, ids, logits) -> Best:
    at = value.argmax(axis=1)[:, None]
    take = lambda x: jnp.take_along_axis(x, at, axis=1)[:, 0]  # noqa: E731
    return Best(take(value), ids[at[:, 0]].astype(jnp.int32), take(logits))


def _better(a: Best, b: Best) -> Best:
    first = (a.value > b.value) | ((a.value == b.value) & (a.token < b.token))
    return Best(*(jnp.where(first, x, y) for x, y in zip(a, b, strict=True)))


def _merge(a: Scan, b: Scan, temperature) -> Scan:
    top = _better(a.top, b.top)
    lower = jnp.minimum(a.top.value, b.top.value)
    ratio_a, ratio_b = jnp.exp(a.top.value - top.value), jnp.exp(b.top.value - top.value)
    raw_a = jnp.exp((a.top.value - top.value) * temperature)
    raw_b = jnp.exp((b.top.value - top.value) * temperature)
    candidates = None
    if a.candidates is not None:
        joined = [
            jnp.concatenate(pair, axis=1) for pair in zip(a.candidates, b.candidates, strict=True)
        ]
        candidates = _leading(*joined, a.candidates[0].shape[1])
    return Scan(
        top,
        jnp.maximum(lower, jnp.maximum(a.second, b.second)),
        a.total * ratio_a + b.total * ratio_b,
        a.weighted * ratio_a + b.weighted * ratio_b,
        a.raw_total * raw_a + b.raw_total * raw_b,
        _better(a.drawn, b.drawn),
        candidates,
    )


def _leading(value, ids, count: int):
    value, at = lax.top_k(value, count)
    return value, jnp.take_along_axis(ids, at, axis=1)


def joined(parts: hopper_stats.Parts, temperature: Float[Array, "R"], first_id) -> Scan:
    """Statistics out of those of a head's tiles; the head starts at first_id.

    In two rounds of about as many, both spread over the chip: one alone would leave each row to a
    single walk over more than a thousand tiles.
    """

    def merge(*both):
        # Every part's temperature is that of its row, but for the start's, which is 0.
        scale = jnp.maximum(both[9], both[19])
        a, b = (_scan_of(hopper_stats.Parts(*x), scale) for x in (both[:9], both[10:19]))
        whole = _merge(a, b, scale)
        return *_parts_of(whole), scale

    operands = *parts, jnp.broadcast_to(temperature, parts.top.shape)
    least = {"top": 2 * _NONE, "second": 2 * _NONE, "drawn": 2 * _NONE}
    start = [least.get(name, 0) for name in (*parts._fields, "temperature")]
    start = [jnp.asarray(x, y.dtype) for x, y in zip(start, operands, strict=True)]

    def reduced(operands):
        return lax.reduce(operands, tuple(start), lambda a, b: merge(*a, *b), (0,))

    tiles, rows = parts.top.shape
    each = math.isqrt(tiles - 1) + 1
    groups = -(-tiles // each)
    # One array: ten would be filled up by ten kernels.
    fill = jnp.broadcast_to(
        jnp.stack(start)[:, None, None], (len(start), each * groups - tiles, rows)
    )
    filled = jnp.concatenate([jnp.stack(operands), fill], axis=1)
    whole = reduced(reduced(tuple(filled.reshape(len(start), each, groups, rows))))
    scan = _scan_of(hopper_stats.Parts(*whole[:9]), temperature)

    def named(best: Best, logit) -> Best:
        return Best(best.value, best.token.astype(jnp.int32) + first_id, logit)

    drawn = named(scan.drawn, scan.drawn.logit * temperature)
    return scan._replace(top=named(scan.top, scan.top.logit), drawn=drawn)


def _scan_of(parts: hopper_stats.Parts, temperature) -> Scan:
    return Scan(
        Best(parts.top, parts.top_id, parts.top * temperature),
        parts.second,
        parts.total,
        parts.weighted,
        parts.raw_total,
        Best(parts.drawn, parts.drawn_id, parts.drawn_scaled),
        None,
    )


def _parts_of(scan: Scan) -> hopper_stats.Parts:
    return hopper_stats.Parts(*scan.top[:2], *scan[1:5], *scan.drawn)


def over_devices(vocabulary: Vocabulary, scan: Scan) -> Scan:
    """Merges what each device found in its share of the ids."""
    for axis in vocabulary.axes:
        shares = jax.tree.map(lambda x: lax.all_gather(x, axis), scan)  # noqa: B023
        parts = [jax.tree.map(lambda x: x[i], shares) for i in range(lax.axis_size(axis))]  # noqa: B023
        scan = parts[0]
        for part in parts[1:]:
            scan = _merge(scan, part, vocabulary.temperature)
    return scan


def scan(vocabulary: Vocabulary, filtered: bool, vocab_size: int) -> Scan:
    """One pass over all ids. `filtered` also keeps the CANDIDATES best ones."""
    size = min(CANDIDATES, vocab_size)
    scale = vocabulary.temperature[:, None]

    def part(index) -> Scan:
        ids, logits = vocabulary.chunk(index)
        value = logits / scale
        top = _best(value, ids, logits)
        others = jnp.where(ids == top.token[:, None], _NONE, value)
        share = jnp.exp(value - top.value[:, None])
        candidates = None
        if filtered:
            wide = jnp.broadcast_to(ids.astype(jnp.int32), value.shape)
            short = max(0, size - value.shape[1])
            padded = jnp.pad(value, ((0, 0), (0, short)), constant_values=_NONE)
            candidates = _leading(padded, jnp.pad(wide, ((0, 0), (0, short))), size)
        return Scan(
            top,
            others.max(axis=1),
            share.sum(axis=1),
            (jnp.where(share > 0, value, 0.0) * share).sum(axis=1),
            jnp.exp((value - top.value[:, None]) * scale).sum(axis=1),
            _best(value + gumbel(vocabulary.keys, ids), ids, logits),
            candidates,
        )

    def visit(index, state):
        return _merge(state, part(index), vocabulary.temperature)

    return over_devices(vocabulary, lax.fori_loop(1, vocabulary.count, visit, part(0)))


class Nucleus(NamedTuple):
    """What is left after the filters: a token drawn from it and the log of its probability mass."""

    drawn: Best
    log_mass: Float[Array, "R"]


def nucleus(
    vocabulary: Vocabulary,
    scan: Scan,
    top_k: Int[Array, "R"] | None,
    top_p: Float[Array, "R"] | None,
) -> Nucleus:
    """Draws from the top_k best ids, then from the fewest of those whose probability reaches top_p.

    top_k is at most CANDIDATES (checked by the caller); top_p is a share of what top_k left. Rows
    whose nucleus is larger than the candidates are finished by `_wide_nucleus`, exactly.
    """
    value, ids = scan.candidates
    log_total = scan.top.value + jnp.log(scan.total)
    prob = jnp.exp(value - log_total[:, None])
    kept = prob > 0
    if top_k is not None:
        kept &= jnp.arange(value.shape[1]) < top_k[:, None]
    prob = jnp.where(kept, prob, 0.0)
    reached = jnp.cumsum(prob, axis=1)
    whole = jnp.ones_like(log_total) if top_k is None else reached[:, -1]
    if top_p is not None:
        kept &= reached - prob < top_p[:, None] * whole[:, None]
    kept |= jnp.arange(value.shape[1]) == 0
    noisy = jnp.where(kept, value + gumbel(vocabulary.keys, ids), _NONE)
    at = noisy.argmax(axis=1)[:, None]
    take = lambda x: jnp.take_along_axis(x, at, axis=1)[:, 0]  # noqa: E731
    drawn = Best(take(noisy), take(ids), take(value) * vocabulary.temperature)
    mass = jnp.where(kept, prob, 0.0).sum(axis=1)
    close = Nucleus(drawn, jnp.log(mass))
    if top_p is None or top_k is not None:
        return close
    everything = top_p >= 1
    whole_vocabulary = Nucleus(scan.drawn, jnp.zeros_like(mass))
    close = jax.tree.map(lambda a, b: jnp.where(everything, a, b), whole_vocabulary, close)
    open_rows = ~everything & (reached[:, -1] < top_p) & (prob[:, -1] > 0)

    def widen():
        wide = _wide_nucleus(vocabulary, log_total, top_p)
        return jax.tree.map(lambda a, b: jnp.where(open_rows, a, b), wide, close)

    return lax.cond(open_rows.any(), widen, lambda: close)


def _sortable(value: Float[Array, "R v"]):
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _wide_nucleus(vocabulary: Vocabulary, log_total, top_p) -> Nucleus:
    """The nucleus without a candidate list: radix selection of its smallest logit, digit by digit.

    Three chunked passes find the threshold exactly, a fourth draws. Ids tied with it all stay.
    """
    rows = log_total.shape[0]

    def each(index):
        ids, logits = vocabulary.chunk(index)
        value = logits / vocabulary.temperature[:, None]
        return ids, logits, value, jnp.exp(value - log_total[:, None])

    def over(function, start):
        return lax.fori_loop(0, vocabulary.count, function, start)

    threshold, above = jnp.zeros((rows,), jnp.uint32), jnp.zeros((rows,))
    for shift, width in _DIGITS:

        def histogram(index, bins, shift=shift, width=width, threshold=threshold):
            _, _, value, prob = each(index)
            code = _sortable(value)
            inside = (code >> (shift + width)) == (threshold >> (shift + width))[:, None]
            if shift + width == 32:
                inside = jnp.ones_like(inside)
            digit = (code >> shift) & ((1 << width) - 1)
            return jax.vmap(lambda b, d, p: b.at[d].add(p))(bins, digit, jnp.where(inside, prob, 0))

        bins = over(histogram, jnp.zeros((rows, 1 << width)))
        for axis in vocabulary.axes:
            bins = lax.psum(bins, axis)
        reach = above[:, None] + jnp.cumsum(bins[:, ::-1], axis=1)[:, ::-1]  # mass of >= this digit
        digit = jnp.maximum((reach >= top_p[:, None]).sum(axis=1) - 1, 0)
        here = jnp.take_along_axis(reach - bins, digit[:, None], axis=1)[:, 0]
        above, threshold = here, threshold | (digit.astype(jnp.uint32) << shift)

    def draw(index, state):
        best, mass = state
        ids, logits, value, prob = each(index)
        kept = _sortable(value) >= threshold[:, None]
        noisy = jnp.where(kept, value + gumbel(vocabulary.keys, ids), _NONE)
        return _better(best, _best(noisy, ids, logits)), mass + jnp.where(kept, prob, 0).sum(axis=1)

    nobody = Best(jnp.full((rows,), 2 * _NONE), jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,)))
    best, mass = over(draw, (nobody, jnp.zeros((rows,))))
    for axis in vocabulary.axes:
        mass = lax.psum(mass, axis)
        shares = lax.all_gather(best, axis)
        best = Best(*(x[0] for x in shares))
        for i in range(1, lax.axis_size(axis)):
            best = _better(best, Best(*(x[i] for x in shares)))
    return Nucleus(best, jnp.log(mass))


def summarise(scan: Scan, keep: Nucleus | None, temperature: Float[Array, "R"]) -> Stats:
    """Stats of R slots; slots of temperature 0 take the most probable token with certainty."""
    greedy = temperature == 0
    scale = jnp.where(greedy, 1.0, temperature)
    log_total = scan.top.value + jnp.log(scan.total)
    raw_log_total = scan.top.logit + jnp.log(scan.raw_total)
    chosen = scan.drawn if keep is None else keep.drawn
    token = jnp.where(greedy, scan.top.token, chosen.token)
    logit = jnp.where(greedy, scan.top.logit, chosen.logit)
    scaled = logit / scale - log_total
    filtered = scaled if keep is None else scaled - keep.log_mass
    top_prob = jnp.exp(scan.top.value - log_total)
    return Stats(
        token=token,
        prob=jnp.exp(scaled),
        top_prob=top_prob,
        gap=top_prob - jnp.exp(scan.second - log_total),
        entropy=jnp.maximum(log_total - scan.weighted / scan.total, 0.0),
        logprob_raw=logit - raw_log_total,
        logprob_drawn=jnp.where(greedy, 0.0, filtered),
    )
