"""Weightings, laws of levels, pairs and normalisers against tables, quadrature and plain sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import special
from test_noise import ROWS, Table, assert_mean, blocks_of, lay_out, sample

from bdjax import sharding
from bdjax.draws import group_by, stratified
from bdjax.layout import Places
from bdjax.noise import (
    Absorbing,
    Bernoulli,
    Beta,
    Cart,
    Complement,
    Cosine,
    Discrete,
    Draw,
    ExactCount,
    Flat,
    Linear,
    Polynomial,
    Realised,
    Rescaled,
)
from bdjax.objective import (
    Batch,
    BlockSize,
    Normaliser,
    Objective,
    build_row,
    corruptions,
    places_of,
    training_row,
)

ROW = "4,4,3,1"
NODES, AREAS = np.polynomial.legendre.leggauss(400)


def chances(draw: Bernoulli, smallest: float = 0.0):
    """What a draw's own schedule and levels give a subset of n of B tokens, in float64.

    Quadrature over u in (0, 1): in log u from `smallest` on if given.
    """
    if smallest:
        span = -np.log(smallest)
        u = np.exp(-span * (1 - NODES) / 2)
        mass = AREAS * span / 2 * u
    else:
        u, mass = (NODES + 1) / 2, AREAS / 2
    with jax.enable_x64(True):
        t = draw.low + (draw.high - draw.low) * jnp.asarray(u)
        p = np.asarray(jnp.vectorize(draw.schedule.p)(t))
        weight = np.asarray(draw.schedule.weight(t))

    def chance(n, size):
        own = {Flat: np.ones_like(weight), Realised: np.full_like(weight, size / n)}
        each = own.get(type(draw.weight), weight)
        return (mass * each * p**n * (1 - p) ** (size - n)).sum()

    return chance


def table_of(name=ROW) -> Table:
    return Table(blocks_of(*lay_out(ROWS[name])))


@pytest.mark.parametrize(
    "schedule",
    [Linear(), Cosine(), Polynomial(power=2.0), Polynomial(power=3.0), Polynomial(power=0.5)],
    ids=lambda s: f"{type(s).__name__}{getattr(s, 'power', '')}",
)
def test_the_bound_is_the_same_under_every_schedule(schedule):
    """P4: integrating p'/p over all times gives (2.2), to 1e-6: the classes' own in float64."""
    low = 1e-16
    draw = Bernoulli(schedule=schedule, low=low, high=1.0)
    table = table_of()
    found = table.integrate(chances(draw, low))
    assert np.allclose(found, table.exact(), rtol=1e-6)


def test_the_bias_of_a_clipped_law_is_a_truncated_beta_integral():
    """P4: levels on [a, b] give B(n, B - n + 1) (I_b - I_a) / (b - a) in place of 1/(n C(B, n))."""
    table = table_of()
    for low, high in ((0.3, 0.8), (0.45, 0.95), (0.5, 1.0)):

        def truncated(n, size, low=low, high=high):
            a, b = n, size - n + 1
            inside = special.betainc(a, b, high) - special.betainc(a, b, low)
            return special.beta(a, b) * inside / (high - low)

        expected = table.integrate(truncated)
        found = table.integrate(chances(Bernoulli(low=low, high=high)))
        assert np.allclose(found, expected, rtol=1e-6)
        assert np.abs(expected / table.exact() - 1).max() > 0.02


DRAWN = {
    "flat": Bernoulli(weight=Flat()),
    "realised": Bernoulli(weight=Realised()),
    "cosine": Bernoulli(schedule=Rescaled(schedule=Cosine()), low=0.0),
    "discrete": Bernoulli(schedule=Discrete(schedule=Polynomial(power=2.0), steps=5), low=0.0),
    "banded": Bernoulli(weight=Realised(), low=0.3, high=0.8),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_have_the_mean_of_their_integral(name):
    """P3: the Monte Carlo mean of every block is the integral of the draw's own law, 4 sigma."""
    places, trainable, masked, weight = sample(DRAWN[name], ROW)
    table = Table(blocks_of(places, trainable))
    draw = DRAWN[name]
    if name == "discrete":
        t = np.arange(1, 6) / 5
        w = 5 * (t**2 - (t - 0.2) ** 2) / t**2

        def chance(n, size):
            return (w * t ** (2 * n) * (1 - t**2) ** (size - n)).mean()

        expected = table.integrate(chance)
    else:
        expected = table.integrate(chances(draw))
    assert_mean(table.estimates(masked, weight), expected)


def test_realised_shares_estimate_b_over_b_plus_one_of_the_bound():
    """P15: the mean over all levels is B / (B + 1) times (2.2): exactly, and drawn."""
    table = table_of()
    sizes = np.array([len(block) for block in table.blocks])
    exact = table.exact() * sizes / (sizes + 1)
    draw = Bernoulli(weight=Realised(), low=1e-12)
    assert np.allclose(table.integrate(chances(draw)), exact, rtol=1e-9)
    _, _, masked, weight = sample(draw, ROW)
    assert_mean(table.estimates(masked, weight), exact)


def test_one_discrete_step_masks_everything_at_weight_one():
    """P19: T = 1 is the cross-entropy of all-masked blocks."""
    draw = Bernoulli(schedule=Discrete(steps=1), low=0.0)
    _, trainable, masked, weight = sample(draw, ROW)
    assert masked[:, trainable].all() and (weight[:, trainable] == 1).all()


def test_many_discrete_steps_approach_continuous_time():
    """P19: the error falls like 1 / T, for another schedule than the linear one too."""
    table = table_of()
    for schedule in (Linear(), Cosine()):
        errors = []
        for steps in (4, 64, 1024):
            with jax.enable_x64(True):
                t = (jnp.arange(steps, dtype=jnp.float64) + 0.5) / steps
                cells = Discrete(schedule=schedule, steps=steps)
                p, w = np.asarray(cells.p(t)), np.asarray(cells.weight(t))

            def chance(n, size, p=p, w=w):
                return (w * p**n * (1 - p) ** (size - n)).mean()

            errors.append(np.abs(table.integrate(chance) / table.exact() - 1).max())
        assert errors[0] > 0.01 and errors[2] < 2e-3
        assert errors[1] < errors[0] / 8 and errors[2] < errors[1] / 8


def test_the_variances_are_ordered():
    """P24: exact counts < realised shares (rescaled) < 1 / t on losses that rise with noise."""
    found = {}
    draws = {"exact": ExactCount(), "realised": Bernoulli(weight=Realised()), "bound": Bernoulli()}
    for name, draw in draws.items():
        _, _, masked, weight = sample(draw, "4,4,4,4")
        first, w = masked[:, :4], weight[:, :4]
        loss = 0.5 + first.mean(axis=1, keepdims=True)
        estimate = (w * first * loss).sum(axis=1)
        found[name] = (estimate * (5 / 4 if name == "realised" else 1)).var()
    assert 1.5 * found["exact"] < found["realised"] < found["bound"] / 1.5


def test_context_weights_are_the_double_sum():
    """P23: two scans against O(L^2) in float64: within documents, prompts and gaps included."""
    places, trainable = lay_out(ROWS["packed"])
    rng = np.random.default_rng(0)
    arrays = Places(*map(jnp.asarray, places))
    groups = group_by(arrays.segment, trainable=jnp.asarray(trainable))
    index = np.arange(len(trainable))
    distance = np.abs(index[:, None] - index)
    for p in (0.3, 0.8):
        for masked in rng.random((4, len(trainable))) < 0.6:
            masked &= trainable
            seen = (~masked & (places.segment != 0))[None]
            seen = seen & (places.segment[:, None] == places.segment) & (distance > 0)
            expected = (seen * 0.5 * p * (1 - p) ** (distance - 1.0)).sum(axis=1)
            got = Cart(p=p).weights(jnp.ones(len(masked)), jnp.asarray(masked), groups, arrays)
            assert np.allclose(np.asarray(got)[masked], expected[masked], atol=1e-6)


def test_beta_levels_are_the_quantiles():
    """P23: mean 1/2 and C = 2 is the uniform law; others agree with scipy; ends and middle."""
    u = jnp.linspace(0.001, 0.999, 101)
    uniform = Beta(steps=10, last_mean=0.5, first_concentration=2.0, last_concentration=2.0)
    assert np.abs(uniform.quantile(u, 5) - u).max() < 1e-6
    ramp = Beta(steps=100, last_mean=0.8, first_concentration=2.0, last_concentration=50.0)
    for step in (0, 50, 100, 1000):
        a, b = (float(x) for x in ramp.parameters(step))
        expected = special.betaincinv(a, b, np.asarray(u, np.float64))
        assert np.abs(ramp.quantile(u, step) - expected).max() < 2e-5


@pytest.mark.parametrize("step, mean, size", [(0, 0.5, 4), (50, 0.6, 14.5), (100, 0.7, 25)])
def test_the_parameters_of_the_beta_law_at_its_steps(step, mean, size):
    """SDAR-VL's table: straight to the last step, and there for good."""
    law = Beta(steps=100)
    assert np.allclose(law.parameters(step), (mean * size, (1 - mean) * size))
    assert np.allclose(law.parameters(100), law.parameters(10**6))


def test_levels_stay_in_the_band_and_above_the_floor():
    """P23: any law inside [low, high]; the floor is 1 / B of the group's trainable tokens."""
    places, trainable = lay_out(ROWS[ROW])
    labels = map(jnp.asarray, (places.segment, places.block))
    groups = group_by(*labels, trainable=jnp.asarray(trainable))
    key = jax.random.key(0)
    for law in (Beta(steps=10), Bernoulli().law):
        draw = Bernoulli(low=0.3, high=0.8, law=law)
        t = draw.levels(stratified(key, groups.size > 0, jnp.float32(0.5)), groups, 3)
        t = t[groups.size > 0]
        assert len(t) == 4 and (t >= 0.3).all() and (t <= 0.8).all()
    low = Bernoulli(high=0.002, block_floor=True).levels(jnp.zeros(16), groups, 0)
    assert np.allclose(low[:4], [1 / 4, 1 / 4, 1 / 3, 1])


def test_resampled_blocks_keep_their_share_in_the_band():
    """Four tokens in [0.45, 0.95] hold 2 or 3 masks, always; a block of one has no such share."""
    draw = Bernoulli(low=0.45, high=0.95)
    _, _, free, _ = sample(draw, ROW)
    _, _, masked, _ = sample(Bernoulli(low=0.45, high=0.95, resample=True), ROW)
    assert set(np.unique(masked[:, :4].sum(axis=1))) == {2, 3}
    assert set(np.unique(masked[:, 8:11].sum(axis=1))) == {2}
    assert (free[:, :4].sum(axis=1) == 0).any()
    assert 0 < masked[:, 11].mean() < 1


def test_forced_ids_are_always_masked_and_never_in_prompts():
    """Positions stand for ids here; the realised share counts the forced ones."""
    draw = Bernoulli(low=0.001, high=0.1, weight=Realised(), forced=(4, 6))
    _, trainable, masked, weight = sample(draw, "prompts")
    assert trainable[6] and not trainable[4]
    assert masked[:, 6].all() and not masked[:, 4].any()
    n = masked[:, 4:8].sum(axis=1)
    assert np.allclose(weight[:, 6], trainable[4:8].sum() / n)


BATCH = tiny.random_batch(8, 16, seed=3)


def row_of(objective: Objective, seed: int = 0):
    places = places_of(objective, BATCH, 4)
    views = corruptions(objective, BATCH, places, jax.random.key(seed))
    return views, build_row(objective, BATCH, 4, views)


def objective_of(draw: Draw, **fields) -> Objective:
    process = Absorbing(mask_id=tiny.MASK, draw=draw)
    return Objective(process=process, block_size=BlockSize(first=4), **fields)


@pytest.mark.parametrize("weight", [Flat(), Realised()], ids=lambda w: type(w).__name__)
def test_complements_score_every_trainable_token_once(weight):
    """P11: score(m) + score(~m) is the trainable indicator, for every pair of views, exactly."""
    draw = Complement(draw=Bernoulli(weight=weight))
    views, row = row_of(objective_of(draw, views=4, normaliser=Normaliser.MASKED))
    for first, second in (views[:2], views[2:]):
        both = np.asarray(first.scored, int) + np.asarray(second.scored, int)
        assert np.array_equal(both, BATCH.trainable)
        for view in (first, second):
            hidden = np.asarray(view.scored)
            assert np.array_equal(view.events, np.where(hidden, tiny.MASK, BATCH.tokens))
            assert ((np.asarray(view.weight) > 0) == hidden).all()
            if isinstance(weight, Flat):
                assert (np.asarray(view.weight)[hidden] == 1).all()
    assert not np.array_equal(views[0].scored, views[2].scored)
    assert row.diffusion_count == 2 * BATCH.trainable.sum()


@pytest.mark.parametrize("views", [1, 2])
def test_normalisers_are_their_definitions(views):
    """Weights over count, on known losses, against sums in float64."""
    draw = Bernoulli(low=0.2)
    found, expected = {}, {}
    for normaliser in Normaliser:
        drawn, row = row_of(objective_of(draw, views=views, normaliser=normaliser))
        loss = np.random.default_rng(1).exponential(size=row.diffusion.weight.shape)
        w = np.concatenate([np.asarray(v.weight, np.float64) for v in drawn], axis=1)
        scored = np.concatenate([np.asarray(v.scored) for v in drawn], axis=1)
        total = (np.asarray(row.diffusion.weight, np.float64) * loss).sum()
        found[normaliser] = total / float(row.diffusion_count)
        segment, trainable = np.asarray(BATCH.segment), np.asarray(BATCH.trainable)
        per = []
        for b in range(len(segment)):
            for s in range(1, segment[b].max() + 1):
                inside = segment[b] == s
                if (inside & trainable[b]).any():
                    own = np.tile(inside, views)
                    per.append((w * loss)[b, own].sum() / (inside & trainable[b]).sum())
        expected[normaliser] = {
            Normaliser.TRAINABLE: (w * loss).sum() / views / trainable.sum(),
            Normaliser.REAL: (w * loss).sum() / views / (segment != 0).sum(),
            Normaliser.MASKED: (w * loss).sum() / scored.sum(),
            Normaliser.PER_SAMPLE: np.mean(per) / views,
            Normaliser.SELF: (w * loss).sum() / w.sum(),
        }[normaliser]
    for normaliser in Normaliser:
        assert math.isclose(found[normaliser], expected[normaliser], rel_tol=1e-5), normaliser
    assert len({round(x, 4) for x in found.values()}) == len(Normaliser)


def test_nothing_to_score_is_nothing_under_every_normaliser():
    """Rows of prompts: zero weights and counts without a NaN."""
    nothing = BATCH._replace(trainable=BATCH.trainable & False)
    for normaliser in Normaliser:
        objective = objective_of(Bernoulli(), normaliser=normaliser)
        places = places_of(objective, nothing, 4)
        views = corruptions(objective, nothing, places, jax.random.key(0))
        row = build_row(objective, nothing, 4, views)
        assert not np.asarray(row.diffusion.weight).any()
        assert np.isfinite(row.diffusion_count)


SPREAD = {
    "pairs": objective_of(Complement(), views=2, normaliser=Normaliser.PER_SAMPLE),
    "resampled": objective_of(Bernoulli(low=0.3, resample=True), normaliser=Normaliser.SELF),
    "levels": objective_of(
        Bernoulli(law=Beta(steps=9), weight=Realised(), forced=(3,)), normaliser=Normaliser.MASKED
    ),
    "context": objective_of(Bernoulli(weight=Cart()), normaliser=Normaliser.REAL),
}


@pytest.mark.parametrize("name", SPREAD)
def test_rows_do_not_depend_on_the_mesh(name):
    """P16 for what is drawn: masks, weights and counts of eight devices are those of one."""

    @jax.jit
    def run(batch, step):
        return training_row(SPREAD[name], batch, step, jax.random.key(1))

    one = run(BATCH, 4)
    with jax.set_mesh(sharding.make_mesh(data=8)):
        eight = run(Batch(*(sharding.reshard(x, "batch", "length") for x in BATCH)), 4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert np.allclose(np.asarray(a), np.asarray(b), rtol=1e-6)
