"""The benchmarks: what they count, and what they refuse to time."""

import gzip
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import attention_race as race
import bench_attention as bench
import bench_train_step
import kernel_profile
import train_step_ours
from train_step_case import Shape, contestant

from bdjax.layout import clean_places, join_places, noisy_places
from pallas_kernels import CleanMode, dense_mask

TINY = ["--length", "64", "--block", "8", "--head-dim", "16", "--heads", "2", "--kv-heads", "1"]
QUICK = ["--repeats", "2", "--at-least", "0.001"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "found.json"
    bench.main([*TINY, *QUICK, "--documents", "20", "--out", str(out)])
    found = json.loads(out.read_text())
    return found, {entry["name"]: entry for entry in found["contestants"]}


@pytest.mark.parametrize("clean", CleanMode)
@pytest.mark.parametrize("documents", [None, 20])
def test_a_case_is_a_training_row(clean, documents):
    """The integers by arithmetic are those of the layout, so all contestants have one mask."""
    case = race.Case(rows=1, length=64, block=8, documents=documents, clean=clean)
    at, size = jnp.arange(64)[None], documents or 64
    places = clean_places(at // size + 1, at % size, 8)
    row = join_places(places, noisy_places(places, 1)).meta
    index = np.arange(128)
    mask = case.visible(index[:, None], index[None])
    assert (mask == dense_mask(row, row, clean)[0]).all()
    assert (mask == case.intervals().mask(128)[0]).all()
    assert race.pairs(case.intervals()) == mask.sum()


def test_flops_are_those_of_visible_pairs(written):
    found, by_name = written
    case = race.Case(rows=2, length=64, block=8, documents=20)
    index = np.arange(128)
    visible = 2 * int(case.visible(index[:, None], index[None]).sum())
    for name in ("dense", "blockwise"):
        entry = by_name[name]
        assert entry["status"] == "ok" and 0 < entry["error"] < race.WRONG
        assert entry["visible_pairs"] == visible
        for which, flops in (("forward", 4), ("backward", 14)):
            timed = entry["passes"][which]
            rate = flops * 16 * 2 * visible / timed["seconds"] / 1e12
            assert timed["useful_tflops"] == pytest.approx(rate)
            assert len(timed["samples"]) == 2
    assert by_name["dense"]["visited_over_visible"] == pytest.approx(2 * 128**2 / visible)
    assert found["case"]["clean"] == "token"


def test_those_who_cannot_serve_say_why_and_the_others_go_on(written):
    entry = written[1]["cudnn"]
    assert (entry["status"], entry["passes"]) == ("failed", {})
    assert "needs a GPU" in entry["reason"]


@pytest.mark.parametrize("fault", ["out", "gradient", "nan"])
def test_a_wrong_contestant_is_not_timed(fault):
    case = race.Case(rows=1, heads=1, kv_heads=1, head_dim=8, length=16, block=4)
    inputs, seen = case.inputs(), case.intervals()
    truth = race.reference(inputs, seen)

    def call(q, k, v, seen):
        out = race.Dense().attention(q, k, v, seen)[0]
        if fault == "gradient":
            return out + 0.1 * (v - jax.lax.stop_gradient(v))
        return out * (1.05 if fault == "out" else jnp.nan)

    build = partial(race.jax_runner, call, inputs, seen)
    (entry,) = race.race(
        {"faulty": build}, ("forward", "backward"), lambda _: truth, repeats=1, at_least=1e-4
    )
    assert entry["status"] == "wrong" and entry["passes"] == {}
    assert not entry["error"] < race.WRONG


def test_of_long_rows_a_part_is_compared_and_the_output_says_which(written):
    """Float32 of the first and the last row and KV head is what it is among all of them."""
    case = race.Case(rows=2, heads=6, kv_heads=2, head_dim=8, length=16, block=4)
    inputs, seen = case.inputs(), case.intervals()
    whole, part = (race.reference(inputs, seen, units=u) for u in (None, np.array([0, 3])))
    with jax.default_matmul_precision("highest"):
        q, k, v, d_out = (x.astype(jnp.float32) for x in inputs)
        out, pull = jax.vjp(lambda *x: race.Dense().attention(*x, seen)[0], q, k, v)
        found = out, *pull(d_out)
    for x, all_units, some in zip(found, whole.arrays, part.arrays, strict=True):
        np.testing.assert_allclose(all_units, race.units_of(x, 2, np.arange(4)), atol=2e-6)
        np.testing.assert_array_equal(some, all_units[[0, 3]])
    wrong = [x.at[1, :, -1].multiply(1.1) for x in found]
    assert race.error_of(found, part) < 1e-5 < 2e-2 < race.error_of(wrong, part)
    assert race.Case(kv_heads=8).compared().tolist() == list(range(16))
    assert race.Case(kv_heads=8, length=8192).compared().tolist() == [0, 15]
    assert written[0]["compared_rows_and_kv_heads"] == [[0, 0], [1, 0]]
    assert bench.compared(written[0]).endswith("all rows and heads")
    described = {"case": {"rows": 2, "kv_heads": 8}, "compared_rows_and_kv_heads": [[0, 0], [1, 7]]}
    assert "row 0 with KV head 0, row 1 with KV head 7; not the others" in bench.compared(described)


@pytest.mark.parametrize("tiles", [(128, 128), (16, 8), (4, 4), (5, 7)])
def test_tiles_are_counted_as_enumerated(tiles):
    case = race.Case(rows=2, length=64, block=8, documents=20)
    seen, visited, full = case.intervals(), 0, 0
    keys = np.arange(-(-128 // tiles[1]) * tiles[1])
    for low, high in ((seen.a0, seen.a1), (seen.b0, seen.b1)):
        low, high = np.asarray(low)[..., None], np.asarray(high)[..., None]
        mask = (low <= keys) & (keys < high)
        for start in range(0, 128, tiles[0]):
            part = mask[:, start : start + tiles[0]]
            part = part.reshape(2, part.shape[1], -1, tiles[1])
            touched = part.any(axis=(1, 3))
            for row in touched:
                # The cover is convex: what lies between two touched tiles is visited too.
                visited += int(np.ptp(np.flatnonzero(row))) + 1 if row.any() else 0
            full += int(part.all(axis=(1, 3)).sum())
    assert race.tile_counts(seen, *tiles, 128) == (visited, full)
    assert race.tiled_pairs(seen, *tiles, 128) == visited * tiles[0] * tiles[1]


def test_pairs_by_halves_lie_between_the_visible_ones_and_those_of_whole_tiles():
    """One document of two tiles in blocks of 32: each pair of tiles counted by hand."""
    seen = race.Case(rows=1, length=256, block=32).intervals()
    visible, whole = race.pairs(seen), race.tiled_pairs(seen, 128, 128, 512)
    # Clean: the diagonals without their upper right quarters, one whole tile below. Noisy: the
    # clean tiles at its own place likewise, one whole tile below, of its own two quarters each.
    quarters = (3 + 3 + 4) + (3 + 3 + 4) + (2 + 2)
    assert visible < race.hopper_pairs(seen, 512) == quarters * 64 * 64 < whole
    # Rows that no tile divides count as they are computed, filled up.
    short = race.Case(rows=1, length=100, block=32).intervals()
    assert race.pairs(short) < race.hopper_pairs(short, 200)


def test_the_window_counts_one_layer_of_keys_and_values(tmp_path):
    out = tmp_path / "window.json"
    words = ["--window", "--slots", "64", "--window-tokens", "4", "--only", "dense", *TINY, *QUICK]
    bench.main([*words, "--out", str(out)])
    by_name = {e["name"]: e for e in json.loads(out.read_text())["contestants"]}
    timed = by_name["dense"]["passes"]["forward"]
    moved = 2 * 2 * 1 * 64 * 16 * 2  # keys and values, rows, heads, slots, width, bytes
    assert timed["gigabytes_per_second"] == pytest.approx(moved / timed["seconds"] / 1e9)
    assert by_name["copy"]["status"] == "ok"


TINY_STEP = Shape(
    layers=1, width=16, heads=2, kv_heads=1, head_dim=8, mlp=24, vocab=64, length=16, block=4
)


@pytest.mark.slow
def test_the_train_step_is_timed_and_its_flops_are_of_what_is_visible():
    who = contestant("ours:dots:2")
    found = train_step_ours.measure(who, TINY_STEP, steps=1, samples=2)
    assert np.isfinite(found["first_loss"]) and len(found["samples"]) == 2
    assert found["dtypes"] == {"parameters": "float32", "moments": "float32", "compute": "bfloat16"}
    rated = bench_train_step.rates(found, who, TINY_STEP)
    assert rated["clean_tokens_per_second"] == pytest.approx(2 * 16 / found["seconds"])
    pairs = 2 * (16 * 17 // 2 + 4 * 4 * (0 + 1 + 2 + 3) + 4 * 4 * 4)
    assert rated["model_flops"]["attention"] == 12 * pairs * 2 * 8
    entries = [{"name": str(who)} | rated, {"name": "peer:none:1", "error": "over 1 s"}]
    assert "| peer:none:1 | over 1 s |" in bench_train_step.table(entries)


@pytest.mark.parametrize("text", ["ours", "ours:some:2", "ours-bfloat16:full:1", "peer:dots:1"])
def test_who_is_no_contestant_is_told_what_is(text):
    with pytest.raises(ValueError, match="peer-bfloat16:none"):
        contestant(text)


def test_kernels_of_a_trace_are_summed_by_scope_and_by_name(tmp_path):
    """Two steps; a graph's kernels carry no instruction, but are called as one."""
    program = """
%inside (p: f32[]) -> f32[] {
  %d = f32[8,8]{1,0} dot(%a, %b)
}
ENTRY %main (p: f32[]) -> f32[] {
  %fusion.1 = f32[8]{0} fusion(%x), calls=%inside, metadata={op_name="jit(f)/layers/mlp/dot"}
  %add.7 = f32[8]{0} fusion(%x), metadata={op_name="jit(f)/transpose(jvp())/checkpoint/\
rematted_computation/layers/attention/add"}
}
"""
    device, host = {"pid": 1, "tid": 2}, {"pid": 9, "tid": 2}
    names = [
        device | {"ph": "M", "name": "process_name", "args": {"name": "/device:GPU:0"}},
        device | {"ph": "M", "name": "thread_name", "args": {"name": "Stream #20(Compute)"}},
        host | {"ph": "M", "name": "process_name", "args": {"name": "/host:CPU"}},
        host | {"ph": "M", "name": "thread_name", "args": {"name": "Stream #1"}},
    ]
    known = {"args": {"hlo_op": "fusion.1"}}
    kernels = [
        device | known | {"ph": "X", "name": "nvjet", "ts": 0, "dur": 6000},
        device | {"ph": "X", "name": "add_7", "ts": 8000, "dur": 2000},
        device | {"ph": "X", "name": "attention_forward_kernel", "ts": 8000, "dur": 1500},
        device | {"ph": "X", "name": "MemcpyD2D", "ts": 9000, "dur": 1000},
        host | {"ph": "X", "name": "waits", "ts": 0, "dur": 99000},
    ]
    with gzip.open(tmp_path / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": names + kernels}, file)
    lines = kernel_profile.profile_table(tmp_path, program, steps=2).splitlines()
    assert lines[0] == "5.000 ms a step, 20.0% of it without a kernel"
    groups = [line.split("x  ")[1] for line in lines[2:6]]
    assert groups[:2] == ["mlp forward product", "attention again rest"]
    assert groups[2:] == ["other attention kernel", "other copy"]
    assert "3.000 ms  60.0%" in lines[2] and "nvjet" in lines[7]
