"""Draws are unbiased for the exact bound, never touch prompts, and depend on keys alone.

The exact bound of one block of trainable tokens b, for any per-token losses l_i(M) of the masked
subset M (training notes 2.2):  sum over non-empty M of 1/(|M| C(B, |M|)) sum_{i in M} l_i(M).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import sharding
from bdjax.layout import Places
from bdjax.noise import (
    Absorbing,
    Bernoulli,
    Cosine,
    ExactCount,
    Linear,
    LogLinear,
    Polynomial,
    Scope,
    enumerated,
)
from bdjax.objective import Batch, BlockSize, Objective, corruptions, places_of
from bdjax.seeds import row_keys

LENGTH = 16
DRAWS = 20_000


def lay_out(blocks: list[tuple[int, str]]) -> tuple[Places, np.ndarray]:
    """A row from (segment, tokens) per block: t is trainable, p a prompt token, - padding."""
    fields = {name: np.zeros(LENGTH, np.int32) for name in ("segment", "block")}
    trainable = np.zeros(LENGTH, bool)
    at, last, number = 0, None, 0
    for segment, tokens in blocks:
        number = 0 if segment != last else number + 1
        last = segment
        inside = slice(at, at + len(tokens))
        fields["segment"][inside] = [0 if c == "-" else segment for c in tokens]
        fields["block"][inside] = number
        trainable[inside] = [c == "t" for c in tokens]
        at += len(tokens)
    assert at <= LENGTH
    order = np.arange(LENGTH, dtype=np.int32)
    return Places(order * 0, fields["segment"], fields["block"], order, order), trainable


ROWS = {
    "4,4,4,4": [(1, "tttt")] * 4,
    "4,4,3,1": [(1, "tttt"), (1, "tttt"), (1, "ttt"), (1, "t")],
    "prompts": [(1, "pppp"), (1, "pptt"), (1, "tptp"), (1, "ptt")],
    "packed": [(1, "ptt"), (1, "tt"), (2, "--"), (2, "ptt"), (2, "t"), (3, "ttt")],
    "one": [(1, "ptttt"), (1, "---")],
}


def blocks_of(places: Places, trainable: np.ndarray) -> list[np.ndarray]:
    """Indices of the trainable tokens of each block that has any."""
    label = places.segment.astype(np.int64) * 1000 + places.block
    found = [np.flatnonzero((label == x) & trainable) for x in np.unique(label)]
    return sorted((x for x in found if len(x)), key=lambda x: x[0])


class Table:
    """Random losses l_i(M) for each block of a row, M as bits over the block's trainable tokens."""

    def __init__(self, blocks: list[np.ndarray], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.blocks = blocks
        self.losses = [rng.exponential(size=(1 << len(b), len(b))) for b in blocks]

    def estimates(self, masked: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """sum_i weight_i l_i(M) per draw and block: (draws, blocks)."""
        found = []
        for block, losses in zip(self.blocks, self.losses, strict=True):
            pattern = (masked[:, block] << np.arange(len(block))).sum(axis=1)
            found.append((weight[:, block] * losses[pattern] * masked[:, block]).sum(axis=1))
        return np.stack(found, axis=1)

    def integrate(self, chance) -> np.ndarray:
        """sum over M of chance(|M|, B) sum_{i in M} l_i(M), per block."""
        found = []
        for block, losses in zip(self.blocks, self.losses, strict=True):
            total = 0.0
            for pattern in range(1, 1 << len(block)):
                inside = (pattern >> np.arange(len(block))) & 1
                total += chance(int(inside.sum()), len(block)) * (losses[pattern] * inside).sum()
            found.append(total)
        return np.array(found)

    def exact(self) -> np.ndarray:
        """The bound (2.2) per block."""
        return self.integrate(lambda n, size: 1 / (n * math.comb(size, n)))


@partial(jax.jit, static_argnums=0)
def many(draw, seed, strata, places, trainable, step=0):
    """Masks of one row under as many keys as there are strata."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(strata.shape[0])
    )
    drawn = jax.vmap(draw.masks, (0, 0, None, None, None, None))(
        keys, strata, places, trainable, step, places.position
    )
    return drawn.masked, drawn.weight


def sample(draw, name: str, seed: int = 0):
    """DRAWS masks and float64 weights of a named row; strata as a batch of that size has them."""
    places, trainable = lay_out(ROWS[name])
    rng = np.random.default_rng(seed)
    strata = (rng.permutation(DRAWS) + rng.random(DRAWS)) / DRAWS
    masked, weight = many(
        draw, seed, jnp.asarray(strata, jnp.float32), Places(*map(jnp.asarray, places)), trainable
    )
    masked, weight = np.asarray(masked), np.asarray(weight, np.float64)
    assert not masked[:, ~trainable].any(), "prompts and padding are never masked"
    assert (weight[~masked] == 0).all()
    return places, trainable, masked, weight


def assert_mean(values: np.ndarray, expected: np.ndarray) -> None:
    """Means of the columns and of their sum lie within 4 standard errors."""
    values = np.concatenate([values, values.sum(axis=1, keepdims=True)], axis=1)
    expected = np.append(expected, expected.sum())
    error = values.std(axis=0) / np.sqrt(len(values))
    assert (np.abs(values.mean(axis=0) - expected) <= 4 * error + 1e-6).all(), (
        values.mean(axis=0) - expected
    ) / error


@pytest.mark.parametrize("name", ROWS)
def test_exact_counts_are_unbiased_and_never_empty(name):
    """P14: the mean over draws is (2.2) for every block, prompts inside blocks or not."""
    places, trainable, masked, weight = sample(ExactCount(), name)
    table = Table(blocks_of(places, trainable))
    assert_mean(table.estimates(masked, weight), table.exact())
    for block in table.blocks:
        count = masked[:, block].sum(axis=1)
        assert count.min() == 1 and count.max() == len(block)
        assert np.allclose(weight[:, block].max(axis=1), len(block) / count)


def test_exact_counts_are_uniform_over_subsets_of_each_size():
    """Every subset of a block of four has its chance 1/(4 C(4, n)), within 4 sigma."""
    places, trainable, masked, _ = sample(ExactCount(), "4,4,3,1")
    patterns = (masked[:, :4] << np.arange(4)).sum(axis=1)
    for pattern in range(1, 16):
        chance = 1 / (4 * math.comb(4, pattern.bit_count()))
        share = (patterns == pattern).mean()
        assert abs(share - chance) < 4 * np.sqrt(chance / DRAWS), pattern


def test_counts_are_stratified_over_a_row():
    """Four blocks of four hold 1, 2, 3 and 4 masks in every draw; every order occurs alike."""
    _, _, masked, _ = sample(ExactCount(), "4,4,4,4")
    counts = masked.reshape(DRAWS, 4, 4).sum(axis=2)
    assert (np.sort(counts, axis=1) == [1, 2, 3, 4]).all()
    orders, seen = np.unique(counts, axis=0, return_counts=True)
    assert len(orders) == 24
    assert (np.abs(seen / DRAWS - 1 / 24) < 4 * np.sqrt(1 / 24 / DRAWS)).all()


def test_a_single_block_is_stratified_over_the_batch():
    """Eight rows of one block of four: each count occurs exactly twice in the batch."""
    tokens = jnp.tile(jnp.arange(8), (8, 1))
    whole = Batch(tokens, tokens * 0 + 1, tokens, jnp.arange(8) + tokens * 0 >= 4)
    objective = Objective(process=Absorbing(mask_id=99), block_size=BlockSize(first=4))
    draw = jax.jit(lambda key: corruptions(objective, whole, places_of(objective, whole, 4), key))
    for seed in range(5):
        (view,) = draw(jax.random.key(seed))
        counts = np.asarray(view.scored).sum(axis=1)
        assert sorted(counts.tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]


SCHEDULES = {
    "linear": (Linear(), lambda t: t, lambda t: 1 / t),
    "cosine": (
        Cosine(),
        lambda t: 2 * np.sin(np.pi * t / 4) ** 2,
        lambda t: np.pi / 2 * np.sin(np.pi * t / 2) / (2 * np.sin(np.pi * t / 4) ** 2),
    ),
    "square": (Polynomial(power=2.0), lambda t: t**2, lambda t: 2 / t),
    "cubic": (Polynomial(power=3.0), lambda t: t**3, lambda t: 3 / t),
    "sqrt": (Polynomial(power=0.5), lambda t: t**0.5, lambda t: 0.5 / t),
    "loglinear": (
        LogLinear(eps=1e-3),
        lambda t: (1 - 1e-3) * t,
        # sigma' / expm1(sigma) for sigma = -log(1 - (1 - eps) t)
        lambda t: (1 - 1e-3) / (1 - (1 - 1e-3) * t) / np.expm1(-np.log1p(-(1 - 1e-3) * t)),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_by_autodiff_are_the_closed_forms(name):
    """w = p'/p at times from 0.001 to 1, against float64 (training notes 2.5)."""
    schedule, p, weight = SCHEDULES[name]
    t = np.concatenate([np.geomspace(1e-3, 0.5, 20), np.linspace(0.5, 1, 11)]).astype(np.float32)
    wide = t.astype(np.float64)
    assert np.allclose(jnp.vectorize(schedule.p)(t), p(wide), rtol=1e-4)
    assert np.allclose(schedule.weight(jnp.asarray(t)), weight(wide), rtol=1e-4)


def truncated(p, weight, low: float, high: float):
    """Chance weights of (2.1) with t uniform on [low, high], by Gauss-Legendre in log t."""
    nodes, areas = np.polynomial.legendre.leggauss(200)
    span = np.log(high / low)
    t = np.exp(np.log(low) + span * (nodes + 1) / 2)
    mass = areas * span / 2 * t / (high - low)

    def chance(n, size):
        return (mass * weight(t) * p(t) ** n * (1 - p(t)) ** (size - n)).sum()

    return chance


@pytest.mark.parametrize("name", ["linear", "cosine", "square", "loglinear"])
def test_bernoulli_draws_are_unbiased_for_every_schedule(name):
    """P3: the mean is the integral (2.1) over [low, high], which lies within 1 % of (2.2)."""
    schedule, p, weight = SCHEDULES[name]
    draw = Bernoulli(schedule=schedule)
    for row in ("4,4,3,1", "prompts"):
        places, trainable, masked, weights = sample(draw, row)
        table = Table(blocks_of(places, trainable))
        expected = table.integrate(truncated(p, weight, 1e-3, 1.0))
        assert np.allclose(expected, table.exact(), rtol=0.01)
        assert_mean(table.estimates(masked, weights), expected)


def test_clipped_levels_are_biased_by_the_computed_amount():
    """P4: t on [0.3, 0.8] estimates its own integral, which is not the bound."""
    places, trainable, masked, weights = sample(Bernoulli(low=0.3, high=0.8), "4,4,3,1")
    table = Table(blocks_of(places, trainable))
    _, p, weight = SCHEDULES["linear"]
    expected = table.integrate(truncated(p, weight, 0.3, 0.8))
    assert np.abs(expected / table.exact() - 1).max() > 0.02
    assert_mean(table.estimates(masked, weights), expected)


def test_times_are_stratified():
    """Weights 1/t of four blocks fall one into each quarter of [low, high]."""
    draw = Bernoulli(low=0.2, high=1.0)
    places, _, masked, weight = sample(draw, "4,4,4,4")
    weight, masked = weight.reshape(DRAWS, 4, 4), masked.reshape(DRAWS, 4, 4)
    full = masked.any(axis=2).all(axis=1)
    cell = np.floor((1 / weight.max(axis=2)[full] - 0.2) / 0.2 + 1e-5).astype(int)
    assert full.sum() > 1000
    assert (np.sort(np.minimum(cell, 3), axis=1) == [0, 1, 2, 3]).mean() > 0.999


@pytest.mark.parametrize("scope", Scope)
def test_tokens_of_a_scope_share_one_level(scope):
    """Weights differ between blocks, documents or not at all in a row, as the scope says."""
    draw = Bernoulli(scope=scope, low=0.5, high=1.0)
    places, trainable, masked, weight = sample(draw, "packed")
    label = {
        Scope.ROW: places.segment * 0,
        Scope.DOCUMENT: places.segment,
        Scope.BLOCK: places.segment * 10 + places.block,
    }[scope]
    groups = [np.flatnonzero((label == x) & trainable) for x in np.unique(label[trainable])]
    assert len(groups) == {Scope.ROW: 1, Scope.DOCUMENT: 3, Scope.BLOCK: 5}[scope]
    levels = []
    for group in groups:
        high = weight[:, group].max(axis=1)
        low = np.where(masked[:, group], weight[:, group], np.inf).min(axis=1)
        some = masked[:, group].any(axis=1)
        assert (high[some] == low[some]).all()
        levels.append(np.where(some, high, np.nan))
    levels = np.stack(levels, axis=1)
    for i in range(1, len(groups)):
        assert (levels[:, i] == levels[:, 0]).mean() < 0.01
    # Masked with probability t = 1 / weight: the scope's own mean rate is that of U(.5, 1).
    share = np.concatenate([masked[:, g] for g in groups], axis=1).mean()
    assert abs(share - 0.75) < 0.01


def test_never_empty_masks_at_least_one_token():
    """At levels of 0.1-1 % plain flips often mask nothing, forced ones never; prompts stay."""
    places, trainable, plain, _ = sample(Bernoulli(low=1e-3, high=1e-2), "packed")
    _, _, forced, weight = sample(Bernoulli(low=1e-3, high=1e-2, never_empty=True), "packed")
    assert (~plain.any(axis=1)).mean() > 0.9
    assert forced.any(axis=1).all()
    assert (weight[forced] >= 100).all()
    hits = forced.sum(axis=0)[trainable] / DRAWS
    assert np.allclose(hits, 1 / trainable.sum(), rtol=0.25)


def test_rows_with_nothing_to_mask_are_left_alone():
    """All prompt or padding: no masks, no weights, no NaN, forced or not."""
    places, trainable = lay_out([(1, "pppp"), (1, "pp"), (1, "----")])
    places, strata = Places(*map(jnp.asarray, places)), jnp.full((DRAWS,), 0.5)
    for draw in (ExactCount(), Bernoulli(low=1e-3, high=1e-2, never_empty=True)):
        masked, weight = many(draw, 0, strata, places, trainable)
        assert not np.asarray(masked).any() and (np.asarray(weight) == 0).all()


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.5, 0.5), (0.6, 0.4), (0.5, 1.5)])
def test_impossible_levels_are_refused(low, high):
    with pytest.raises(ValueError, match=r"low=.*high=.*type"):
        Bernoulli(low=low, high=high)


@jax.jit
def all_patterns(patterns, places, trainable):
    return jax.vmap(enumerated, (0, None, None))(patterns, places, trainable)


@pytest.mark.parametrize("name", ROWS)
def test_enumerated_patterns_add_up_to_the_exact_bound(name):
    """Every non-empty subset of every block occurs once among 1 .. 2^B - 1, with its weight."""
    places, trainable = lay_out(ROWS[name])
    found = all_patterns(jnp.arange(16), Places(*map(jnp.asarray, places)), trainable)
    masked, weight = np.asarray(found.masked), np.asarray(found.weight, np.float64)
    assert not masked[:, ~trainable].any() and not masked[0].any() and (weight[0] == 0).all()
    table = Table(blocks_of(places, trainable))
    sums = table.estimates(masked, weight).sum(axis=0)
    assert np.allclose(sums, table.exact(), rtol=1e-6)
    for block in table.blocks:
        patterns = (masked[:, block] << np.arange(len(block))).sum(axis=1)
        assert sorted(patterns[patterns > 0]) == list(range(1, 1 << len(block)))


PROCESSES = {
    "exact": Absorbing(mask_id=99),
    "bernoulli": Absorbing(mask_id=99, draw=Bernoulli(never_empty=True)),
}


def corrupt(process, key, strata, tokens, places, trainable):
    rows = tokens.shape[0]
    return process.corrupt(row_keys(key, rows), strata, tokens, places, trainable)


corrupt_jit = jax.jit(corrupt, static_argnums=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_corruption_depends_on_the_keys_alone(name):
    """Same keys, same masks on one device and on eight; other keys, other rows: other masks."""
    laid = [lay_out(ROWS["packed"])] * 8
    places = Places(*(jnp.stack(f) for f in zip(*(p for p, _ in laid), strict=True)))
    trainable = jnp.stack([jnp.asarray(t) for _, t in laid])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, trainable.shape))
    strata = jnp.linspace(0, 0.99, 8)
    key = jax.random.key(3)
    one = corrupt_jit(PROCESSES[name], key, strata, tokens, places, trainable)
    masked = np.asarray(one.scored)
    assert np.array_equal(one.events, np.where(masked, 99, tokens))
    assert np.array_equal(one.labels, tokens)
    again = corrupt_jit(PROCESSES[name], key, strata, tokens, places, trainable)
    other = corrupt_jit(PROCESSES[name], jax.random.key(4), strata, tokens, places, trainable)
    assert np.array_equal(masked, again.scored) and not np.array_equal(masked, other.scored)
    assert len(np.unique(masked, axis=0)) > 4
    with jax.set_mesh(sharding.make_mesh(data=8)):
        spread = [sharding.reshard(x, "batch") for x in (strata, tokens, trainable)]
        spread_places = Places(*(sharding.reshard(x, "batch") for x in places))
        eight = corrupt_jit(PROCESSES[name], key, *spread[:2], spread_places, spread[2])
    for a, b in zip(one, eight, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_a_fresh_canvas_is_all_masks():
    canvas = Absorbing(mask_id=7).prior(jax.random.split(jax.random.key(0), (2, 5)))
    assert canvas.shape == (2, 5) and (np.asarray(canvas) == 7).all()
