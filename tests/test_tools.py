"""The tools of the attention kernels: what they count, and what they refuse to time."""

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


def test_the_window_counts_one_layer_of_keys_and_values(tmp_path):
    out = tmp_path / "window.json"
    words = ["--window", "--slots", "64", "--window-tokens", "4", "--only", "dense", *TINY, *QUICK]
    bench.main([*words, "--out", str(out)])
    by_name = {e["name"]: e for e in json.loads(out.read_text())["contestants"]}
    timed = by_name["dense"]["passes"]["forward"]
    moved = 2 * 2 * 1 * 64 * 16 * 2  # keys and values, rows, heads, slots, width, bytes
    assert timed["gigabytes_per_second"] == pytest.approx(moved / timed["seconds"] / 1e9)
    assert by_name["copy"]["status"] == "ok"
