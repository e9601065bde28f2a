"""`make demo`: train the demo config, measure it beside n-grams, watch it write, draw two pictures.

python tools/demo.py [--run runs/demo] [overrides such as steps=200]
"""

import argparse
import platform
import shutil
import time
from pathlib import Path

import numpy as np
from rich.console import Console

import bdjax
from bdjax import corpus, ngram, plots
from bdjax.cli import show
from bdjax.display import Denoising

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "import os\nimport sys\n\n\nclass "
TOKENS = 220


def main() -> None:
    """Runs the whole demo; prints what it does and where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = bdjax.apply_overrides(bdjax.load_config(ROOT / "configs" / "demo.py"), args.overrides)
    begin = time.monotonic()
    train_documents, held_out = config.documents()
    print(f"Python {platform.python_version()} standard library: ", end="")
    print(f"{corpus.describe(train_documents)} to train on, ", end="")
    print(f"{corpus.describe(held_out)} held out")
    if args.run.exists():
        shutil.rmtree(args.run)

    print(f"\n1. Training {config.steps} steps of {config.data.batch_size} x ", end="")
    print(f"{config.data.row_length} bytes, block size {config.objective.block_size.largest}")
    result = bdjax.train(config, args.run)
    if result.interrupted:
        raise SystemExit(130)

    print("\n2. Likelihood of the held-out files")
    found = bdjax.evaluate(result.model, held_out)
    print(found)
    grams = ngram.bits_per_byte([d.data for d in train_documents], [d.data for d in held_out])
    for order, bits in grams.items():
        ahead = bits - found.diffusion.bits_per_byte
        print(f"byte {order}-gram, Witten-Bell: {bits:.4f} bits/byte (the model is {ahead:+.4f})")

    print("\n3. Writing, block by block")
    tokenizer = config.tokenizer
    with Denoising(Console()) as view:
        written = bdjax.generate(
            result.model,
            [PROMPT],
            max_new_tokens=TOKENS,
            seed=1,
            watch=lambda snapshot: show(view, tokenizer, PROMPT, snapshot),
        )[0]
    rate = len(written.tokens) / written.forwards
    print(f"{len(written.tokens)} tokens in {written.forwards} forwards ({rate:.2f} per forward)")

    curve, order = args.run / "loss.png", args.run / "commit_order.png"
    plots.loss_curve(result.history, curve)
    prompt = tokenizer.encode(PROMPT)
    pieces = ["^", *(tokenizer.decode([token]) for token in [*prompt, *written.tokens])]
    steps = np.concatenate([np.full(written.start, -1), written.step])
    size = config.objective.block_size.largest
    plots.commit_order(pieces, steps, size, written.start, order)
    print(f"\nloss curve:   {curve}\ncommit order: {order}")
    print(f"whole demo:   {time.monotonic() - begin:.0f} s")
    print(f"next:         .venv/bin/bdjax sample {args.run} --prompt 'def ' --watch")


if __name__ == "__main__":
    main()
