"""A plan's numbers are those of the compiled program, and no array of the model is ever made."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bdjax import (
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    MeshConfig,
    TrainConfig,
    make_plan,
    presets,
)
from bdjax import plan as module
from bdjax.chips import V5E
from bdjax.cli import main
from bdjax.hlo import Traffic, array_bytes, collectives
from bdjax.parameters import count
from bdjax.plan import slice_shape
from bdjax.sharding import make_mesh
from bdjax.tokenizer import ByteTokenizer

PROGRAM = """\
HloModule example

%deep (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[32]{0:T(128)} all-gather(%p), channel_id=1, LATER
}

%start (p.1: f32[8]) -> f32[32] {
  %p.1 = f32[8]{0} parameter(0)
  %all-gather.2 = f32[32]{0:T(128)} all-gather(%p.1), channel_id=1, FIRST
  ROOT %custom-call = f32[32]{0} custom-call(%all-gather.2)
}

%inner_condition (i: (s32[], f32[8])) -> pred[] {
  %i = (s32[], f32[8]) parameter(0)
  %constant.7 = s32[]{:T(128)} constant(3)
  %gte = s32[] get-tuple-element(%i), index=0
  ROOT %lt = pred[] compare(%gte, %constant.7), direction=LT
}

%inner (j: (s32[], f32[8])) -> (s32[], f32[8]) {
  %j = (s32[], f32[8]) parameter(0)
  %g = f32[8]{0} get-tuple-element(%j), index=1
  %fusion.1 = f32[32]{0} fusion(%g), kind=kCustom, calls=%deep
  %fusion.2 = f32[32]{0} fusion(%g), kind=kCustom, calls=%start
  ROOT %t = (s32[], f32[8]) tuple(%g, %g)
}

%open_condition (k: (s32[], s32[], f32[8])) -> pred[] {
  %k = (s32[], s32[], f32[8]) parameter(0)
  %a = s32[] get-tuple-element(%k), index=0
  %b = s32[] get-tuple-element(%k), index=1
  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT
}

%open (l: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %l = (s32[], s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%l), index=2
  %all-to-all = f32[8]{0} all-to-all(%x), channel_id=9
  ROOT %u = (s32[], s32[], f32[8]) tuple(%x, %x, %x)
}

%outer (m: (s32[], f32[8])) -> (s32[], f32[8]) {
  %m = (s32[], f32[8]) parameter(0)
  %y = f32[8]{0} get-tuple-element(%m), index=1
  %while.1 = (s32[], f32[8]{0}) while(%m), condition=%inner_condition, body=%inner
  %reduce-scatter = f32[2]{0} reduce-scatter(%y), channel_id=3, to_apply=%sum
  ROOT %v = (s32[], f32[8]) tuple(%y, %y)
}

%async (w: f32[8]) -> f32[2] {
  %w = f32[8]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%w), channel_id=3, to_apply=%sum
}

ENTRY %main (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %while.2 = (s32[], f32[8]{0}) while(%q), body=%outer, config={"known_trip_count":{"n":"5"}}
  %while.3 = (s32[], s32[], f32[8]) while(%q), condition=%open_condition, body=%open
  %all-reduce = (f32[4]{0:T(8,128)(2,1)}, /*index=1*/bf16[6]{0}) all-reduce(%q, %q), channel_id=4
  %alone = f32[4]{0} all-reduce(%q), channel_id=5, replica_groups={{0},{1}}, to_apply=%sum
  %rs-start = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%q), calls=%async
  %rs-done = f32[2]{0} async-done(%rs-start), calls=%async
  %all-gather-start = (f32[8]{0}, f32[16]{0}) all-gather-start(%q), channel_id=6
  ROOT %all-gather-done = f32[16]{0} all-gather-done(%all-gather-start)
}
"""
# How libtpu marks the pieces of an asynchronous collective.
PIECE = 'backend_config={"async_collective_fusion_config":{"flag_start":"%d","flag_end":"%d"}}'
PROGRAM = PROGRAM.replace("FIRST", PIECE % (-1, -1)).replace("LATER", PIECE % (2, 8))


def test_collectives_are_counted_as_often_as_they_run():
    found = collectives(PROGRAM)
    assert found.traffic == {
        "all-gather": Traffic(5 * 3 + 1, 15 * 128 + 64),  # two pieces of one, and a start
        "all-reduce": Traffic(1, 16 + 12),
        "reduce-scatter": Traffic(5 + 1, 6 * 32),  # what goes in
        "all-to-all": Traffic(1, 32),
    }
    assert found.open_loops == 1


def test_sizes_of_shapes():
    assert array_bytes("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
    assert array_bytes("(pred[5], s4[4], f8e4m3fn[3], u32[])") == 5 + 2 + 3 + 4


def test_a_real_program_of_this_compiler():
    """A psum in a scan of five steps on eight devices."""
    with jax.set_mesh(make_mesh(data=8)):

        @jax.jit
        @jax.shard_map(in_specs=P("data"), out_specs=P("data"), check_vma=False)
        def run(x):
            def body(c, _):
                return c + jax.lax.psum(jnp.sin(c), "data"), None

            return jax.lax.scan(body, x, None, length=5)[0]

        text = run.lower(jnp.zeros((64, 3), out_sharding=P("data"))).compile().as_text()
    assert collectives(text).traffic == {"all-reduce": Traffic(5, 5 * 8 * 3 * 4)}


def test_collectives_of_one_channel_are_all_counted():
    """Inside shard_map every collective has channel 1: two all-to-alls are two."""
    with jax.set_mesh(make_mesh(fsdp=4)):

        @jax.jit
        @jax.shard_map(in_specs=P(None, "fsdp"), out_specs=P(None, "fsdp"), check_vma=False)
        def run(x):
            y = jnp.sin(jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True))
            return jax.lax.all_to_all(y, "fsdp", 1, 0, tiled=True)

        text = run.lower(jnp.zeros((8, 16), out_sharding=P(None, "fsdp"))).compile().as_text()
    assert set(re.findall(r"channel_id=(\d+)", text)) == {"1"}
    assert collectives(text).traffic == {"all-to-all": Traffic(2, 2 * 8 * 4 * 4)}


@pytest.mark.parametrize(
    "topology, shape",
    [
        ("v5e-1", ("v5e", (1, 1))),
        ("v5e-8", ("v5e", (2, 4))),
        ("v5e-16", ("v5e", (4, 4))),
        ("v5e-256", ("v5e", (16, 16))),
        ("v6e-128", ("v6e", (8, 16))),
        ("v5p-8", ("v5p", (2, 2, 1))),
        ("v5p-16", ("v5p", (2, 2, 2))),
        ("v5p-256", ("v5p", (4, 4, 8))),
        ("7x-8", ("7x", (2, 2, 1))),
        ("tpu7x-32", ("7x", (2, 2, 4))),
        ("v5p:2x2x4", ("v5p", (2, 2, 4))),
    ],
)
def test_slices_by_name_and_by_shape(topology, shape):
    assert slice_shape(topology) == shape


@pytest.mark.parametrize(
    "topology, words",
    [
        ("v9-16", "type one of v5e-16, v5p-16, v6e-16, 7x-16 or here"),
        ("v5e-x", "topology 'v5e-x' is unknown"),
        ("v5e-12", "no power of two of chips; type v5e-16"),
        ("v5p-1", "TensorCores, two a chip"),
        ("v5e:0x4", "topology 'v5e:0x4' is unknown"),
    ],
)
def test_what_is_no_slice_is_refused(topology, words):
    with pytest.raises(ValueError, match=words):
        slice_shape(topology)


@pytest.fixture(scope="module")
def config():
    recipe = presets.default(mask_id=ByteTokenizer.mask_id, block_size=4)
    return TrainConfig(
        name="tiny",
        steps=10,
        model=DecoderConfig(
            num_layers=3,
            width=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_width=48,
            clean=recipe.clean,
            dtype="float32",
        ),
        objective=recipe.objective,
        data=DataConfig(row_length=32, batch_size=8),
        mesh=MeshConfig(fsdp=2, tensor=2),
        evaluation=EvaluationConfig(every=0),
    )


@pytest.fixture(scope="module")
def plan(config):
    before = {id(x) for x in jax.live_arrays()}
    found = make_plan(config, "here")
    made = [x for x in jax.live_arrays() if id(x) not in before]
    assert sum(x.nbytes for x in made) < 1000
    return found


def test_bytes_of_the_state_are_the_tables_over_the_mesh(config, plan):
    model = config.build_model()
    scalars = count(model.table())
    assert plan.parameters == scalars
    for kind in ("parameters", "first moment", "second moment"):
        # Matrices and the embedding are cut in four (fsdp x tensor), norms not at all.
        assert scalars / 4 * 4 <= plan.memory[kind] < scalars / 4 * 4 * 1.1
    rows = config.data.batch_size // 2
    assert plan.memory["batch"] == rows * config.data.row_length * (3 * 4 + 1)
    assert all(size >= 0 for size in plan.memory.values())
    assert plan.tokens == config.data.batch_size * config.data.row_length


def test_a_mesh_talks_and_says_how_much(config, plan):
    traffic = plan.collectives.traffic
    assert traffic["all-reduce"].count > 0
    # Every layer's weights are gathered over fsdp, forward and again backward under remat.
    assert traffic["all-gather"].count >= 2 * 7 * config.model.num_layers


def test_it_fits_to_the_byte(plan):
    assert plan.fits is None and "capacity of this device unknown" in str(plan)
    full = replace(plan, capacity=float(plan.needed))
    assert full.fits and "fits with 0.00 GiB to spare" in str(full)
    over = replace(plan, capacity=plan.needed - 1.0)
    assert not over.fits and "does not fit" in str(over)


def test_a_mesh_of_another_size_says_what_to_type(config, monkeypatch):
    monkeypatch.setattr(module, "tpu_slice", lambda topology: [None] * 16)
    with pytest.raises(ValueError, match="takes 4 devices, v5e-16 has 16; type .*mesh.fsdp=16"):
        make_plan(config, "v5e-16")


def test_without_libtpu_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bdjax\[plan\]'"):
        make_plan(config, "v5e-8")


def test_the_command_line_prints_it_and_writes_json(config, plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bdjax.make_plan", lambda config, topology: plan)
    file = Path(__file__).resolve().parents[1] / "configs" / "demo.py"
    assert main(["plan", str(file), "--topology", "here", "model.num_layers=1"]) == 0
    assert str(plan) in capsys.readouterr().out
    assert main(["plan", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needed"] == plan.needed and found["flops"]["total"] == plan.flops.total


@pytest.mark.slow
def test_a_tpu_slice_that_is_not_there(config):
    pytest.importorskip("libtpu", reason="pip install 'bdjax[plan]'")
    found = make_plan(config, "v5e-4")
    assert (found.devices, found.device_kind, found.capacity) == (4, "TPU v5 lite", V5E.memory)
    assert found.fits and found.roofline.links > 0
    assert found.collectives.traffic["all-gather"].count >= 2 * 7 * config.model.num_layers
