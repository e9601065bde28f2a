"""What changes with the step: tables at the boundary steps, and one compilation for all of them."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_objective import SYMBOLS, TEXTS, Oracle, oracle_bound
from test_trainer import tiny_config

from bdjax import presets
from bdjax.config import config_from_json
from bdjax.likelihood import scoring
from bdjax.loss import Pair, total
from bdjax.noise import Bernoulli, Beta, Bound, Complement, ExactCount, Flat
from bdjax.objective import (
    Alignment,
    BlockStages,
    Normaliser,
    Ramp,
    training_row,
)
from bdjax.overrides import apply_overrides, to_json, to_text

MASK = tiny.MASK
WSD = {"row_length": 256, "warmup_steps": 40, "stable_steps": 100, "decay_steps": 30}
NEW = {
    "md4": presets.md4(mask_id=MASK, row_length=16, steps=1000),
    "bd3lm": presets.bd3lm(mask_id=MASK, block_size=4, low=0.45, high=0.95, resample=True),
    "sdar_vl": presets.sdar_vl(mask_id=MASK, steps=100, forced=(3, 5)),
    "tdar": presets.tdar(mask_id=MASK, stage_steps=10, stages=(2, 4, 8)),
    "nbdiff": presets.nbdiff(mask_id=MASK, double_every=10, begin=20, block_size=8),
    "fast_dllm_v2": presets.fast_dllm_v2(mask_id=MASK, block_size=4),
    "llada2": presets.llada2(mask_id=MASK, block_size=4),
    "llada2_pairs": presets.llada2(mask_id=MASK, block_size=4, complement=True),
    "llada2_wsd": presets.llada2_wsd(mask_id=MASK, **WSD),
}


def sizes(block_size, steps) -> list[int]:
    return [int(block_size.at(jnp.asarray(step))) for step in steps]


def test_nbdiff_doubles_from_its_first_step_on():
    """B(s) = min(Bmax, B0 2^floor(max(0, s - s0) / delta)) at s0 - 1, s0, s0 + delta - 1, ..."""
    size = presets.nbdiff(mask_id=MASK, double_every=10, begin=20).objective.block_size
    steps = [0, 19, 20, 29, 30, 39, 40, 50, 60, 69, 70, 10**6]
    assert sizes(size, steps) == [1, 1, 1, 1, 2, 2, 4, 8, 16, 16, 32, 32]
    assert size.largest == 32


def test_tdar_keeps_its_sizes_for_a_stage():
    """4 -> 8 -> 16 -> 32 -> 64, the last for good."""
    size = presets.tdar(mask_id=MASK, stage_steps=100).objective.block_size
    steps = [0, 99, 100, 199, 200, 299, 300, 399, 400, 10**6]
    assert sizes(size, steps) == [4, 4, 8, 8, 16, 16, 32, 32, 64, 64]


def test_llada2_warms_up_holds_and_decays():
    """1, 4, 32, 64, the row; then half of it and on down to 32, every stage for its share."""
    size = NEW["llada2_wsd"].objective.block_size
    assert size.stages == (1, 4, 32, 64, 256, 128, 64, 32)
    steps = [0, 9, 10, 19, 20, 29, 30, 39, 40, 139, 140, 149, 150, 159, 160, 10**6]
    expected = [1, 1, 4, 4, 32, 32, 64, 64, 256, 256, 128, 128, 64, 64, 32, 32]
    assert sizes(size, steps) == expected
    assert size.largest == 256
    long = presets.llada2_wsd(mask_id=MASK, **WSD | {"row_length": 4096, "decay_steps": 70})
    assert long.objective.block_size.stages[4:] == (4096, 2048, 1024, 512, 256, 128, 64, 32)


@pytest.mark.parametrize(
    "wrong", [{"row_length": 96}, {"row_length": 64}, {"warmup_steps": 3}, {"decay_steps": 2}]
)
def test_conversions_that_cannot_be_staged_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.*type"):
        presets.llada2_wsd(mask_id=MASK, **WSD | wrong)


@pytest.mark.parametrize(
    "step, expected", [(0, 0.5), (20, 0.5), (35, 0.25), (50, 0.0), (10**6, 0.0)]
)
def test_the_next_token_weight_falls_while_blocks_grow(step, expected):
    """NBDiff's ramp ends with the largest block; the loss uses the step's own weight."""
    objective = NEW["nbdiff"].objective
    assert math.isclose(objective.ar_weight_at(step), expected)
    part = Pair(jnp.asarray(6.0), jnp.asarray(2.0))
    assert math.isclose(total(objective, {"ar": part, "diffusion": part}, step), 3 + 3 * expected)
    assert objective.scores_ar
    assert objective.ar_weight == Ramp(first=0.5, last=0.0, begin=20, end=50)


def test_the_published_settings():
    """Traps 1 to 4: scope, weight, normaliser, band and views that papers and code differ in."""
    draws = {name: recipe.objective.process.draw for name, recipe in NEW.items()}
    assert draws["sdar_vl"].scope.value == "block" and draws["tdar"].scope.value == "document"
    pair = draws["fast_dllm_v2"]
    assert isinstance(pair, Complement) and pair.draw == Bernoulli(weight=Flat())
    assert (draws["llada2"].low, draws["llada2"].high) == (0.3, 0.8)
    assert isinstance(draws["llada2"].weight, Flat)
    fast, llada = NEW["fast_dllm_v2"].objective, NEW["llada2"].objective
    assert fast.normaliser is llada.normaliser is Normaliser.MASKED
    assert fast.alignment is Alignment.SHIFTED_NOISY and not fast.documents
    for low, weight in ((0.45, Bound()), (0.5, Bound()), (0.55, Flat())):
        recipe = presets.bd3lm(mask_id=MASK, block_size=4, low=low)
        assert recipe.objective.process.draw.weight == weight


BATCH = tiny.random_batch(4, 16, seed=3)


@pytest.mark.parametrize("name", ["sdar_vl", "nbdiff", "llada2_wsd"])
def test_a_whole_curriculum_compiles_once(name):
    """P17: levels, sizes and weights move with the step in one program, and do move."""
    objective = NEW[name].objective
    compiled = []

    @jax.jit
    def run(step, key):
        compiled.append(name)
        row = training_row(objective, BATCH, step, key)
        part = Pair(jnp.float32(1.0), jnp.float32(1.0))
        weight = total(objective, {"ar": part}, step)
        size = objective.block_size.at(step)
        return size, row.places.block.max(), row.diffusion.scored.sum(), weight

    found = [run(step, jax.random.key(0)) for step in range(0, 180, 9)]
    assert len(compiled) == 1
    assert len({tuple(map(float, x)) for x in found}) > 3


def test_levels_of_the_curriculum_rise_with_the_step():
    """SDAR-VL: the mean masked share goes from 0.5 to 0.7."""
    law = Beta(steps=100)
    u = (jnp.arange(200) + 0.5) / 200
    assert np.allclose(
        [law.quantile(u, s).mean() for s in (0, 50, 100)], [0.5, 0.6, 0.7], atol=1e-3
    )


def config_of(folder, recipe, **data):
    config = tiny_config(folder)
    process = replace(recipe.objective.process, mask_id=config.objective.process.mask_id)
    objective = replace(recipe.objective, process=process)
    row_length = max(config.data.row_length, objective.block_size.largest)
    data = replace(config.data, row_length=row_length, **data)
    model = replace(config.model, clean=recipe.clean)
    return replace(config, model=model, objective=objective, data=data)


@pytest.mark.parametrize("name", NEW)
def test_every_preset_comes_back_from_json_and_from_its_own_lines(name, tmp_path):
    config = config_of(tmp_path, NEW[name])
    assert config_from_json(to_json(config)) == config
    assert apply_overrides(config, to_text(config).splitlines()) == config


def test_a_process_can_be_named_on_the_command_line(tmp_path):
    config = config_of(tmp_path, NEW["llada2"])
    mask = config.objective.process.mask_id
    lines = ["objective.process=Absorbing", f"objective.process.mask_id={mask}"]
    changed = apply_overrides(config, lines)
    assert changed.objective.process.draw == ExactCount()
    ramp = [*lines, "model.clean=token", "objective.ar_weight=Ramp"]
    ramp += [f"objective.ar_weight.{x}" for x in ("first=0.5", "last=0.0", "end=9")]
    assert apply_overrides(config, ramp).objective.ar_weight == Ramp(first=0.5, last=0.0, end=9)
    with pytest.raises(ValueError, match="expected one of .*Absorbing"):
        apply_overrides(config, ["objective.process=Absorb"])


def test_sizes_that_do_not_divide_the_largest_need_unaligned_rows(tmp_path):
    stages = BlockStages(stages=(4, 6, 8), begins=(0, 10, 20))
    recipe = NEW["llada2"]
    recipe = recipe._replace(objective=replace(recipe.objective, block_size=stages))
    with pytest.raises(ValueError, match=r"6 does not divide .* 8.*type data.aligned=false"):
        config_of(tmp_path, recipe)
    assert not config_of(tmp_path, recipe, aligned=False).data.aligned


@pytest.mark.parametrize("name", ["sdar_vl", "tdar", "llada2_pairs", "llada2_wsd"])
def test_presets_are_scored_by_the_unbiased_bound(name):
    """Evaluation of an oracle gives -log p however the preset draws, weighs and divides."""
    recipe = NEW[name]
    process = replace(recipe.objective.process, mask_id=SYMBOLS)
    scored = scoring(replace(recipe.objective, process=process))
    assert scored.views == 1 and scored.process.draw == ExactCount()
    assert scored.normaliser is Normaliser.TRAINABLE
    bound = oracle_bound(scored, TEXTS["packed"], 2, recipe.clean)
    assert np.isclose(bound, Oracle().nll(TEXTS["packed"], 2), rtol=1e-6)
