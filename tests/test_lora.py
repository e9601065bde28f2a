"""LoRA: the first step sees the base, only pairs move, and merged is the same network."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from test_trainer import texts, tiny_config

import bdjax
from bdjax import LanguageModel, LoraConfig
from bdjax.base import start_params
from bdjax.checkpoint import CheckpointError
from bdjax.flops import step_flops
from bdjax.lora import TARGETS, join, merged, split
from bdjax.model import Remat
from bdjax.noise import Absorbing
from bdjax.objective import BlockSize, Objective, training_row
from bdjax.optim import OptimConfig, make_optimiser
from bdjax.parameters import Role
from bdjax.sharding import make_mesh, reshard
from bdjax.step import block_step
from bdjax.train_step import initial_state, train_step

OBJECTIVE = Objective(
    process=Absorbing(mask_id=tiny.MASK), block_size=BlockSize(first=4), ar_weight=0.5
)
BATCH = tiny.random_batch(4, 16, seed=3)
PLAIN = tiny.model()
LORA = LoraConfig(rank=3, alpha=6.0)
MODEL = replace(PLAIN, decoder=replace(PLAIN.decoder, lora=LORA, remat=Remat.FULL))
CONFIG = OptimConfig(warmup_fraction=0.0, peak_lr=0.05, ema_decay=0.5)
ROOT = jax.random.key(5)


def trained(model=MODEL, config=CONFIG, steps=3, mesh=None):
    """(state before, state after) of some steps from the plain model's parameters."""
    optimiser = make_optimiser(config, model.trained_table(), 10)
    with jax.set_mesh(make_mesh(**(mesh or {}))):
        own = jax.tree.map(lambda x: reshard(x, "batch", "length"), BATCH)
        base = PLAIN.init(jax.random.key(0))
        state = initial_state(0, model, optimiser, base)
        first = jax.device_get(state)
        for _ in range(steps):
            state, metrics = train_step(OBJECTIVE, model, optimiser, state, own, ROOT)
        assert np.isfinite(metrics["loss"])
        return first, jax.device_get(state)


@pytest.fixture(scope="module")
def states():
    return trained()


def hidden(model, params):
    row = training_row(OBJECTIVE, BATCH, 0, ROOT)
    return np.asarray(block_step(model, params, row.tokens, row.places)[0])


def test_the_first_step_sees_the_base_and_the_pairs_have_a_gradient(states):
    first, last = states
    base = first.frozen
    assert base is not None and not any("lora" in name for name in base["layers"])
    np.testing.assert_array_equal(hidden(MODEL, first.averaged), hidden(PLAIN, base))
    pairs = first.params["layers"]
    assert set(pairs) == {f"{target}_lora_{x}" for target in TARGETS for x in "ab"}
    for name, x in pairs.items():
        assert (np.abs(x).max() == 0) == name.endswith("b")
        assert np.abs(last.params["layers"][name] - x).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, last.frozen, base)


def test_what_is_frozen_has_no_state(states):
    # Adam's moments and the average: three of each trained number, none of a frozen one.
    _, last = states
    count = sum(x.size for x in jax.tree.leaves(last.params))
    assert set(last.params) == {"layers"} == set(last.ema)
    moments = sum(x.size for x in jax.tree.leaves(last.optimiser.inner) if x.ndim)
    assert moments == 2 * count
    assert sum(x.size for x in jax.tree.leaves(last.ema)) == count


def test_merged_is_the_same_network(states):
    _, last = states
    whole = join(last.params, last.frozen)
    alone = merged(whole, MODEL.table(), LORA)
    assert jax.tree.structure(alone) == jax.tree.structure(last.frozen)
    moved = {n: np.abs(alone["layers"][n] - last.frozen["layers"][n]).max() for n in TARGETS}
    assert min(moved.values()) > 1e-3
    with_pairs = hidden(MODEL, whole)
    np.testing.assert_allclose(hidden(PLAIN, alone), with_pairs, atol=1e-5, rtol=1e-5)
    assert np.abs(with_pairs - hidden(PLAIN, last.frozen)).max() > 1e-2


def test_the_pairs_move_as_their_product_would(states):
    # d loss / d B at B = 0 is scale A^T (d loss / d W), with W's inputs and outputs as they lie.
    first, _ = states
    row = training_row(OBJECTIVE, BATCH, 0, ROOT)

    def loss(model, params):
        return (block_step(model, params, row.tokens, row.places)[0] ** 3).sum()

    full = jax.grad(lambda p: loss(PLAIN, p))(first.frozen)["layers"]
    pairs = jax.grad(lambda p: loss(MODEL, join(p, first.frozen)))(first.params)["layers"]
    for target in TARGETS:
        inputs = len(PLAIN.decoder.layer_table()[target].contracted)
        a = first.params["layers"][f"{target}_lora_a"]
        axes = tuple(range(inputs))
        for layer in range(2):
            wanted = LORA.scale * np.tensordot(a[layer], full[target][layer], (axes, axes))
            found = pairs[f"{target}_lora_b"][layer]
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str
)
def test_meshes_change_nothing(mesh):
    # SGD-like, so that rounding shows as rounding.
    config = replace(CONFIG, eps=1.0, clip_norm=1e9, peak_lr=0.5)
    (_, here), (_, there) = trained(config=config), trained(config=config, mesh=mesh)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    with jax.set_mesh(make_mesh(**mesh)):
        params = MODEL.init(jax.random.key(0))
        alone = jax.jit(lambda p: merged(p, MODEL.table(), LORA))(params)
        for name in TARGETS:
            assert alone["layers"][name].sharding == params["layers"][name].sharding


@pytest.mark.slow
def test_pieces_change_nothing_and_muon_leaves_pairs_to_adam():
    config = replace(CONFIG, eps=1.0, clip_norm=1e9, peak_lr=0.5)
    (_, here), (_, there) = trained(config=config), trained(config=replace(config, accumulate=2))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    _, muon = trained(config=replace(config, muon=True))
    jax.tree.map(np.testing.assert_array_equal, muon.params, here.params)


def test_pairs_lie_as_their_matrices_do():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        params = jax.eval_shape(MODEL.init, jax.random.key(0))["layers"]
        places = {name: tuple(x.sharding.spec) for name, x in params.items()}
        assert places["wq_lora_a"] == (None, "fsdp", None)
        assert places["wq_lora_b"] == (None, None, "tensor", None)
        assert places["wo_lora_a"] == (None, "tensor", None, None)
        assert places["w_down_lora_a"] == (None, "tensor", None)
        assert places["w_down_lora_b"] == (None, None, "fsdp")


def test_some_targets_alone():
    some = LoraConfig(rank=2, targets=("wv", "w_down"))
    model = replace(PLAIN, decoder=replace(PLAIN.decoder, lora=some))
    moved, frozen = split(model.table(), some)
    assert set(moved["layers"]) == {f"{x}_lora_{y}" for x in ("wv", "w_down") for y in "ab"}
    assert all(p.role is Role.ADAPTER for p in moved["layers"].values())
    assert set(frozen["layers"]) == set(PLAIN.table()["layers"])
    params = model.init(jax.random.key(0))
    np.testing.assert_array_equal(hidden(model, params), hidden(PLAIN, split(params, some)[1]))


def test_frozen_matrices_cost_no_gradient():
    found = step_flops(MODEL, OBJECTIVE, [16], block_size=4, share=0.6)
    plain = step_flops(PLAIN, OBJECTIVE, [16], block_size=4, share=0.6)
    pairs = sum(np.prod(p.shape) for p in MODEL.trained_table()["layers"].values())
    assert found.body == plain.body * 4 / 6 + 6 * pairs * 16 * 2
    assert found.head == plain.head * 4 / 6 and found.attention == plain.attention


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0 must be above 0"),
        ({"targets": ("wq", "wx")}, "lora.targets=wq,wx must be some of wq, wk"),
        ({"targets": ("wq", "wq")}, "each once"),
        ({"targets": ()}, "type lora.targets=wq,wv"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**wrong)


# Runs


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    """Config and folder of a run with random parameters."""
    folder = tmp_path_factory.mktemp("lora")
    config = tiny_config(texts(folder / "texts"))
    model = config.build_model()
    params = model.init(jax.random.key(7))
    bdjax.save(LanguageModel(config=config, model=model, params=params), folder / "base")
    return config, folder


def lora_config(base_run):
    config, folder = base_run
    lora = LoraConfig(rank=2, targets=("wq", "wo", "w_up"))
    return replace(
        config,
        model=replace(config.model, lora=lora),
        start_from=str(folder / "base"),
        optim=replace(config.optim, ema_decay=0.5, peak_lr=0.05),
        steps=4,
        checkpoint_every=2,
    )


def quiet(config, folder, **options):
    return bdjax.train(config, folder, say=lambda text: None, **options)


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


def test_a_lora_run_is_whole_in_its_folder_and_merges_into_an_ordinary_one(base_run, tmp_path):
    config, folder = base_run
    before = jax.device_get(bdjax.load(folder / "base").params)
    whole = quiet(lora_config(base_run), tmp_path / "whole")
    (tmp_path / "whole").rename(tmp_path / "moved")
    for place in ("moved", "moved/checkpoints", "moved/checkpoints/4"):
        loaded = bdjax.load(tmp_path / place)
        assert_equal(loaded.params, whole.model.params)
    moved, frozen = split(loaded.params, loaded.config.model.lora)
    assert_equal(frozen, before)
    assert max(np.abs(x).max() for name, x in moved["layers"].items() if name[-1] == "b") > 1e-3
    # The base is written once: checkpoints name the pairs alone.
    manifest = json.loads((tmp_path / "moved/checkpoints/4/bdjax.json").read_text())
    names = {name.split("/")[-1] for name in manifest["leaves"] if name.startswith("params/")}
    assert names == set(moved["layers"])

    bdjax.save(bdjax.merge(loaded), tmp_path / "merged")
    alone = bdjax.load(tmp_path / "merged")
    assert alone.config.model == config.model and alone.config.start_from is None
    assert jax.tree.structure(alone.params) == jax.tree.structure(before)
    # Whoever starts from a LoRA run starts from it merged.
    with jax.set_mesh(config.mesh.build()):
        started = start_params(replace(config, start_from=str(tmp_path / "moved")))
    assert_equal(started, alone.params)

    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(CheckpointError, match="LoRA run without its folder base"):
        bdjax.load(tmp_path / "moved")


@pytest.mark.slow
def test_a_lora_run_that_was_stopped_goes_on_bitwise(base_run, tmp_path, monkeypatch):
    config = lora_config(base_run)
    whole = quiet(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/checkpoints/4")
    monkeypatch.setattr("bdjax.trainer.start_params", lambda config: pytest.fail("read again"))
    again = quiet(config, tmp_path / "half", resume=True)
    assert_equal(again.model.params, whole.model.params)
    alone = bdjax.merge(whole.model)
    nll = [bdjax.evaluate(m, config.documents()[1]) for m in (whole.model, alone)]
    assert abs(nll[0].diffusion.nats_per_token - nll[1].diffusion.nats_per_token) < 1e-5


@pytest.mark.slow
def test_full_fine_tuning_starts_from_a_runs_parameters(base_run, tmp_path):
    config, folder = base_run
    # Steps that move nothing: what is saved are the parameters that it began with.
    still = replace(config, steps=1, optim=replace(config.optim, peak_lr=1e-30, weight_decay=0.0))
    found = quiet(replace(still, start_from=str(folder / "base")), tmp_path / "run").model
    assert_equal(found.params, bdjax.load(folder / "base").params)


def test_starts_that_do_not_fit_say_what_to_type(base_run):
    config, folder = base_run
    start = str(folder / "base")

    def start_with(place=start, **model):
        with jax.set_mesh(config.mesh.build()):
            changed = replace(config.model, **model)
            return start_params(replace(config, model=changed, start_from=place))

    assert_equal(start_with(), bdjax.load(folder / "base").params)
    with pytest.raises(ValueError, match=r"has model.width=32, and .*=64; type model.width=32"):
        start_with(width=64)
    with pytest.raises(ValueError, match=r"model.qk_norm=False, .*True; type model.qk_norm=false"):
        start_with(qk_norm=True)
    with pytest.warns(UserWarning, match="was trained with model.rope_theta=10000.0, and goes on"):
        start_with(rope_theta=500.0)
    with pytest.raises(CheckpointError, match="none"):
        start_with(str(folder / "none"))
    with pytest.raises(ValueError, match="nothing says which; type start_from="):
        replace(config, model=replace(config.model, lora=LoraConfig()))
