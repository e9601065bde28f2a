"""Decoding rules: golden vectors, equalities between rules, and what every rule must do."""

import itertools
from functools import partial
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.policies import (
    Dynamic,
    EntropyBounded,
    EntropyForm,
    RandomOne,
    Sequential,
    Static,
    Threshold,
    View,
)
from bdjax.stats import Stats

B, V = 8, 16
A = np.array([0.97, 0.62, 0.91, 0.45, 0.86, 0.30, 0.74, 0.55])
SDAR = EntropyForm.SDAR


@jax.jit
def update(policy, stats, view, canvas):
    """Every rule of these tests runs through this one jit; its cache counts compilations."""
    return policy.update(stats, view, canvas)


def entropy(confidence):
    """Nats of a distribution with one likely token, the rest uniform over V - 1 others."""
    c, rest = np.asarray(confidence), 1 - np.asarray(confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = -np.where(c > 0, c * np.log(c), 0) - np.where(rest > 0, rest * np.log(rest), 0)
    return nats + rest * log(V - 1)


def fake(confidence) -> Stats:
    """Statistics of slots with these confidences; slot j would write token 100 + j."""
    prob = jnp.asarray(confidence, jnp.float32)
    token = 100 + jnp.arange(prob.shape[1]) + 0 * prob.astype(jnp.int32)
    return Stats(
        token=token,
        prob=prob,
        top_prob=prob,
        gap=prob - (1 - prob) / (V - 1),
        entropy=jnp.asarray(entropy(confidence), jnp.float32),
        logprob_raw=jnp.log(prob),
        logprob_drawn=jnp.log(prob),
    )


def look(masked, step=0, seed=0) -> View:
    """What a rule sees of canvases at position 40 whose block size is their width."""
    masked = jnp.asarray(masked)
    rows, slots = masked.shape
    return View(
        masked=masked,
        step=jnp.full((rows,), step),
        size=jnp.full((rows,), slots),
        position=40 + jnp.arange(slots) + jnp.zeros((rows, 1), jnp.int32),
        keys=jax.random.split(jax.random.key(seed), (rows, slots)),
    )


def denoise(policy, confidence, rows, slots=B):
    """Runs a rule until all is written: per row the list of sets of slots, step by step."""
    masked, canvas = np.ones((rows, slots), bool), jnp.full((rows, slots), -1)
    history = []
    while masked.any():
        stats = fake(confidence(masked))
        result = update(policy, stats, look(masked, len(history), len(history)), canvas)
        accepted = np.asarray(result.filled)
        assert accepted[masked.any(axis=1)].any(axis=1).all(), "a step that writes nothing"
        history.append(accepted & masked)
        masked, canvas = masked & ~accepted, jnp.where(result.changed, result.events, canvas)
    np.testing.assert_array_equal(canvas, 100 + np.arange(slots) + np.zeros((rows, 1), int))
    return [[np.flatnonzero(s).tolist() for s in row if s.any()] for row in zip(*history)]  # noqa: B905


def toy(masked):
    """Confidence 1 - (1 - b) rho^r, r committed neighbours in the block; rows: rho = 1, 0.5.

    What is left of slot 0 counts as committed, what is right of the last slot does not.
    """
    done = np.pad(~masked, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
    neighbours = done[:, :-2].astype(int) + done[:, 2:]
    return 1 - (1 - A) * np.array([[1.0], [0.5]]) ** neighbours


GOLDEN = [
    (Sequential(steps=8), "0 1 2 3 4 5 6 7", "0 1 2 3 4 5 6 7"),
    (Sequential(steps=4), "01 23 45 67", "01 23 45 67"),
    (Static(steps=8), "0 2 4 6 1 7 3 5", "0 2 1 4 3 6 5 7"),
    (Static(steps=3), "024 167 35", "024 136 57"),
    (Dynamic(threshold=0.9, steps=8), "02 4 6 1 7 3 5", "02 1 4 3 6 5 7"),
    (Dynamic(threshold=0.9, steps=4), "02 46 17 35", "02 14 36 57"),
    (Threshold(threshold=0.9), "02 4 6 1 7 3 5", "02 1 4 3 6 5 7"),
    (Threshold(threshold=0.7), "0246 1 7 3 5", "0246 1357"),
    (Threshold(threshold=1.0), "0 2 4 6 1 7 3 5", "0 2 1 4 3 6 5 7"),
    (Threshold(threshold=0.0), "01234567", "01234567"),
    (EntropyBounded(budget=0.35, form=SDAR), "0 2 4 6 1 7 3 5", "0 2 1 4 3 6 5 7"),
    (EntropyBounded(budget=0.35), "02 4 6 1 7 3 5", "02 1 4 3 6 5 7"),
    (EntropyBounded(budget=1.0, form=SDAR), "02 4 6 1 7 3 5", "02 1 4 3 6 5 7"),
    (EntropyBounded(budget=1.0), "024 6 1 7 3 5", "024 13 6 57"),
    (EntropyBounded(budget=0.0), "0 2 4 6 1 7 3 5", "0 2 1 4 3 6 5 7"),
    (EntropyBounded(budget=0.0, form=SDAR), "0 2 4 6 1 7 3 5", "0 2 1 4 3 6 5 7"),
]


@pytest.mark.parametrize("policy, independent, coupled", GOLDEN, ids=lambda x: str(x)[:60])
def test_golden_vectors(policy, independent, coupled):
    """The slots written per step on the toy of the decoding notes, 13.4, for rho = 1 and 0.5."""
    got = denoise(policy, toy, rows=2)
    assert [" ".join("".join(map(str, s)) for s in row) for row in got] == [independent, coupled]


def test_the_toy_has_the_published_entropies():
    published = [0.2160, 1.6931, 0.5463, 2.1776, 0.7841, 2.5065, 1.2771, 1.9068]
    np.testing.assert_allclose(entropy(A), published, atol=5e-5)


ROWS = 64


def cases(seed=0):
    """Random confidences, partly written canvases (some rows finished), steps 0 to 7."""
    random = np.random.default_rng(seed)
    confidence = random.uniform(0.07, 0.99, (ROWS, B))
    masked = random.uniform(size=(ROWS, B)) < random.uniform(0, 1, (ROWS, 1))
    masked[0], masked[1] = True, False
    view = look(masked, seed=seed)._replace(step=jnp.asarray(random.integers(0, B, ROWS)))
    return fake(confidence), view


def accepted(policy, stats, view):
    """The slots a rule writes in one step."""
    return np.asarray(update(policy, stats, view, view.position * 0 - 1).filled)


per_row = partial(np.linspace, num=ROWS)


def column(low, high, dtype=np.float32):
    """A number per row, (N, 1)."""
    return jnp.asarray(per_row(low, high).astype(dtype)[:, None])


LENIENCY = {
    "sequential": [Sequential(steps=n) for n in range(B, 0, -1)],
    "static": [Static(steps=n) for n in range(B, 0, -1)],
    "dynamic": [Dynamic(threshold=t, steps=4) for t in (1.0, 0.9, 0.6, 0.3, 0.0)],
    "threshold": [Threshold(threshold=t) for t in (1.0, 0.9, 0.6, 0.3, 0.0)],
    "eb": [EntropyBounded(budget=g) for g in (0.0, 0.5, 2.0, 6.0, 99.0)],
    "sdar": [EntropyBounded(budget=g, form=SDAR) for g in (0.0, 0.5, 2.0, 6.0, 99.0)],
}


@pytest.mark.parametrize("rules", LENIENCY.values(), ids=LENIENCY)
def test_more_lenient_numbers_accept_more(rules):
    """For a fixed state the accepted set only grows with leniency, from strict to everything."""
    stats, view = cases()
    first_step = view._replace(step=view.step * 0)  # the step a schedule's remainder goes to
    sets = [accepted(rule, stats, first_step) for rule in rules]
    for strict, lenient in itertools.pairwise(sets):
        assert (strict <= lenient).all()
    np.testing.assert_array_equal(sets[-1], view.masked)
    assert sets[0].sum() < sets[-1].sum()


EVERY = [rules[len(rules) // 2] for rules in LENIENCY.values()] + [RandomOne()]


@pytest.mark.parametrize("policy", EVERY, ids=[*LENIENCY, "random"])
def test_discipline(policy):
    """Only masked slots, at least one of every unfinished row, and what was drawn is written."""
    stats, view = cases(1)
    canvas = view.position * 0 - 1
    result = update(policy, stats, view, canvas)
    filled, masked = np.asarray(result.filled), np.asarray(view.masked)
    assert not (filled & ~masked).any()
    np.testing.assert_array_equal(filled.any(axis=1), masked.any(axis=1))
    np.testing.assert_array_equal(result.changed, result.filled)
    np.testing.assert_array_equal(result.events, np.where(filled, stats.token, canvas))


@pytest.mark.parametrize(
    "policy",
    [
        Sequential(steps=B),
        Static(steps=B),
        Dynamic(threshold=0.9, steps=B),
        Threshold(threshold=0.9),
        EntropyBounded(budget=0.1),
        EntropyBounded(budget=0.1, form=SDAR),
    ],
    ids=lambda p: type(p).__name__,
)
def test_ties_go_left(policy):
    """Of equally good slots the leftmost masked one is written."""
    _, view = cases(2)
    got = accepted(policy, fake(np.full((ROWS, B), 0.5)), view)
    masked = np.asarray(view.masked)
    leftmost = masked & (masked.cumsum(axis=1) == 1)
    np.testing.assert_array_equal(got, leftmost)


def same(one, other, seeds=(0, 1)):
    """Asserts that two rules accept the same slots of random canvases."""
    for seed in seeds:
        stats, view = cases(seed)
        np.testing.assert_array_equal(accepted(one, stats, view), accepted(other, stats, view))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_dynamic_above_one_is_static(steps):
    same(Dynamic(threshold=1.0, steps=steps), Static(steps=steps))


def test_threshold_above_one_is_static_with_one_slot_a_step():
    same(Threshold(threshold=1.5), Static(steps=B))


def test_dynamic_with_one_slot_a_step_is_threshold():
    """No confidence equals the threshold here, so > and >= agree."""
    same(Dynamic(threshold=0.5, steps=B), Threshold(threshold=0.5))


def test_strict_and_weak_thresholds_differ_at_equality():
    """Dynamic is prob > threshold (SDAR), Threshold is prob >= threshold (Fast-dLLM)."""
    _, view = cases()
    view = view._replace(masked=view.masked | True)
    stats = fake(np.full((ROWS, B), 0.5))
    assert accepted(Threshold(threshold=0.5), stats, view).all()
    assert accepted(Dynamic(threshold=0.5, steps=B), stats, view).sum() == ROWS


ONE_SHOT = [
    Sequential(steps=1),
    Static(steps=1),
    Dynamic(threshold=0.9, steps=1),
    Dynamic(threshold=-0.1, steps=B),
    Threshold(threshold=0.0),
    EntropyBounded(budget=float("inf")),
    EntropyBounded(budget=float("inf"), form=SDAR),
]


@pytest.mark.parametrize("policy", ONE_SHOT, ids=str)
def test_the_lenient_end_writes_the_block_at_once(policy):
    stats, view = cases()
    np.testing.assert_array_equal(accepted(policy, stats, view), view.masked)


def test_entropy_forms_nest():
    """SDAR's form also charges the last token: its set is part of the EB form's."""
    stats, view = cases()
    for budget in (0.3, 1.0, 3.0):
        sdar = accepted(EntropyBounded(budget=budget, form=SDAR), stats, view)
        eb = accepted(EntropyBounded(budget=budget), stats, view)
        assert (sdar <= eb).all() and (sdar.sum() < eb.sum())


def test_entropy_budgets_at_equality():
    """EB is within the budget at sum - max = budget, SDAR's form is not at sum = budget."""
    _, view = cases()
    view = view._replace(masked=view.masked | True)
    nats = jnp.asarray([0.5, 0.25, 2.0, 1.0, 4.0, 4.0, 4.0, 4.0]) + jnp.zeros((ROWS, 1))
    stats = fake(np.full((ROWS, B), 0.5))._replace(entropy=nats)
    assert (accepted(EntropyBounded(budget=0.75), stats, view).sum(axis=1) == 3).all()
    assert (accepted(EntropyBounded(budget=0.75, form=SDAR), stats, view).sum(axis=1) == 1).all()


def test_entropy_budget_bounds_what_it_says():
    """EB: the accepted entropies without the largest sum to at most the budget, and one more
    slot would break it. SDAR: all of them sum to less."""
    stats, view = cases()
    nats, masked = np.asarray(stats.entropy, np.float64), np.asarray(view.masked)
    for budget, form in itertools.product((0.5, 2.0), EntropyForm):
        got = accepted(EntropyBounded(budget=budget, form=form), stats, view)
        for row in np.flatnonzero(masked.any(axis=1)):
            chosen, left = np.sort(nats[row, got[row]]), np.sort(nats[row, masked[row] & ~got[row]])
            charged = chosen[:-1] if form is EntropyForm.EB else chosen
            assert charged.sum() <= budget or len(chosen) == 1
            if len(left):
                extra = chosen.sum() + (0 if form is EntropyForm.EB else left[0])
                assert extra > budget - 1e-5


@pytest.mark.parametrize("steps", range(1, B + 3))
def test_schedules_spread_the_block_over_the_steps(steps):
    """B // T slots a step, one more in the first B mod T steps; T > B behaves as T = B."""
    flat = lambda masked: np.full(masked.shape, 0.5)  # noqa: E731
    for rule in (Sequential, Static):
        sizes = [len(s) for s in denoise(rule(steps=steps), flat, rows=1)[0]]
        used = min(steps, B)
        assert sizes == [B // used + (i < B % used) for i in range(used)]


def test_uniform_denoiser():
    """All slots at 1/V: a threshold above it and EB below ln V take B steps, EB from
    (B - 1) ln V on takes one, and in between 1 + floor(budget / ln V) slots go at once."""
    flat = lambda masked: np.full(masked.shape, 1 / V)  # noqa: E731
    for rule in (Threshold(threshold=1.01 / V), EntropyBounded(budget=0.99 * log(V))):
        assert denoise(rule, flat, rows=1) == [[[j] for j in range(B)]]
    whole = [[list(range(B))]]
    assert denoise(EntropyBounded(budget=(B - 1) * log(V) + 1e-3), flat, rows=1) == whole
    assert denoise(Threshold(threshold=0.99 / V), flat, rows=1) == whole
    pairs = [[[0, 1], [2, 3], [4, 5], [6, 7]]]
    assert denoise(EntropyBounded(budget=1.5 * log(V)), flat, rows=1) == pairs


def test_random_one_draws_every_order_equally_often():
    """Chi-square over the 24 orders of four slots; confidences must not matter."""
    slots, rows = 4, 4800
    confident = lambda masked: np.broadcast_to([0.97, 0.1, 0.5, 0.8], masked.shape)  # noqa: E731
    history = denoise(RandomOne(), confident, rows, slots)
    orders = [tuple(itertools.chain(*row)) for row in history]
    counts = np.array([orders.count(p) for p in itertools.permutations(range(slots))])
    assert counts.sum() == rows
    expected = rows / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # 99.9 % point of 23 degrees


def test_random_one_depends_on_its_keys_alone():
    stats, view = cases()
    first = accepted(RandomOne(), stats, view)
    _, other = cases(5)
    np.testing.assert_array_equal(first, accepted(RandomOne(), fake(1 - stats.prob), view))
    assert (first != accepted(RandomOne(), stats, view._replace(keys=other.keys))).any()


SWEEPS = [
    lambda x: Threshold(threshold=x),
    lambda x: Dynamic(threshold=x, steps=1 + int(7 * x)),
    lambda x: EntropyBounded(budget=9 * x),
    lambda x: Static(steps=1 + int(7 * x)),
    lambda x: Sequential(steps=1 + int(7 * x)),
]


def test_numbers_are_traced():
    """A sweep of any rule's numbers compiles once per rule."""
    stats, view = cases()
    for make in SWEEPS:
        accepted(make(0.5), stats, view)
    before = update._cache_size()
    for make, x in itertools.product(SWEEPS, (0.1, 0.4, 0.7, 0.95)):
        accepted(make(x), stats, view)
    assert update._cache_size() == before


def test_numbers_may_differ_by_row():
    """A (N, 1) number gives every row what the scalar would have given it."""
    stats, view = cases()
    rules = {
        "threshold": (lambda x, n: Threshold(threshold=x)),
        "dynamic": (lambda x, n: Dynamic(threshold=x, steps=n)),
        "static": (lambda x, n: Static(steps=n)),
        "sequential": (lambda x, n: Sequential(steps=n)),
        "eb": (lambda x, n: EntropyBounded(budget=4 * x)),
    }
    numbers = column(0.0, 1.0), column(1, B, np.int32)
    for make in rules.values():
        together = accepted(make(*numbers), stats, view)
        for row in (0, 20, 41, 63):
            alone = make(*(x[row, 0] for x in numbers))
            np.testing.assert_array_equal(together[row], accepted(alone, stats, view)[row])
