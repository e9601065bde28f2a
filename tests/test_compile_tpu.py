"""What tools/compile_tpu.py reads out of programs for chips that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import compile_tpu as tool
from attention_race import Case

from pallas_kernels import Blockwise
from pallas_kernels.tile_sizes import TileSizes

ROOT = Path(__file__).resolve().parents[1]
SCHEDULE = """\
// a kernel
     0   :  { %a = inst  ;;  %b = inst }
   0x1   :  { %c = sbr.rel (%p0) target = $region4 }
   0x2   : > { %d = inst }
   0x8   : > { %e = inst ;;  %f = sbr.rel (!%p1) target = $region2 }
  0x1c   :  { %g = inst }
"""


def run(*words):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "compile_tpu.py"), *map(str, words)]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_bundles_are_counted_between_branches():
    assert tool.bundles(SCHEDULE) == {"total": 29, "stretches": [20, 7]}


def test_schedules_are_those_of_the_kernels_since_the_last_time(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine")
    schedules = tool.Schedules(str(tmp_path))
    assert os.environ["LIBTPU_INIT_ARGS"].startswith("--mine --xla_jf_dump_to=")
    for name in ("forward.1-01-final", "forward.1-00-schedule-analysis_final", "copy.7-01-final"):
        (tmp_path / f"179-{name}_bundles.txt").write_text(SCHEDULE)
    assert schedules.take({"forward": 1}) == {"forward.1": {"total": 29, "stretches": [20, 7]}}
    assert schedules.take({"forward": 1}) == {}


def test_a_program_in_numbers():
    case = Case(rows=1, heads=2, kv_heads=1, head_dim=16, length=64, block=8)
    inputs = tool.training_arguments(case)
    found = tool.compiled_for("here", lambda *x: Blockwise().attention(*x)[0], inputs[:4])
    row, bounds = 128 * 16 * 2, 4 * 128 * 4
    assert found["memory"]["arguments"] == (2 + 1 + 1) * row + bounds
    assert found["memory"]["outputs"] == 2 * row
    assert found["needed"] == sum(found["memory"].values())
    assert (found["mosaic_calls"], found["collectives"]) == ({}, {})
    json.dumps(found)


def test_what_does_not_compile_says_why():
    def refused(x):
        raise NotImplementedError("head_dim 7:\n type 8")

    found = tool.compiled_for("here", refused, (jax.ShapeDtypeStruct((1,), jnp.float32),))
    assert found == {"failed": "NotImplementedError: head_dim 7: type 8"}
    assert tool.lines(found) == ["  does not compile: NotImplementedError: head_dim 7: type 8"]


def test_the_table_gets_the_cheapest_tiles_that_compile():
    def entry(width, query, key, cycles):
        return dict(head_dim=width, query_tile=query, key_tile=key, cycles_per_1000_pairs=cycles)

    def row(kind, width, query, key, window):
        return dict(kind=kind, head_dim=width, query=query, key=key, window=window)

    other = row("TPU v6 lite", 64, 1, 2, 3)
    table = {"rows": [other, row("TPU v5", 128, 128, 128, 512)]}
    found = [
        entry(128, 512, 256, 9.0),
        entry(128, 256, 512, 7.0),
        entry(128, 2048, 2048, None),
        entry(64, 1024, 1024, None),
        entry(80, 512, 512, 4.0),
    ]
    rows = tool.with_best(table, "TPU v5", found)["rows"]
    assert rows == [
        row("TPU v5", 80, 512, 512, TileSizes().window),
        row("TPU v5", 128, 256, 512, 512),
        other,
    ]


def test_a_path_is_a_config_and_what_is_left_its_overrides(capsys):
    args = tool.arguments(["a.py", "--topology", "v5e-16", "mesh.data=2", "--rows", "8", "x=1"])
    assert (args.command, args.path, args.overrides) == ("config", "a.py", ["mesh.data=2", "x=1"])
    assert args.rows == 8
    for words in (["a.py", "word"], ["a.py", "--topolgy=v5e-4"], ["kernel", "x=1"]):
        with pytest.raises(SystemExit):
            tool.arguments(words)
        assert "unknown words" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kernel_for_a_chip_that_is_not_there(tmp_path):
    pytest.importorskip("libtpu", reason="pip install 'bdjax[plan]'")
    words = ["--implementation", "splash", "--length", 512, "--heads", 2, "--topology", "v5e-4"]
    run("kernel", *words, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    for name, kernels in (("forward", 1), ("backward", 3)):
        assert sum(found[name]["mosaic_calls"].values()) == kernels
        assert len(found[name]["bundles"]) == kernels
        for schedule in found[name]["bundles"].values():
            assert schedule["total"] > sum(schedule["stretches"]) > 100
        assert found[name]["fits"] and found[name]["estimated_cycles"] > 0


@pytest.mark.slow
def test_tiles_of_our_kernel_have_a_price(tmp_path):
    pytest.importorskip("libtpu", reason="pip install 'bdjax[plan]'")
    table = tmp_path / "tile_sizes.json"
    table.write_text('{"rows": []}')
    words = ["--length", 1024, "--heads", 4, "--kv-heads", 2, "--head-dims", 128]
    sizes = ["--query-tiles", 128, 256, "--key-tiles", 256, "--table", table]
    run("tiles", *words, *sizes, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["tiles"]
    assert [e["query_tile"] for e in found] == [128, 256]
    # The products alone take 14 H FLOPs a pair, at 2 x 4 x 128 x 128 a cycle on this chip.
    least = 1000 * 14 * 128 / (8 * 128 * 128)
    for entry in found:
        assert len(entry["bundles"]) == 3
        assert least < entry["cycles_per_1000_pairs"] < 20 * least
    best = min(found, key=lambda e: e["cycles_per_1000_pairs"])
    (row,) = json.loads(table.read_text())["rows"]
    assert (row["query"], row["key"]) == (best["query_tile"], best["key_tile"])


@pytest.mark.slow
def test_a_config_for_a_slice_that_is_not_there(tmp_path):
    pytest.importorskip("libtpu", reason="pip install 'bdjax[plan]'")
    words = ["--topology", "v5e-4", "mesh.data=2", "mesh.fsdp=2", "--rows", 8, "--slots", 256]
    said = run(ROOT / "configs" / "demo.py", *words, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["train"]["fits"] and found["train"]["collectives"]["traffic"]["all-gather"]
    assert found["sampler"]["fits"] and "sampler, 8 rows of 256 slots" in said
    # The cache of two of the rows is among the arguments of a device.
    assert found["sampler"]["memory"]["arguments"] > 2 * 3 * 2 * 1 * 256 * 64 * 4
