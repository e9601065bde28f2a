"""A run that was stopped, killed or damaged goes on as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from bdjax import (
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    Remat,
    TextFiles,
    TrainConfig,
    presets,
    train,
    trainer,
)
from bdjax.checkpoint import CheckpointError, Checkpoints
from bdjax.metrics import cut_log
from bdjax.optim import make_optimiser
from bdjax.tokenizer import ByteTokenizer
from bdjax.train_step import NonFiniteError, initial_state
from bdjax.watchdog import WatchdogConfig

STEPS, HALF, CAUGHT = 8, 4, 3
BLOCK, ROW, BATCH = 4, 32, 4


def texts(folder: Path) -> Path:
    """Eight small text files of random words; enough for both sides of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    words = random.Random(0)
    for number in range(8):
        chosen = (words.choice(("ab", "cab", "the", "cat", "sat")) for _ in range(40))
        (folder / f"{number}.txt").write_text(" ".join(chosen))
    return folder


def tiny_config(folder: Path, **changes) -> TrainConfig:
    """A run of a few seconds on the text files of `folder`."""
    recipe = presets.default(mask_id=ByteTokenizer.mask_id, block_size=BLOCK)
    config = TrainConfig(
        name="tiny",
        steps=STEPS,
        model=DecoderConfig(
            num_layers=1,
            width=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            mlp_width=48,
            clean=recipe.clean,
            dtype="float32",
            remat=Remat.NONE,
        ),
        objective=recipe.objective,
        data=DataConfig(
            source=TextFiles(paths=(str(folder / "*.txt"),)),
            row_length=ROW,
            batch_size=BATCH,
            held_out_fraction=0.3,
        ),
        evaluation=EvaluationConfig(every=0),
        checkpoint_every=HALF,
    )
    return replace(config, **changes)


def quiet(text: str) -> None:
    """Nowhere."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """The run that nobody disturbs."""
    return train(config, tmp_path_factory.mktemp("straight"), say=quiet)


@pytest.fixture
def run(straight, tmp_path):
    """A folder like the undisturbed run's, to be damaged."""
    return shutil.copytree(straight.directory, tmp_path / "run")


def end_state(config, directory):
    """Step, data state and all arrays of a run's newest checkpoint, as bytes."""
    with jax.set_mesh(config.mesh.build()), Checkpoints(directory) as kept:
        model = config.build_model()
        optimiser = make_optimiser(config.optim, model.table(), config.steps)
        step, state, data = kept.restore(initial_state(config.seed, model, optimiser))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return step, data, {jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in leaves}


def assert_same_end(config, directory, straight):
    step, data, arrays = end_state(config, directory)
    wanted_step, wanted_data, wanted = end_state(config, straight.directory)
    assert (step, data) == (wanted_step, wanted_data)
    assert arrays.keys() == wanted.keys()
    assert [name for name in wanted if arrays[name] != wanted[name]] == []


def logged(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(monkeypatch, step, number):
    """The process gets the signal `number` while it logs `step`."""
    write = trainer.Writer.write

    def interrupting(self, now, scalars):
        if now == step:
            signal.raise_signal(number)
        return write(self, now, scalars)

    monkeypatch.setattr(trainer.Writer, "write", interrupting)


def test_a_run_saves_at_its_multiples_and_at_its_end_once(straight):
    # The last step is a multiple too: it must be neither lost nor saved twice, which is an error.
    folders = (straight.directory / "checkpoints").iterdir()
    assert sorted(int(folder.name) for folder in folders) == [HALF, STEPS]
    assert [step for step, _ in straight.history] == list(range(1, STEPS + 1))
    assert (straight.steps, straight.interrupted) == (STEPS, False)


def test_training_moves_the_loss_down(straight):
    losses = [values["loss"] for _, values in straight.history]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize("how", ["lost", "torn"])
def test_resuming_equals_no_interruption_bitwise(config, straight, run, how):
    newest = run / "checkpoints" / str(STEPS)
    warned = contextlib.nullcontext()
    if how == "lost":
        shutil.rmtree(newest)
    else:
        warned = pytest.warns(UserWarning, match="is damaged")
        largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    said = []
    with warned:
        result = train(config, run, resume=True, say=said.append)
    assert said == [f"resumed from step {HALF}"]
    assert result.history == straight.history[HALF:]
    assert_same_end(config, run, straight)
    # Steps that were run again stand in the log once.
    assert logged(run) == logged(straight.directory)


def test_an_interrupted_run_saves_and_goes_on_as_if_never_stopped(
    config, straight, tmp_path, monkeypatch
):
    said = []
    with monkeypatch.context() as patch:
        interrupt_at(patch, CAUGHT, signal.SIGINT)
        first = train(config, tmp_path / "run", say=said.append)
    # The step in flight is finished, so what was logged is what is saved.
    assert (first.interrupted, first.steps) == (True, CAUGHT)
    assert f"checkpoint of step {CAUGHT}" in said[-1] and "--resume" in said[-1]
    second = train(config, tmp_path / "run", resume=True, say=quiet)
    assert first.history + second.history == straight.history
    assert logged(tmp_path / "run") == logged(straight.directory)
    assert_same_end(config, tmp_path / "run", straight)


def test_sigterm_saves_too_and_handlers_are_put_back(config, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 1, signal.SIGTERM)
    result = train(config, tmp_path / "run", say=quiet)
    assert (result.interrupted, result.signal, result.steps) == (True, signal.SIGTERM, 1)
    assert Checkpoints(tmp_path / "run").steps() == [1]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_a_killed_process_left_of_a_line_is_cut(run, straight):
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 1.')
    cut_log(run, HALF)
    assert logged(run) == logged(straight.directory)[:HALF]
    assert (run / "metrics.jsonl").read_text().endswith("}\n")


def test_a_finished_run_is_resumed_to_nothing(config, run):
    result = train(config, run, resume=True, say=quiet)
    assert (result.steps, result.history) == (STEPS, [])


def test_a_folder_with_a_run_is_not_overwritten(config, run):
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*")}
    with pytest.raises(FileExistsError, match=f"up to step {STEPS}; type --resume"):
        train(config, run, say=quiet)
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c, seed=1), ("seed=1", "type seed=0 ")),
        # The learning rate is a function of all steps: more of them would be another run.
        (lambda c: replace(c, steps=9), ("steps=9", f"type steps={STEPS} ")),
        (
            lambda c: replace(c, optim=replace(c.optim, b1=0.5, b2=0.9)),
            ("optim.b1=0.5", "type optim.b1=0.9 "),
        ),
        (
            lambda c: replace(c, objective=presets.sdar(mask_id=258, block_size=4).objective),
            ("objective.process.draw=Bernoulli", "type objective.process.draw=ExactCount "),
        ),
    ],
)
def test_a_resume_with_another_config_is_refused(config, straight, change, named):
    with pytest.raises(ValueError) as refused:
        train(change(config), straight.directory, resume=True, say=quiet)
    assert all(part in str(refused.value) for part in named)


def test_evaluation_and_checkpointing_may_change_on_the_way(config, run):
    changed = replace(
        config,
        evaluation=EvaluationConfig(every=100, prompt="a\nsteps = 3"),
        checkpoint_every=1,
        keep_checkpoints=7,
        keep_every=3,
        watchdog=WatchdogConfig(seconds=0.0),
    )
    assert train(changed, run, resume=True, say=quiet).steps == STEPS


def test_evaluation_on_the_way_changes_nothing_and_drives_no_terminal(config, straight, run):
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    wanted = EvaluationConfig(every=HALF + 1, batches=1, prompt="\x1b[31mthe\x07", tokens=4)
    said = []
    train(replace(config, evaluation=wanted), run, resume=True, say=said.append)
    assert len(said) == 3 and "diffusion bound" in said[1]
    assert said[2].startswith("the") and "\x1b" not in said[2] and "\x07" not in said[2]
    assert_same_end(config, run, straight)


def test_gradients_that_stay_non_finite_end_the_run_and_leave_its_checkpoint(config, tmp_path):
    hurt = replace(config, model=replace(config.model, norm_eps=float("nan")))
    hurt = replace(hurt, optim=replace(hurt.optim, max_skipped=2), checkpoint_every=1)
    with pytest.raises(NonFiniteError, match="step 2: .*2 steps in a row"):
        train(hurt, tmp_path / "run", say=quiet)
    assert (tmp_path / "run" / "checkpoints" / "1" / "bdjax.json").exists()


def test_finished_checkpoints_that_cannot_be_read_are_no_empty_folder(config, run):
    log = (run / "metrics.jsonl").read_bytes()
    for file in run.glob("checkpoints/*/bdjax.json"):
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"version": 1}))
    for resume in (True, False):
        with pytest.raises(CheckpointError):
            train(config, run, resume=resume, say=quiet)
    assert (run / "metrics.jsonl").read_bytes() == log


def test_resuming_nothing_says_so(config, tmp_path):
    said = []

    def say(text):
        said.append(text)
        raise KeyboardInterrupt  # before the first step

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", resume=True, say=say)
    assert len(said) == 1 and "step 0" in said[0]


_CONFIG = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from test_trainer import tiny_config


def get_config():
    return tiny_config(Path({texts!r}), steps=100_000, checkpoint_every=100_000)
"""


def test_ctrl_c_exits_with_130_and_leaves_a_checkpoint(tmp_path):
    file, run = tmp_path / "config.py", tmp_path / "run"
    here = str(Path(__file__).parent)
    file.write_text(_CONFIG.format(tests=here, texts=str(texts(tmp_path / "texts"))))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "bdjax.cli", "train", str(file), "--run", str(run)]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        try:
            # The log is written once its buffer is full: by then the run is tens of steps old.
            log, limit = run / "metrics.jsonl", time.monotonic() + 120
            while not (log.exists() and log.stat().st_size) and child.poll() is None:
                assert time.monotonic() < limit, "the run does not log"
                time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, err
    (step,) = Checkpoints(run).steps()
    assert f"checkpoint of step {step} is in {run}; --resume goes on" in out
    assert [line["step"] for line in logged(run)] == list(range(1, step + 1))
    assert "Traceback" not in err
