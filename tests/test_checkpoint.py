"""What was saved comes back on any mesh; what is damaged or foreign is named, never loaded."""

import json
import math
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from bdjax import manifest
from bdjax.checkpoint import CheckpointError, Checkpoints, read_config, restore_params
from bdjax.optim import OptimConfig, make_optimiser
from bdjax.parameters import Parameter, Role, map_table
from bdjax.sharding import make_mesh, reshard

D, F = 16, 24
CONFIG = '{"type": "Run", "seed": 1}'
TABLE = {
    "norm": Parameter(shape=(D,), axes=("embed",), init=jax.nn.initializers.ones, role=Role.NORM),
    "layers": {
        "up": Parameter(
            shape=(2, D, F),
            axes=("layers", "embed_in", "mlp"),
            init=jax.nn.initializers.normal(),
            role=Role.MATRIX,
            contracted=(1,),
        )
    },
}


class State(NamedTuple):
    step: jax.Array
    params: dict
    optimiser: tuple
    key: jax.Array


def fresh(seed=0):
    def one(p):
        values = jnp.linspace(seed, seed + 1, math.prod(p.shape)).reshape(p.shape)
        return reshard(values, *p.axes)

    params = map_table(one, TABLE)
    inner = make_optimiser(OptimConfig(muon=True), TABLE, 10).init(params)
    return State(jnp.asarray(seed), params, inner, jax.random.key(seed))


def abstract():
    return jax.eval_shape(fresh)


def raw(leaf):
    return np.asarray(jax.random.key_data(leaf) if leaf.dtype == jax.random.key(0).dtype else leaf)


def assert_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), got, wanted)


@pytest.fixture
def run(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, fresh(step), CONFIG, {"position": step})
    return tmp_path


def latest(run: Path) -> Path:
    return run / "checkpoints" / "2"


def test_the_newest_comes_back(run):
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [1, 2]
    step, state, data = checkpoints.restore(abstract())
    assert (step, data) == (2, [{"position": 2}])
    assert_equal(state, fresh(2))
    assert checkpoints.restore(abstract(), step=1)[2] == [{"position": 1}]
    for folder in (run, run / "checkpoints", latest(run)):
        assert read_config(folder) == CONFIG


def test_other_meshes(run):
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        _, state, _ = Checkpoints(run).restore(abstract())
        assert state.params["layers"]["up"].sharding.spec == P(None, "fsdp", "tensor")
        assert_equal(state, fresh(2))
        save(run, 3, state)
    with jax.set_mesh(make_mesh(tensor=8)):
        _, state, _ = Checkpoints(run).restore(abstract())
        assert state.params["layers"]["up"].sharding.spec == P(None, None, "tensor")
    assert_equal(Checkpoints(run).restore(abstract())[1], fresh(2))


def test_parameters_alone_in_another_dtype(run):
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract().params)
    step, params = restore_params(run / "checkpoints" / "1", wanted)
    assert step == 1
    assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), fresh(1).params))


def save(folder, step, state=None, **options):
    with Checkpoints(folder, **options) as checkpoints:
        checkpoints.save(step, fresh(step) if state is None else state, CONFIG)


def fail(*_):
    raise OSError("the cable is out")


def test_old_checkpoints_go_only_when_the_new_one_is_whole(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", fail)
        with pytest.raises(CheckpointError, match="of step 3 could not be written.*cable"):
            save(run, 3, keep=1)
    # Nothing of a failed save takes up room.
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2"]
    shutil.copytree(latest(run), run / "checkpoints" / "3")
    (run / "checkpoints" / "3" / "bdjax.json").unlink()
    with pytest.warns(UserWarning, match="3 is a save that never finished.*; reading .*2 instead"):
        assert Checkpoints(run).restore(abstract())[0] == 2
    save(run, 3, keep=1)
    assert Checkpoints(run).steps() == [3]
    with pytest.raises(CheckpointError, match="already a whole checkpoint"):
        save(run, 3)


def test_a_save_that_failed_is_told_at_the_next_call_and_once(run, monkeypatch):
    with Checkpoints(run) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "settle", fail)
            checkpoints.save(3, fresh(3), CONFIG)
            with pytest.raises(CheckpointError, match="cable"):
                checkpoints.save(4, fresh(4), CONFIG)
            checkpoints.check()
            checkpoints.save(4, fresh(4), CONFIG)
            with pytest.raises(CheckpointError, match="of step 4.*cable"):
                for _ in range(1000):
                    checkpoints.check()
                    time.sleep(0.02)
        checkpoints.check()
        checkpoints.save(4, fresh(4), CONFIG)
    assert Checkpoints(run).steps() == [2, 4]


def test_a_save_goes_on_while_its_arrays_are_donated(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"params": {"small": jnp.arange(8.0), "large": jnp.arange(300_000.0)}}
    wanted = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, CONFIG)
        for _ in range(3):
            state = step(state)
    assert_equal(Checkpoints(tmp_path).restore(jax.tree.map(jnp.zeros_like, wanted))[1], wanted)


def test_the_newest_and_every_so_many_steps_stay(tmp_path):
    state = {"params": {"w": jnp.zeros(3)}}
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, state, CONFIG)
    assert Checkpoints(tmp_path).steps() == [4, 8, 9, 10]


def test_what_a_killed_process_left_goes_with_the_next_save(run):
    oldest = run / "checkpoints" / "1"
    (oldest / "bdjax.json").unlink()
    shutil.rmtree(oldest / "arrays")
    save(run, 3)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "3"]


def test_folders_of_others_are_never_deleted(tmp_path):
    foreign = tmp_path / "checkpoints" / "1"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_bytes(b"x")
    for step in (2, 3):
        save(tmp_path, step, keep=1)
    assert (foreign / "model.safetensors").exists() and Checkpoints(tmp_path).steps() == [3]


def test_the_moving_average_is_what_is_read_alone(tmp_path):
    state = {"params": {"w": jnp.zeros(3)}, "ema": {"w": jnp.ones(3)}, "step": jnp.zeros(())}
    save(tmp_path, 1, state)
    # The rest is not read: it may even be gone bad.
    flip(largest(tmp_path / "checkpoints" / "1" / "arrays" / "params"), 0)
    assert_equal(restore_params(tmp_path, state["params"])[1], state["ema"])
    with pytest.raises(CheckpointError, match="arrays/params/.* have changed"):
        Checkpoints(tmp_path).restore(state)


def largest(path: Path) -> Path:
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    file = largest(path / "arrays")
    file.write_bytes(file.read_bytes()[:-7])


FAULTS = {
    "truncated array": (truncate, "damaged: .* bytes, expected"),
    "deleted array": (lambda p: largest(p / "arrays").unlink(), "damaged: .* is missing"),
    "deleted folder": (lambda p: shutil.rmtree(p / "arrays"), "damaged: .* is missing"),
    "truncated manifest": (
        lambda p: (p / "bdjax.json").write_text((p / "bdjax.json").read_text()[:-20]),
        "bdjax.json is damaged, expected JSON",
    ),
    "binary manifest": (
        lambda p: (p / "bdjax.json").write_bytes(b"\xff\xfe"),
        "bdjax.json is damaged",
    ),
    "half a manifest": (lambda p: edited(p, files=None), "bdjax.json is damaged"),
    "deleted manifest": (lambda p: (p / "bdjax.json").unlink(), "a save that never finished"),
    "half deleted": (
        lambda p: ((p / "bdjax.json").unlink(), shutil.rmtree(p / "arrays")),
        "a save that never finished",
    ),
    "deleted config": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), "a save that never finished"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_torn_newest_falls_back_and_a_torn_only_one_is_an_error(run, fault):
    tear, sentence = FAULTS[fault]
    tear(latest(run))
    with pytest.warns(UserWarning, match=sentence):
        assert Checkpoints(run).restore(abstract())[0] == 1
    with pytest.warns(UserWarning, match=sentence):
        assert read_config(run) == CONFIG
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoints(run).restore(abstract(), step=2)
    shutil.rmtree(run / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match=sentence) as error:
        Checkpoints(run).restore(abstract())
    assert str(latest(run)) in str(error.value) and "\n" not in str(error.value)
    save(run, 2)
    assert Checkpoints(run).restore(abstract())[0] == 2


def flip(file: Path, place: int):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << (place % 8)
    file.write_bytes(content)


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_is_noticed_or_means_nothing(run, seed):
    draw = random.Random(seed)
    files = sorted(p for p in latest(run).rglob("*") if p.is_file() and p.stat().st_size)
    # Small files are as likely as large ones.
    file = draw.choice(files)
    flip(file, draw.randrange(file.stat().st_size))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step, state, data = Checkpoints(run).restore(abstract())
    assert step == 2 or any("damaged" in str(w.message) for w in said)
    assert data == [{"position": step}]
    assert_equal(state, fresh(step))
    assert read_config(run) == CONFIG


@pytest.mark.parametrize(
    ("old", "new"),
    [('"step": 2', '"step": 3'), ('"data/0.json"', '"data/1.json"'), ('"crc32"', '"crc33"')],
)
def test_a_changed_manifest_is_damage(run, old, new):
    file = latest(run) / "bdjax.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.warns(UserWarning, match="2.*is damaged.*reading .*1 instead"):
        assert Checkpoints(run).restore(abstract())[0] == 1


def test_a_checkpoint_gone_bad_makes_room_for_the_next(run):
    flip(largest(latest(run) / "arrays"), 5)
    with Checkpoints(run, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="have changed; reading .*1 instead"):
            assert checkpoints.restore(abstract())[0] == 1
        checkpoints.save(2, fresh(2), CONFIG)
        checkpoints.save(3, fresh(3), CONFIG)
    # Whole again, it is kept like any other.
    assert Checkpoints(run).steps() == [2, 3]
    assert_equal(Checkpoints(run).restore(abstract(), step=2)[1], fresh(2))


def edited(path: Path, **changes):
    file = path / "bdjax.json"
    changed = json.loads(file.read_text()) | changes
    del changed["crc32"]
    file.write_text(json.dumps(changed | {"crc32": manifest.checksum(changed)}))


def test_foreign_folders(run, tmp_path):
    def refused(sentence, folder=run, step=None):
        with pytest.raises(CheckpointError, match=sentence):
            restore_params(folder, abstract().params, step)

    refused("there is no folder .*nowhere; type the folder of a run", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty holds no checkpoint: expected folders like", tmp_path / "empty")
    refused("no checkpoint of step 7; type one of 1, 2", step=7)
    edited(latest(run), version=3)
    refused("has checkpoint format 3, and this bdjax reads format 2; type pip install")
    edited(latest(run), version=1)
    refused("has checkpoint format 1, and this bdjax reads format 2; read it with the bdjax")
    edited(latest(run), format="other")
    refused("bdjax.json is not ours")
    (latest(run) / "bdjax.json").write_text("[]")
    refused("bdjax.json is not ours")
    shutil.rmtree(latest(run))
    latest(run).mkdir()
    (latest(run) / "model.safetensors").write_bytes(b"x")
    refused("2 was not written by bdjax")
    with pytest.raises(CheckpointError, match="was not written by bdjax"):
        save(run, 2)


def test_another_config(run):
    state = abstract()
    bigger = state.params | {"norm": jax.ShapeDtypeStruct((D + 1,), jnp.float32)}
    with pytest.raises(
        CheckpointError, match=r"params/norm is \[16\] in it and \[17\] here.*config"
    ):
        restore_params(run, bigger)
    with pytest.raises(CheckpointError, match=r"params/norm is \[16\] in it and absent here"):
        restore_params(run, {"layers": state.params["layers"]})
    adam = state._replace(optimiser=jax.eval_shape(optax.adam(1.0).init, state.params))
    with pytest.raises(CheckpointError, match="does not fit this config: optimiser/.* more"):
        Checkpoints(run).restore(adam)


def test_what_cannot_be_asked(tmp_path):
    with pytest.raises(ValueError, match="keep=0 would delete every checkpoint"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="a state holds `params`; this one has step"):
        Checkpoints(tmp_path).save(1, {"step": jnp.zeros(())}, CONFIG)
