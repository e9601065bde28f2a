"""kill -9 at random moments: the run that was killed must end bitwise as the one that was not.

    python tools/kill_test.py --kills 20 --seed 0

A tiny run saves every few steps. It is killed while it starts, while it steps and while a
checkpoint is being written (no bdjax.json yet), resumed each time, and at the end its
metrics.jsonl and the arrays of its last checkpoint are compared with an undisturbed run's.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from bdjax.checkpoint import Checkpoints
from bdjax.config import TrainConfig, config_from_json
from bdjax.optim import make_optimiser
from bdjax.overrides import to_json
from bdjax.train_step import initial_state

# Nothing here takes longer: a hang is a failure, not a wait.
LIMIT = 180
MOMENTS = ("start", "loop", "save", "save")

CONFIG = """
from bdjax import DataConfig, DecoderConfig, EvaluationConfig, Remat, TextFiles, TrainConfig
from bdjax import presets
from bdjax.tokenizer import ByteTokenizer


def get_config():
    recipe = presets.default(mask_id=ByteTokenizer.mask_id, block_size=4)
    return TrainConfig(
        name="killed",
        steps={steps},
        model=DecoderConfig(
            num_layers=1, width=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=48,
            clean=recipe.clean, dtype="float32", remat=Remat.NONE,
        ),
        objective=recipe.objective,
        data=DataConfig(
            source=TextFiles(paths=("{texts}/*.txt",)), row_length=32, batch_size=4,
            held_out_fraction=0.3,
        ),
        evaluation=EvaluationConfig(every=0),
        checkpoint_every={every},
    )
"""


def write_inputs(folder: Path, steps: int, every: int) -> Path:
    """A config file and eight small texts of random words."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    words = random.Random(0)
    for number in range(8):
        chosen = (words.choice(("ab", "cab", "the", "cat", "sat")) for _ in range(40))
        (texts / f"{number}.txt").write_text(" ".join(chosen))
    file = folder / "config.py"
    file.write_text(CONFIG.format(steps=steps, every=every, texts=texts))
    return file


def start(file: Path, run: Path) -> subprocess.Popen:
    """`bdjax train --resume` in a process of its own; programs once compiled are read back."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(run.parent / "cache")} | os.environ
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "bdjax.cli", "train", str(file), "--run", str(run), "--resume"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(file: Path, run: Path) -> str:
    """Runs to the end and returns what was said."""
    child = start(file, run)
    try:
        said, _ = child.communicate(timeout=LIMIT)
    finally:
        child.kill()
    if child.returncode:
        raise SystemExit(f"the run ended with {child.returncode}:\n{said}")
    return said


def unfinished(run: Path) -> list[str]:
    """Steps whose checkpoint is being written, or was when the process died."""
    return [
        path.name for path in (run / "checkpoints").glob("*") if not (path / "bdjax.json").exists()
    ]


def kill(file: Path, run: Path, moment: str, draw: random.Random) -> str:
    """Starts or resumes the run and kills it; says when."""
    before = set(unfinished(run))
    child = start(file, run)
    limit = time.monotonic() + LIMIT
    try:
        if moment == "start":
            time.sleep(draw.uniform(0, 4))
        else:
            child.stdout.readline()  # "resumed from step", or that there is nothing to resume
            if moment == "loop":
                time.sleep(draw.uniform(0, 1.5))
            else:
                left = draw.randrange(1, 6)
                while left and child.poll() is None and time.monotonic() < limit:
                    new = set(unfinished(run)) - before
                    left -= bool(new)
                    before |= new
                time.sleep(draw.uniform(0, 0.03))
        ended = child.poll() is not None
        child.kill()
        child.communicate(timeout=LIMIT)
    finally:
        child.kill()
    whole = Checkpoints(run).steps()
    torn = f", step {', '.join(unfinished(run))} unfinished" if unfinished(run) else ""
    over = " (it had ended)" if ended else ""
    return f"{moment:5}  newest whole: {whole[-1] if whole else 'none'}{torn}{over}"


def log(run: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def end_state(config: TrainConfig, run: Path):
    """Step, data state and the bytes of all arrays of the newest checkpoint."""
    with jax.set_mesh(config.mesh.build()), Checkpoints(run) as kept:
        model = config.build_model()
        optimiser = make_optimiser(config.optim, model.trained_table(), config.steps)
        step, state, data = kept.restore(initial_state(config.seed, model, optimiser))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return step, data, {jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in leaves}


def run_test(folder: Path, kills: int, seed: int, steps: int, every: int, say=print) -> None:
    """Raises AssertionError when the killed run differs in one bit from the undisturbed one."""
    file = write_inputs(folder, steps, every)
    straight, killed = folder / "straight", folder / "killed"
    finish(file, straight)
    draw = random.Random(seed)
    for number in range(kills):
        say(f"kill {number + 1:2}: {kill(file, killed, draw.choice(MOMENTS), draw)}")
    finish(file, killed)
    wanted, found = log(straight), log(killed)
    assert [line["step"] for line in found] == list(range(1, steps + 1)), "a step is not there once"
    assert found == wanted, "the loss curves differ"
    config = config_from_json((straight / f"checkpoints/{steps}/config.json").read_text())
    assert to_json(config) == (killed / f"checkpoints/{steps}/config.json").read_text()
    assert end_state(config, killed) == end_state(config, straight), "the last checkpoints differ"
    say(f"{steps} steps, {kills} kills: loss curve, data state and arrays are bitwise equal")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="kept if given (default: a temporary one)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shutil.rmtree(folder, ignore_errors=True)
        run_test(folder, args.kills, args.seed, args.steps, args.every)


if __name__ == "__main__":
    main()
