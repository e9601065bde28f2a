"""Block sizes between AR and MDLM on one text, at equal clean tokens: a table and a picture.

python tools/block_sizes.py run TEXT --out runs/shakespeare [--gpus 2] [--set steps=10 ..]
python tools/block_sizes.py variance TEXT --jobs 4-seed0 32-seed0     gradient noise of two draws
python tools/block_sizes.py table runs/shakespeare docs/tinyshakespeare.png

`run` trains every job of JOBS that has no result yet (a cut-off run goes on where it was) and
writes OUT/<job>.json; `table` prints and draws what is in them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.tinyshakespeare import get_config  # noqa: E402

KINDS = ("ar", "1", "4", "8", "16", "32", "mdlm", "4-bernoulli", "16-bernoulli")
# The longest first: what is left at the end fills the gaps.
JOBS = tuple(
    f"{kind}-seed{seed}" for seed in (0, 1) for kind in (*KINDS[1:6], *KINDS[7:], "mdlm", "ar")
)
NANOGPT = 1.4697
LN2 = 0.6931471805599453


def config_of(job: str, text: Path):
    """The config of a job such as "16-bernoulli-seed1"."""
    kind, seed = job.rsplit("-seed", 1)
    return get_config(kind, seed=int(seed), text=str(text))


def work(args) -> None:
    """One process: jobs one after another."""
    import bdjax

    for job in args.jobs:
        path = args.out / f"{job}.json"
        config = bdjax.apply_overrides(config_of(job, args.text), args.overrides)
        begin = time.monotonic()
        result = bdjax.train(config, args.out / job, resume=True)
        if result.interrupted:
            raise SystemExit(130)
        seconds = time.monotonic() - begin
        _, held_out = config.documents()
        size = config.objective.block_size.largest
        # Blocks of one have one mask pattern: a single draw is exact.
        draws = 1 if size == 1 else 16
        final = bdjax.evaluate(result.model, held_out, draws=draws)
        record = {
            "job": job,
            "seconds": seconds,
            "final": asdict(final),
            "curve": evaluations(args.out / job / "metrics.jsonl"),
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record))
        part.rename(path)
        print(f"{job}: {seconds:.0f} s\n{final}", flush=True)


def evaluations(log: Path) -> list[tuple[int, float]]:
    """(step, validation bound in nats per character) from a run's log."""
    found = []
    for line in map(json.loads, log.read_text().splitlines()):
        for part in ("diffusion", "ar"):
            if f"evaluation/{part}_nats_per_token" in line:
                found.append((line["step"], line[f"evaluation/{part}_nats_per_token"]))
                break
    return found


def run(args) -> None:
    """All jobs that have no result, spread over the GPUs."""
    args.out.mkdir(parents=True, exist_ok=True)
    left = [job for job in args.jobs or JOBS if not (args.out / f"{job}.json").exists()]
    print(f"{len(left)} jobs: {', '.join(left)}")
    places = [(gpu, worker) for worker in range(args.workers) for gpu in range(args.gpus)]
    running = []
    for number, (gpu, worker) in enumerate(places):
        jobs = left[number :: len(places)]
        if not jobs:
            continue
        share = f"{0.9 / args.workers:.2f}"
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": str(gpu),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": share,
        }
        command = [sys.executable, __file__, "work", str(args.text), "--out", str(args.out)]
        log = (args.out / f"worker{gpu}{worker}.log").open("a")
        running.append(
            subprocess.Popen(
                [*command, "--jobs", *jobs, "--set", *args.overrides],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    codes = [process.wait() for process in running]
    print(f"exit codes {codes}; {len(list(args.out.glob('*.json')))} results")


def variance(args) -> None:
    """Noise of the gradient given the text: exact counts against Bernoulli with 1/t.

    At the trained weights of each job, on one batch, over `--draws` noise draws: the trace of the
    gradient's covariance over the squared norm of its mean, and the loss's standard deviation.
    """
    import jax

    import bdjax
    from bdjax.data import training_batches
    from bdjax.likelihood import to_device
    from bdjax.loss import losses, total
    from bdjax.noise import Bernoulli, ExactCount

    found = {}
    for job in args.jobs:
        config = config_of(job, args.text)
        loaded = bdjax.load(args.out / job)
        jax.set_mesh(config.mesh.build())
        documents, _ = config.documents()
        rows = training_batches(
            documents, config.tokenizer, config.packing(), config.data.batch_size, seed=7
        )
        batch = to_device(next(rows), config.data.batch_size)
        size = config.objective.block_size.at(0)
        for name, draw in {"exact": ExactCount(), "bernoulli": Bernoulli()}.items():
            process = replace(config.objective.process, draw=draw)
            objective = replace(config.objective, process=process)

            @jax.jit
            def both(params, batch, key, objective=objective, model=loaded.model, size=size):
                def loss(params):
                    parts = losses(objective, model, params, batch, size, key)
                    return total(objective, parts)

                return jax.value_and_grad(loss)(params)

            values, mean, square = [], None, 0.0
            for number in range(args.draws):
                value, grad = both(loaded.params, batch, jax.random.key(number))
                values.append(float(value))
                square += float(sum((g**2).sum() for g in jax.tree.leaves(grad)))
                mean = grad if mean is None else jax.tree.map(lambda a, b: a + b, mean, grad)
            n = args.draws
            norm = float(sum(((m / n) ** 2).sum() for m in jax.tree.leaves(mean)))
            trace = (square - n * norm) / (n - 1)
            # The mean's own noise is in its norm.
            signal = norm - trace / n
            found[f"{job} {name}"] = {
                "loss": float(np.mean(values)),
                "loss_sd": float(np.std(values, ddof=1)),
                "noise_to_signal": trace / signal,
                "trace": trace,
            }
            print(job, name, found[f"{job} {name}"], flush=True)
    (args.out / "variance.txt").write_text(json.dumps(found, indent=1))


def table(args) -> None:
    """The table and the picture from the results in a folder."""
    from bdjax import plots

    records = {p.stem: json.loads(p.read_text()) for p in sorted(args.folder.glob("*-seed*.json"))}
    lines = [
        "| objective | best on the way, seeds 0 and 1 | after 5000 steps, seeds 0 and 1 |",
        "|---|---|---|",
    ]
    curves = {}
    for kind in KINDS:
        runs = [records.get(f"{kind}-seed{seed}") for seed in (0, 1)]
        if not any(runs):
            continue
        best = [_best(run) for run in runs if run]
        last = [_last(run, "ar" if kind == "ar" else "diffusion") for run in runs if run]
        lines.append(f"| {_name(kind)} | {', '.join(best)} | {', '.join(last)} |")
        first = next(run for run in runs if run)
        curves[_name(kind)] = tuple(zip(*first["curve"], strict=True))
    lines.append(f"| nanoGPT (AR, as its authors report) | {NANOGPT} |  |")
    print("\n".join(lines))
    plots.curves(
        curves,
        args.out,
        across="step",
        up="validation bound (nats per character)",
        line=(NANOGPT, "nanoGPT"),
    )


def _best(run: dict) -> str:
    """The lowest of a run's curve and its step; the curve has one noise draw per row."""
    step, nats = min(run["curve"], key=lambda point: point[1])
    return f"{nats:.3f} (step {step})"


def _last(run: dict, part: str) -> str:
    """Nats per character after the last step, of 16 draws (one where one is exact)."""
    if run["final"] is None:
        step, nats = run["curve"][-1]
        return f"stopped after step {step}: {nats:.3f}"
    found = run["final"][part]
    return f"{found['bits_per_byte'] * LN2:.4f} +- {found['bits_se'] * LN2:.4f}"


def _name(kind: str) -> str:
    size, _, draw = kind.partition("-")
    if not size.isdecimal():
        return {"ar": "AR", "mdlm": "MDLM (row of 256)"}[size]
    return f"block {size}" + (", Bernoulli 1/t" if draw else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("run", run), ("work", work), ("variance", variance)):
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("text", type=Path)
        command.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
        command.add_argument("--jobs", nargs="+", help="default: all")
        command.add_argument("--set", nargs="*", default=[], dest="overrides", metavar="key=value")
        command.add_argument("--gpus", type=int, default=1)
        command.add_argument("--workers", type=int, default=2, help="processes per GPU")
        command.add_argument("--draws", type=int, default=64)
    command = commands.add_parser("table", help=table.__doc__)
    command.set_defaults(function=table)
    command.add_argument("folder", type=Path)
    command.add_argument("out", type=Path)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
