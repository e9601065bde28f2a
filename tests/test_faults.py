"""Full disks, stalls, signals at bad moments, other meshes: every fault is injected for real."""

import faulthandler
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_trainer import (
    HALF,
    STEPS,
    assert_same_end,
    interrupt_at,
    logged,
    quiet,
    texts,
    tiny_config,
)

from bdjax import MeshConfig, manifest, train
from bdjax.checkpoint import CheckpointError, Checkpoints, NoSpaceError
from bdjax.interrupts import Interrupts, no_interrupt_lost
from bdjax.watchdog import Watchdog, WatchdogConfig

ROOT = Path(__file__).resolve().parents[1]
# A test that hangs is a test that fails: nothing here takes a tenth of this.
LIMIT = 60


@pytest.fixture(autouse=True)
def no_hang(request):
    """The whole test process dies with all stacks if one of these tests hangs."""
    limit = 15 * LIMIT if request.node.get_closest_marker("slow") else LIMIT
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("straight"), say=quiet)


@pytest.fixture
def disk(tmp_path):
    """Makes a disk of so many bytes."""
    made = []

    def make(size):
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Bytes in whole pages, as a tmpfs counts them."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in files)


def test_a_full_disk_is_a_warning_until_the_last_save(config, straight, disk):
    one = size_of(straight.directory / "checkpoints" / str(STEPS))
    # Room for two checkpoints and a half, where three meet while one is written.
    folder = disk(round(2.5 * one)) / "run"
    changed = replace(config, checkpoint_every=2)
    with (
        pytest.warns(UserWarning, match="no room for the checkpoint of step 6") as said,
        pytest.raises(NoSpaceError) as failed,
    ):
        train(changed, folder, say=quiet)
    text = str(failed.value)
    assert str(folder) in text and "No space left" in text and "keep_checkpoints" in text
    assert "there are 3 of" in text and "\n" not in text
    assert any("goes on and tries again" in str(w.message) for w in said)
    # The older ones are whole, and the run goes on from them where there is room again.
    assert Checkpoints(folder).steps() == [2, 4]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["2", "4"]
    moved = shutil.copytree(folder, folder.parent.parent / "moved")
    train(config, moved, resume=True, say=quiet)
    assert_same_end(config, moved, straight)
    assert logged(moved) == logged(straight.directory)


def test_a_smaller_number_to_keep_fits_the_same_disk(config, straight, disk):
    one = size_of(straight.directory / "checkpoints" / str(STEPS))
    folder = disk(round(2.5 * one)) / "run"
    train(replace(config, checkpoint_every=2, keep_checkpoints=1), folder, say=quiet)
    assert Checkpoints(folder).steps() == [STEPS]


@pytest.mark.parametrize("free", [0, 8192, 16384])
def test_no_room_for_the_log_names_the_folder(config, disk, free):
    folder = disk(1 << 20) / "run"
    folder.mkdir()
    with (folder / "filler").open("wb") as filler, pytest.raises(OSError):
        filler.write(bytes(2 << 20))
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - free))
    with warnings.catch_warnings(), pytest.raises((OSError, CheckpointError)) as failed:
        warnings.simplefilter("ignore")
        train(replace(config, checkpoint_every=100), folder, say=quiet)
    text = str(failed.value)
    assert str(folder) in text and "no room" in text and "No space left" in text
    assert "\n" not in text


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path):
    state = {"params": {"w": jax.numpy.asarray(np.random.default_rng(0).normal(size=50_000))}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(NoSpaceError, match="File too large"), Checkpoints(tmp_path) as kept:
            kept.save(1, state, "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_second_ctrl_c_ends_at_once_and_the_first_is_remembered():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == before


class Raising:
    """Its end is a bad moment for a signal."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("where", ["collector", "weak reference", "del"])
def test_ctrl_c_is_not_lost_where_python_forgets_what_is_raised(where):
    # JAX has a callback of the garbage collector.
    sent = []

    def callback(*_):
        if not sent:
            sent.append(where)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with no_interrupt_lost(), pytest.raises(KeyboardInterrupt):
        try:
            if where == "collector":
                gc.callbacks.append(callback)
                gc.collect()
            elif where == "weak reference":
                thing = Interrupts()
                seen = weakref.ref(thing, callback)
                del thing
                assert seen() is None
            else:
                Raising()
            time.sleep(5)
        finally:
            if callback in gc.callbacks:
                gc.callbacks.remove(callback)
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_a_second_ctrl_c_during_a_save_tears_nothing(config, straight, tmp_path, monkeypatch):
    run = shutil.copytree(straight.directory, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    held, settle = threading.Event(), manifest.settle

    def slow(path, names):
        # The main thread waits for this save, the last one.
        signal.raise_signal(signal.SIGINT)
        held.wait(LIMIT)
        return settle(path, names)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "settle", slow)
        interrupt_at(patch, HALF + 2, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, resume=True, say=quiet)
        # As if the process were gone now: the save is not whole.
        left = shutil.copytree(run, tmp_path / "left")
        held.set()
    assert Checkpoints(left).steps() == [HALF]
    with pytest.warns(UserWarning, match="never finished"):
        train(config, left, resume=True, say=quiet)
    assert_same_end(config, left, straight)
    assert logged(left) == logged(straight.directory)


def stalls(folder: Path) -> list[Path]:
    return sorted(folder.glob("stall-*.txt"))


def wait_for(condition):
    limit = time.monotonic() + 20
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    assert condition()


def test_a_stall_is_written_down_once_and_again_after_a_step(tmp_path, capfd):
    with Watchdog(WatchdogConfig(seconds=0.2), tmp_path) as watchdog:
        watchdog.alive(3)
        wait_for(lambda: stalls(tmp_path))
        time.sleep(0.5)
        (file,) = stalls(tmp_path)
        text = file.read_text()
        assert "since step 3" in text and "test_a_stall_is_written_down" in text
        file.unlink()
        watchdog.alive(4)
        wait_for(lambda: stalls(tmp_path))
    wait_for(lambda: "since step 4" in stalls(tmp_path)[0].read_text())
    said = capfd.readouterr().err
    assert said.count("bdjax: no step has ended for") == 2 and str(file) in said


def test_compiling_and_steps_are_no_stall(tmp_path):
    with Watchdog(WatchdogConfig(seconds=0.2), tmp_path) as watchdog:
        time.sleep(0.5)  # The first step compiles.
        for step in range(8):
            watchdog.alive(step)
            time.sleep(0.05)
        watchdog.alive(9, compiling=True)
        time.sleep(0.5)
    assert stalls(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seconds": -1.0}, "watchdog.seconds=0"),
        ({"abort_after": -1.0}, "watchdog.abort_after=0"),
        ({"seconds": 5.0, "abort_after": 2.0}, "watchdog.abort_after=5.0"),
        ({"seconds": 0.0, "abort_after": 2.0}, "watchdog.abort_after="),
    ],
)
def test_a_watchdog_that_cannot_work(options, named):
    with pytest.raises(ValueError, match=named):
        WatchdogConfig(**options)


_STALLED = """
import sys, time
from bdjax.watchdog import Watchdog, WatchdogConfig
with Watchdog(WatchdogConfig(seconds=0.2, abort_after=0.5), sys.argv[1]) as watchdog:
    watchdog.alive(7)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_stall_may_end_the_process(tmp_path):
    command = [sys.executable, "-c", _STALLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    assert done.returncode == 1 and "the run is ended; --resume goes on" in done.stderr
    assert len(stalls(tmp_path)) == 1


@pytest.mark.slow
def test_killed_three_times_it_ends_as_if_never_killed(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--kills", "3"]
    command += ["--steps", "60", "--folder", str(tmp_path / "kill")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 steps, 3 kills: loss curve, data state and arrays are bitwise equal" in done.stdout


MESHES = (
    MeshConfig(),
    MeshConfig(data=8),
    MeshConfig(data=4, tensor=2),
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
)


@pytest.mark.slow
def test_a_run_goes_on_from_mesh_to_mesh(config, tmp_path):
    config = replace(
        config,
        steps=2 * len(MESHES),
        data=replace(config.data, batch_size=8),
        model=replace(config.model, num_kv_heads=2),
    )
    straight = train(config, tmp_path / "straight", say=quiet)
    for number, mesh in enumerate(MESHES):
        with stopped_after(2 * number + 2):
            train(replace(config, mesh=mesh), tmp_path / "run", resume=True, say=quiet)
    found, wanted = logged(tmp_path / "run"), logged(straight.directory)
    assert [line["step"] for line in found] == list(range(1, 2 * len(MESHES) + 1))
    for one, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            # Where a step had no block of some noise level there is no loss.
            if isinstance(value, int | float):
                assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, one["step"])


class stopped_after:
    """The run in this block stops after a step, as by SIGTERM."""

    def __init__(self, step: int):
        self._step = step

    def __enter__(self):
        from bdjax import trainer

        self._write = trainer.Writer.write

        def write(writer, now, scalars, write=self._write):
            if now == self._step:
                signal.raise_signal(signal.SIGTERM)
            return write(writer, now, scalars)

        trainer.Writer.write = write

    def __exit__(self, *exception):
        from bdjax import trainer

        trainer.Writer.write = self._write
