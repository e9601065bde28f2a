"""The `bdjax` command: train, sample, evaluate. It uses the public API and nothing else."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from rich.console import Console

import bdjax
from bdjax.display import Denoising, clean_text

_POLICIES = ("dynamic", "threshold", "static", "sequential", "entropy", "entropy-sdar", "random")

_TRAIN = """\
Train a config file into a folder.

example:
  bdjax train configs/demo.py --run runs/demo optim.peak_lr=0.01 steps=500
"""
_SAMPLE = """\
Write text with a trained model.

example:
  bdjax sample runs/demo --prompt "import os" --tokens 200 --watch
  bdjax sample runs/demo --infill "def ____(self):" --blank _
"""
_EVALUATE = """\
The bound on the likelihood of held-out text, in bits per byte.

example:
  bdjax evaluate runs/demo --exact
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bdjax", description="Block-diffusion language models in JAX."
    )
    parser.add_argument("--version", action="version", version=f"bdjax {bdjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str):
        return commands.add_parser(
            name,
            help=text.split("\n", 1)[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    train = command("train", _TRAIN)
    train.add_argument("config", help="Python file with get_config()")
    train.add_argument("overrides", nargs="*", help="dotted overrides, as in model.num_layers=4")
    train.add_argument("--run", help="folder of the run (default: runs/NAME)")
    train.add_argument("--resume", action="store_true", help="go on from its newest checkpoint")
    train.add_argument("--print-config", action="store_true", help="show the result and stop")

    sample = command("sample", _SAMPLE)
    sample.add_argument("run", help="folder of a run, or one checkpoint in it")
    sample.add_argument("--prompt", action="append", help="text to continue; repeat for more rows")
    sample.add_argument(
        "--infill",
        action="append",
        help="text with blanks to fill; right context is seen only inside the block of a blank",
    )
    sample.add_argument("--blank", default="_", help="the character that marks one blank (_)")
    sample.add_argument("--tokens", type=int, default=128, help="new tokens at most (128)")
    sample.add_argument(
        "--max-length",
        type=int,
        help="prompt and text together, in tokens (default: the training rows' length)",
    )
    sample.add_argument(
        "--policy",
        choices=_POLICIES,
        default="dynamic",
        help="which slots to keep at each step (dynamic)",
    )
    sample.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        help="probability that counts as sure: dynamic, threshold (0.9)",
    )
    sample.add_argument(
        "--entropy-budget",
        type=float,
        default=0.1,
        help="nats per step: entropy, entropy-sdar (0.1)",
    )
    sample.add_argument(
        "--steps",
        type=int,
        help="steps per block: dynamic, static, sequential (default: the block size)",
    )
    sample.add_argument("--block-size", type=int, help="tokens per block (default: as trained)")
    sample.add_argument("--temperature", type=float, default=1.0, help="0 is most probable (1.0)")
    sample.add_argument("--top-k", type=int, help="draw from the k most probable tokens")
    sample.add_argument("--top-p", type=float, help="draw from the fewest tokens of mass p")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument(
        "--separate-commit", action="store_true", help="one forward more per block, same text"
    )
    sample.add_argument("--watch", action="store_true", help="show the text being denoised")
    sample.add_argument("--json", action="store_true", help="one JSON object per row")

    evaluate = command("evaluate", _EVALUATE)
    evaluate.add_argument("run", help="folder of a run, or one checkpoint in it")
    evaluate.add_argument("--files", nargs="+", help="UTF-8 files (default: the run's held-out)")
    evaluate.add_argument("--batches", type=int, help="stop after so many batches")
    evaluate.add_argument("--block-size", type=int, help="default: as trained")
    evaluate.add_argument("--draws", type=int, default=1, help="noise draws per row (1)")
    evaluate.add_argument(
        "--exact",
        action="store_true",
        help=f"enumerate all masks (block size up to {bdjax.EXACT_UP_TO})",
    )
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--json", action="store_true")
    return parser


def _policy(args, size: int) -> bdjax.Policy:
    steps = args.steps or size
    return {
        "dynamic": lambda: bdjax.Dynamic(threshold=args.threshold, steps=steps),
        "threshold": lambda: bdjax.Threshold(threshold=args.threshold),
        "static": lambda: bdjax.Static(steps=steps),
        "sequential": lambda: bdjax.Sequential(steps=steps),
        "entropy": lambda: bdjax.EntropyBounded(budget=args.entropy_budget),
        "entropy-sdar": lambda: bdjax.EntropyBounded(
            budget=args.entropy_budget, form=bdjax.EntropyForm.SDAR
        ),
        "random": lambda: bdjax.RandomOne(),
    }[args.policy]()


def _train(args) -> int:
    config = bdjax.apply_overrides(bdjax.load_config(args.config), args.overrides)
    if not isinstance(config, bdjax.TrainConfig):
        raise ValueError(
            f"{args.config}: get_config() returned a {type(config).__name__}; expected a "
            "bdjax.TrainConfig"
        )
    if args.print_config:
        print(bdjax.to_text(config))
        return 0
    result = bdjax.train(config, args.run or f"runs/{config.name}", resume=args.resume)
    print(f"step {result.steps}/{config.steps}, run in {result.directory}")
    return 130 if result.interrupted else 0


def _blanks(tokenizer, text: str, blank: str) -> list[int | None]:
    """Token ids of a template, None for each blank."""
    if len(blank) != 1:
        raise ValueError(f"--blank {blank!r} must be one character, as in --blank _")
    ids: list[int | None] = []
    for number, part in enumerate(text.split(blank)):
        ids += [None] * (number > 0) + tokenizer.encode(part).tolist()
    return ids


def _sample(args) -> int:
    loaded = bdjax.load(args.run)
    tokenizer = loaded.config.tokenizer
    size = args.block_size or loaded.config.objective.block_size.largest
    templates = [_blanks(tokenizer, text, args.blank) for text in args.infill or []]
    shown = list(args.prompt or ([] if templates else [""]))
    prompts = shown + templates
    names = shown + [text.split(args.blank)[0] for text in args.infill or []]
    console = Console()

    def run(watch=None):
        return bdjax.generate(
            loaded,
            prompts,
            max_new_tokens=args.tokens,
            max_length=args.max_length,
            policy=_policy(args, size),
            block_size=size,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            fused=False if args.separate_commit else None,
            seed=args.seed,
            watch=watch,
        )

    if args.watch and not args.json:
        with Denoising(console) as view:
            results = run(lambda snapshot: show(view, tokenizer, names[0], snapshot))
        written = results[1:]
        rest = names[1:]
    else:
        results = written = run()
        rest = names
    if args.json:
        for name, result in zip(names, results, strict=True):
            print(json.dumps({"prompt": name} | _plain(asdict(result))))
        return 0
    for name, result in zip(rest, written, strict=True):
        print(clean_text(name + result.text))
    for result in results:
        rate = len(result.tokens) / max(result.forwards, 1)
        print(
            f"[{len(result.tokens)} tokens, {result.forwards} forwards, {rate:.2f} tokens per "
            f"forward, ended by {result.finish}]",
            file=sys.stderr,
        )
    return 0


def show(view: Denoising, tokenizer, prompt: str, snapshot: bdjax.Snapshot) -> None:
    """Row 0 of a snapshot on a `Denoising` view: one piece per token, None for an open slot."""
    begin, limit = int(snapshot.prompt[0]), int(snapshot.limit[0])
    tokens, filled = snapshot.tokens[0, begin:limit], snapshot.filled[0, begin:limit]
    last = int(np.flatnonzero(filled)[-1]) + 1 if filled.any() else 0
    pieces = [
        tokenizer.decode([token]) if known else None
        for token, known in zip(tokens[:last], filled[:last], strict=True)
    ]
    view.update(prompt, pieces)


def _plain(result: dict) -> dict:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in result.items()}


def _evaluate(args) -> int:
    loaded = bdjax.load(args.run)
    if args.files:
        documents = bdjax.TextFiles(paths=tuple(args.files)).documents()
    else:
        documents = loaded.config.documents()[1]
    found = bdjax.evaluate(
        loaded,
        documents,
        batches=args.batches,
        block_size=args.block_size,
        draws=args.draws,
        exact=args.exact,
        seed=args.seed,
    )
    print(json.dumps(asdict(found)) if args.json else found)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 a clear error, 2 bad usage, 130 interrupted."""
    parser = _parser()
    # argparse takes overrides only right after the config file: those behind a flag come as rest.
    args, rest = parser.parse_known_args(argv)
    if rest and (args.command != "train" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    run = {"train": _train, "sample": _sample, "evaluate": _evaluate}[args.command]
    try:
        return run(args)
    except (ValueError, OSError, bdjax.CheckpointError) as error:
        print(f"bdjax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bdjax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
