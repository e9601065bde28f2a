"""Real processes on the CPU: the same numbers as one, the same stop, and no hang when one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_trainer import interrupt_at, logged, quiet, texts, tiny_config

from bdjax import MeshConfig, PeerError, start_processes, train
from bdjax.checkpoint import Checkpoints
from bdjax.distributed import Agreement, Peers, gather
from bdjax.optim import make_optimiser
from bdjax.sharding import from_host, make_mesh, own_rows
from bdjax.train_step import initial_state

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 150
HEARTBEAT = 4.0

CONFIG = """
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, {tests!r})
from test_processes import long_config

from bdjax import manifest

FAULT = os.environ.get("FAULT", "")


def fault(*args, settle=manifest.settle):
    if FAULT == "die in a save":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "fail in a save":
        raise OSError("the cable is out")
    return settle(*args)


def get_config():
    manifest.settle = fault
    return long_config(Path({texts!r}))
"""


def long_config(folder: Path):
    """Two KV heads, for a tensor axis of two; as many steps as nobody waits for."""
    config = tiny_config(folder, steps=100_000, checkpoint_every=20)
    return replace(
        config,
        model=replace(config.model, num_kv_heads=2),
        mesh=MeshConfig(heartbeat_seconds=HEARTBEAT),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    file = folder / "config.py"
    here = str(Path(__file__).parent)
    file.write_text(CONFIG.format(tests=here, texts=str(texts(folder / "texts"))))
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@contextmanager
def processes(home: Path, run: Path, count: int, *words: str, devices: int = 1, faults=()):
    """`count` processes of one run; whatever is left of them at the end is killed."""
    port = free_port()
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": str(ROOT),
    }
    with ExitStack() as stack:
        children = []
        for number in range(count):
            command = [sys.executable, "-m", "bdjax.cli", "train", str(home / "config.py")]
            command += ["--run", str(run), *words, "--process-id", str(number)]
            command += ["--process-count", str(count), "--coordinator", f"localhost:{port}"]
            own = environment | {"FAULT": dict(faults).get(number, "")}
            # Files, not pipes: nobody reads while they run.
            out = stack.enter_context((run.parent / f"{run.name}.{number}").open("w+"))
            child = subprocess.Popen(command, env=own, stdout=out, stderr=out, text=True)
            child.out = out
            stack.callback(child.wait)
            stack.callback(child.kill)
            children.append(child)
        yield children


def ended(child: subprocess.Popen, seconds: float = LIMIT) -> tuple[int, str]:
    """Exit code and what was said; a hang is an error."""
    code = child.wait(timeout=seconds)
    child.out.seek(0)
    return code, child.out.read()


def together(home: Path, run: Path, count: int, *words: str, devices: int = 1):
    with processes(home, run, count, *words, devices=devices) as children:
        for child in children:
            code, said = ended(child)
            assert code == 0, said


def wait_for_checkpoint(run: Path, children):
    limit = time.monotonic() + LIMIT
    while not list(run.glob("checkpoints/*/bdjax.json")):
        assert time.monotonic() < limit and all(c.poll() is None for c in children)
        time.sleep(0.05)


def arrays(config, run: Path):
    with jax.set_mesh(config.mesh.build()), Checkpoints(run) as kept:
        model = config.build_model()
        optimiser = make_optimiser(config.optim, model.table(), config.steps)
        _, state, data = kept.restore(initial_state(config.seed, model, optimiser))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}, data


NUMBERS = ("loss", "loss_ar", "loss_diffusion", "grad_norm", "tokens", "learning_rate")


def assert_close(config, run: Path, straight: Path):
    found, wanted = logged(run), logged(straight)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for one, other in zip(found, wanted, strict=True):
        for name in NUMBERS:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), one["step"]
    (a, _), (b, _) = arrays(config, run), arrays(config, straight)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, {"data": 2}),
        (2, {"tensor": 2}),
        (4, {"data": 2, "fsdp": 2}),
        (4, {"fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_processes_compute_what_one_computes(home, tmp_path, count, mesh):
    words = [f"mesh.{name}={size}" for name, size in mesh.items()]
    words += ["steps=6", "checkpoint_every=4"]
    config = replace(long_config(home / "texts"), steps=6, checkpoint_every=4)
    straight = train(config, tmp_path / "straight", say=quiet)
    together(home, tmp_path / "run", count, *words)
    assert_close(config, tmp_path / "run", straight.directory)
    if mesh == {"data": 2}:
        together(home, tmp_path / "again", count, *words)
        (a, _), (b, _) = arrays(config, tmp_path / "run"), arrays(config, tmp_path / "again")
        assert {n: x.tobytes() for n, x in a.items()} == {n: x.tobytes() for n, x in b.items()}


@pytest.mark.slow
def test_one_signal_stops_all_at_one_step_and_two_become_one_and_four(home, tmp_path, monkeypatch):
    run = tmp_path / "run"
    words = ["steps=2000", "mesh.data=2"]
    with processes(home, run, 2, *words) as children:
        wait_for_checkpoint(run, children)
        children[1].send_signal(signal.SIGTERM)
        (code, said), (other, silent) = map(ended, children)
    assert (code, other) == (0, 0), said + silent
    first = int(re.search(r"interrupted: checkpoint of step (\d+)", said)[1])
    assert Checkpoints(run).steps()[-1] == first and "step" not in silent
    config = replace(long_config(home / "texts"), steps=2000)
    with monkeypatch.context() as patch:
        interrupt_at(patch, first + 7, signal.SIGTERM)
        train(config, run, resume=True, say=quiet)
    with processes(home, run, 4, "--resume", "steps=2000", "mesh.data=4") as children:
        limit = time.monotonic() + LIMIT
        while Checkpoints(run).steps()[-1] < first + 20 and time.monotonic() < limit:
            time.sleep(0.1)
        # Signals that come at different times to different processes, as from a scheduler.
        for child in children:
            child.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        for child in children:
            code, said = ended(child)
            assert code == 0, said
    last = Checkpoints(run).steps()[-1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, last, signal.SIGTERM)
        straight = train(config, tmp_path / "straight", say=quiet)
    assert straight.steps == last
    found, wanted = logged(run), logged(straight.directory)
    assert [line["step"] for line in found] == list(range(1, last + 1))
    # The same rows in the same order; rounding grows over so many steps.
    assert [line["tokens"] for line in found] == [line["tokens"] for line in wanted]
    np.testing.assert_allclose(
        [line["loss"] for line in found], [line["loss"] for line in wanted], rtol=1e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_peer_ends_the_others_with_a_sentence(home, tmp_path, victim):
    run = tmp_path / "run"
    with processes(home, run, 2, "mesh.data=2") as children:
        wait_for_checkpoint(run, children)
        children[victim].kill()
        code, said = ended(children[1 - victim], 8 * HEARTBEAT)
    assert code == 1, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("bdjax: ") and f"process {victim}" in last and "--resume" in last
    assert str(run) in last and Checkpoints(run).steps()


@pytest.mark.slow
def test_a_peer_that_stands_still_is_noticed_while_the_others_wait_for_it(home, tmp_path):
    run = tmp_path / "run"
    with processes(home, run, 2, "mesh.data=2") as children:
        wait_for_checkpoint(run, children)
        children[1].send_signal(signal.SIGSTOP)
        code, said = ended(children[0], 8 * HEARTBEAT)
    assert code == 1 and "process 1 of the run has not answered for" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "sentence"),
    [
        ("die in a save", (1, -signal.SIGKILL), "process 1 of the run has not answered for"),
        ("fail in a save", (1, 1), "could not be written.*the cable is out"),
    ],
)
def test_a_fault_of_one_process_in_a_save(home, tmp_path, fault, codes, sentence):
    run = tmp_path / "run"
    with processes(home, run, 2, "mesh.data=2", faults={1: fault}.items()) as children:
        found = [ended(child, LIMIT) for child in children]
    assert tuple(code for code, _ in found) == codes, found
    assert re.search(sentence, found[0][1]), found[0][1]
    assert Checkpoints(run).steps() == []


@pytest.mark.slow
def test_all_pass_over_what_one_of_them_finds_damaged(home, tmp_path):
    config = replace(long_config(home / "texts"), steps=6, checkpoint_every=3)
    straight = train(config, tmp_path / "run", say=quiet)
    wanted, _ = arrays(config, straight.directory)
    # Each process checks every second file: this one is the second process's.
    names = sorted(json.loads((tmp_path / "run/checkpoints/6/bdjax.json").read_text())["files"])
    file = tmp_path / "run/checkpoints/6" / next(n for n in names[1::2] if n.startswith("arrays"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    words = ["--resume", "steps=6", "checkpoint_every=3", "mesh.data=2"]
    with processes(home, tmp_path / "run", 2, *words) as children:
        for number, child in enumerate(children):
            code, said = ended(child)
            assert code == 0 and "have changed; reading" in said, said
            assert ("resumed from step 3" in said) == (number == 0)
    found, _ = arrays(config, tmp_path / "run")
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_wrong_mesh_is_refused_by_all(home, tmp_path):
    with processes(home, tmp_path / "run", 2) as children:
        for child in children:
            code, said = ended(child)
            assert code == 1 and "type mesh.data=2" in said


def test_one_process_is_the_trivial_case():
    assert gather("anything", "text") == ["text"]
    assert Agreement(make_mesh(data=2))(7) == 7
    with Peers(1.0, "advice"):
        pass


@pytest.mark.parametrize(
    "given",
    [{"process_id": 0}, {"coordinator": "localhost:1"}, {"process_id": 0, "process_count": 2}],
    ids=str,
)
def test_half_an_address_is_refused(given):
    with pytest.raises(ValueError, match="--process-id 0 --process-count 2 --coordinator"):
        start_processes(**given)


def test_a_process_outside_the_count_is_refused():
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        start_processes(process_id=2, process_count=2, coordinator="localhost:1")


def test_processes_cannot_start_once_devices_are_in_use():
    assert jax.devices()
    with pytest.raises(PeerError, match="before any JAX calls"):
        start_processes(process_id=0, process_count=1, coordinator=f"localhost:{free_port()}")


def test_rows_reach_the_devices_that_own_them():
    rows = np.arange(24).reshape(8, 3)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert own_rows(8) == list(range(8))
        placed = from_host(rows, 8, "batch", "length")
    assert {s.index[0].stop - s.index[0].start for s in placed.addressable_shards} == {2}
    np.testing.assert_array_equal(np.asarray(placed), rows)
    assert own_rows(3) == [0, 1, 2]


def test_a_heartbeat_below_a_second_cannot_be_built():
    with pytest.raises(ValueError, match="mesh.heartbeat_seconds=100"):
        MeshConfig(heartbeat_seconds=0.5)
