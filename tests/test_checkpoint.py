"""What was saved comes back on any mesh; what is damaged or foreign is named, never loaded."""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

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
    assert (step, data) == (2, {"position": 2})
    assert_equal(state, fresh(2))
    assert checkpoints.restore(abstract(), step=1)[2] == {"position": 1}
    for folder in (run, run / "checkpoints", latest(run)):
        assert read_config(folder) == CONFIG


def test_other_meshes(run):
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        _, state, _ = Checkpoints(run).restore(abstract())
        assert state.params["layers"]["up"].sharding.spec == P(None, "fsdp", "tensor")
        assert_equal(state, fresh(2))
        Checkpoints(run).save(3, state, CONFIG)
    with jax.set_mesh(make_mesh(tensor=8)):
        _, state, _ = Checkpoints(run).restore(abstract())
        assert state.params["layers"]["up"].sharding.spec == P(None, None, "tensor")
    assert_equal(Checkpoints(run).restore(abstract())[1], fresh(2))


def test_parameters_alone_in_another_dtype(run):
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract().params)
    step, params = restore_params(run / "checkpoints" / "1", wanted)
    assert step == 1
    assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), fresh(1).params))


def test_old_checkpoints_go_only_when_the_new_one_is_whole(run, monkeypatch):
    checkpoints = Checkpoints(run, keep=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "bdjax.checkpoint._write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        checkpoints.save(3, fresh(3), CONFIG)
    assert checkpoints.steps() == [1, 2]
    with pytest.warns(UserWarning, match="3 is a save that never finished.*; reading .*2 instead"):
        assert checkpoints.restore(abstract())[0] == 2
    checkpoints.save(3, fresh(3), CONFIG)
    assert checkpoints.steps() == [3]
    with pytest.raises(CheckpointError, match="already a whole checkpoint"):
        checkpoints.save(3, fresh(3), CONFIG)


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
    Checkpoints(run).save(2, fresh(2), CONFIG)
    assert Checkpoints(run).restore(abstract())[0] == 2


def test_flipped_bytes_of_the_right_length(run):
    shutil.rmtree(run / "checkpoints" / "1")
    for file in (latest(run) / "arrays").rglob("d/*"):
        file.write_bytes(bytes(255 - b for b in file.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged: Orbax answers"):
        Checkpoints(run).restore(abstract())


def edited(path: Path, **changes):
    file = path / "bdjax.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_foreign_folders(run, tmp_path):
    def refused(sentence, folder=run, step=None):
        with pytest.raises(CheckpointError, match=sentence):
            restore_params(folder, abstract().params, step)

    refused("there is no folder .*nowhere; type the folder of a run", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty holds no checkpoint: expected folders like", tmp_path / "empty")
    refused("no checkpoint of step 7; type one of 1, 2", step=7)
    edited(latest(run), version=2)
    refused("has checkpoint format 2, and this bdjax reads format 1; type pip install")
    edited(latest(run), format="other")
    refused("bdjax.json is not ours")
    (latest(run) / "bdjax.json").write_text("[]")
    refused("bdjax.json is not ours")
    shutil.rmtree(latest(run))
    latest(run).mkdir()
    (latest(run) / "model.safetensors").write_bytes(b"x")
    refused("2 was not written by bdjax")
    with pytest.raises(CheckpointError, match="was not written by bdjax"):
        Checkpoints(run).save(2, fresh(2), CONFIG)


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
