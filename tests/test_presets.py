"""Every recipe builds, trains in one program whatever its numbers do, scores the same tokens."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trainer import BATCH, BLOCK, ROW, texts, tiny_config

from bdjax import Alignment, BlockSize, LanguageModel, generate, presets
from bdjax.config import config_from_json
from bdjax.data import training_batches
from bdjax.likelihood import to_device
from bdjax.objective import Batch, build_row, corruptions, places_of
from bdjax.optim import make_optimiser
from bdjax.overrides import to_json
from bdjax.step import block_step
from bdjax.tokenizer import ByteTokenizer
from bdjax.train_step import initial_state, train_step
from pallas_kernels import CleanMode

MASK = ByteTokenizer.mask_id
RECIPES = {
    "default": presets.default(mask_id=MASK, block_size=BLOCK),
    "ar": presets.ar(mask_id=MASK),
    "mdlm": presets.mdlm(mask_id=MASK, row_length=ROW),
    "bd3lm": presets.bd3lm(mask_id=MASK, block_size=BLOCK),
    "sdar": presets.sdar(mask_id=MASK, block_size=BLOCK),
    "shifted-clean": presets.default(
        mask_id=MASK, block_size=BLOCK, views=2, alignment=Alignment.SHIFTED_CLEAN
    ),
    "shifted-noisy": presets.default(
        mask_id=MASK, block_size=BLOCK, ar_weight=0.0, alignment=Alignment.SHIFTED_NOISY
    ),
}
PUBLISHED = {
    "md4": presets.md4(mask_id=MASK, row_length=ROW, steps=100),
    "sdar_vl": presets.sdar_vl(mask_id=MASK, steps=3, forced=(32,)),
    "nbdiff": presets.nbdiff(mask_id=MASK, double_every=1, block_size=8),
    "tdar": presets.tdar(mask_id=MASK, stage_steps=1, stages=(2, 4, 8)),
    "fast_dllm_v2": presets.fast_dllm_v2(mask_id=MASK, block_size=BLOCK),
    "llada2": presets.llada2(mask_id=MASK, block_size=BLOCK, complement=True),
}
RECIPES |= PUBLISHED
# Their draws have fast tests of their own.
SLOW = {*PUBLISHED, "sdar", "bd3lm", "shifted-noisy"}
TRAINED = [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in RECIPES]
GROWING = BlockSize(first=1, last=8, double_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return texts(tmp_path_factory.mktemp("texts"))


def config_of(folder, recipe):
    config = tiny_config(folder)
    model = replace(config.model, clean=recipe.clean)
    return replace(config, model=model, objective=recipe.objective)


def batches_of(config):
    documents, _ = config.documents()
    packing, rows = config.packing(), config.data.batch_size
    return training_batches(documents, config.tokenizer, packing, rows, config.seed)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_config_comes_back_from_json(folder, name):
    config = config_of(folder, RECIPES[name])
    assert config_from_json(to_json(config)) == config


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_in_one_program_whatever_its_numbers_do(folder, name):
    objective = RECIPES[name].objective
    if objective.documents and objective.views and name not in PUBLISHED:
        # The size grows from 1 to 8 on the way. The other recipes fix theirs.
        objective = replace(objective, block_size=GROWING)
    config = config_of(folder, RECIPES[name]._replace(objective=objective))
    batches, root = batches_of(config), jax.random.key(0)
    programs = train_step._cache_size()
    losses, sizes = [], []
    with jax.set_mesh(config.mesh.build()):
        model = config.build_model()
        optimiser = make_optimiser(config.optim, model.table(), config.steps)
        state = initial_state(config.seed, model, optimiser)
        for prompt in (0, 0, 9, ROW - 1):
            batch = to_device(next(batches))
            # A prompt is untrainable text; a row that is nothing else must not divide by zero.
            batch = batch._replace(trainable=batch.trainable & (batch.position > prompt))
            state, metrics = train_step(objective, model, optimiser, state, batch, root)
            losses.append(float(metrics["loss"]))
            sizes.append(int(metrics["block_size"]))
    assert train_step._cache_size() == programs + 1
    assert np.isfinite(losses).all() and losses[0] > 0
    assert int(metrics["skipped_steps"]) == 0
    if objective.block_size is GROWING:
        assert sizes == [1, 2, 4, 8]
    finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), state.params)
    assert all(jax.tree.leaves(finite))


@cache
def _scored(objective):
    @jax.jit
    def run(batch: Batch, keys):
        """Which positions are labels of any entry with weight, over several draws."""

        def one(key):
            places = places_of(objective, batch, BLOCK)
            row = build_row(objective, batch, BLOCK, corruptions(objective, batch, places, key))
            hit = jnp.zeros(batch.segment.shape, bool)
            if row.diffusion is not None:
                hit |= row.diffusion.scored & (row.diffusion.weight > 0)
            return hit if row.ar is None else hit | jnp.roll(row.ar.scored, 1, axis=1)

        return jax.vmap(one)(keys).any(axis=0)

    return run


@pytest.mark.parametrize("name", ["default", "ar", "bd3lm", "sdar"])
def test_all_recipes_score_the_same_tokens(folder, name):
    config = config_of(folder, RECIPES[name])
    batch = Batch(**{k: jnp.asarray(v) for k, v in next(batches_of(config)).items()})
    # Each part of the loss by itself, or the next-token half would hide what the masks leave out.
    parts = [replace(RECIPES[name].objective, ar_weight=0.0)] if name == "default" else []
    for objective in [RECIPES[name].objective, *parts]:
        # Every token is masked in one of 64 draws: the rarest level is drawn but for 1e-5.
        found = _scored(objective)(batch, jax.random.split(jax.random.key(1), 64))
        np.testing.assert_array_equal(found, batch.trainable)


def test_all_recipes_of_a_block_size_read_the_same_rows(folder):
    blocks = ("default", "bd3lm", "sdar", "shifted-clean", "shifted-noisy")
    first, *others = (next(batches_of(config_of(folder, RECIPES[name]))) for name in blocks)
    assert first["tokens"].shape == (BATCH, ROW)
    for other in others:
        assert all(np.array_equal(first[field], other[field]) for field in first)


def test_a_recipe_cannot_be_built_into_a_leak(folder):
    leak = presets.default(mask_id=MASK, block_size=BLOCK)._replace(clean=CleanMode.BLOCK)
    with pytest.raises(ValueError, match="leaks: .* type model.clean=token"):
        config_of(folder, leak)


def test_an_ar_model_writes_with_the_probabilities_it_was_trained_on(folder):
    # Its masked slots were never trained: each token must be read from the clean one before.
    config = config_of(folder, RECIPES["ar"])
    model = config.build_model()
    params = model.init(jax.random.key(3))
    language_model = LanguageModel(config=config, model=model, params=params)
    (written,) = generate(language_model, ["the"], max_new_tokens=12, stop=(), seed=1)
    ids = [ByteTokenizer.bos_id, *b"the", *written.tokens.tolist()]
    index = np.arange(ROW)
    row = {
        "tokens": np.resize(ids, ROW),
        "segment": (index < len(ids)).astype(np.int32),
        "position": index,
        "trainable": (index > 3) & (index < len(ids)),
    }
    batch = Batch(**{name: jnp.asarray(x)[None] for name, x in row.items()})
    places = places_of(config.objective, batch, 1)
    hidden, _ = block_step(model, params, batch.tokens, places)
    labels, scored = batch.tokens[:, 1:], batch.trainable[:, 1:]
    rows = jnp.arange(ROW - 1)[None]
    nll = model.readout.nll(params, hidden, rows, labels, scored)[0]
    np.testing.assert_allclose(-nll[scored[0]], written.logprob_raw, atol=1e-4)
