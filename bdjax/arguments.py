"""What the `bdjax` command takes: its commands, their flags and what `--help` says."""

import argparse

import bdjax

_POLICIES = ("dynamic", "threshold", "static", "sequential", "entropy", "entropy-sdar", "random")

_DTYPES = ("float32", "bfloat16")
_MODEL = (
    "folder of a run, a checkpoint in it, a model folder of the Hugging Face hub, or a .gguf file"
)
_DTYPE = "of arithmetic and parameters (default: as they are stored)"

_TRAIN = """\
Train a config file into a folder.

example:
  bdjax train configs/demo.py --run runs/demo optim.peak_lr=0.01 steps=500
  bdjax train configs/demo.py mesh.data=2 --process-id 0 --process-count 2 --coordinator host:7777
"""
_PLAN = """\
Compile the train step for chips that are not here; say what it needs and whether it fits.

example:
  bdjax plan configs/pod_1b.py --topology v5e-256
"""
_CONVERT = """\
Make an autoregressive model the starting point of a block-diffusion one.

example:
  bdjax convert Qwen3-0.6B --run runs/start
  bdjax train configs/convert_default.py --start runs/start
"""
_SAMPLE = """\
Write text with a trained model, or with one of the Hugging Face hub.

example:
  bdjax sample runs/demo --prompt "import os" --tokens 200 --watch
  bdjax sample SmolLM2-135M --prompt "The capital of France is" --temperature 0
  bdjax sample runs/demo --infill "def ____(self):" --blank _
  bdjax sample runs/sft_demo --chat
  bdjax sample runs/demo --prompts prompts.jsonl --json
"""
_EVALUATE = """\
The bound on the likelihood of held-out text, in bits per byte.

example:
  bdjax evaluate runs/demo --exact
"""


_IMPORT = """\
Take a model folder of the Hugging Face hub, or a GGUF file, into a run: its step 0 and tokenizer.

example:
  bdjax import SDAR-1.7B-Chat --run runs/sdar
  bdjax import SmolLM2-135M-Instruct.Q4_1.gguf --run runs/smollm2
"""
_EXPORT = """\
Write a trained model as a Hugging Face folder, which transformers loads with equal logits.

example:
  bdjax export runs/mine --out mine-hf --dtype bfloat16
"""
_TOKENIZER = """\
Train a byte-level BPE on nine tenths of each file, and measure it on the last tenth.

example:
  bdjax tokenizer books/*.txt --vocab-size 4096 --out tokenizers/books
"""


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
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
    # Without a default, argparse calls the overrides required when the config file is missing.
    train.add_argument(
        "overrides", nargs="*", default=[], help="dotted overrides, as in model.num_layers=4"
    )
    train.add_argument("--start", metavar="RUN", help="a run whose parameters this one begins with")
    train.add_argument("--run", help="folder of the run (default: runs/NAME)")
    train.add_argument("--resume", action="store_true", help="go on from its newest checkpoint")
    train.add_argument(
        "--profile", metavar="FIRST:LAST", help="write a profiler trace of these steps, as in 20:25"
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, found by themselves on TPU pods, Slurm and Kubernetes",
    )
    train.add_argument("--process-id", type=int, help="which of several processes this one is")
    train.add_argument("--process-count", type=int, help="how many there are")
    train.add_argument("--coordinator", help="HOST:PORT of process 0")
    train.add_argument("--print-config", action="store_true", help="show the result and stop")

    plan = command("plan", _PLAN)
    plan.add_argument("config", help="Python file with get_config()")
    plan.add_argument("overrides", nargs="*", default=[], help="as for train")
    plan.add_argument("--start", metavar="RUN", help="as for train; its parameters are not read")
    plan.add_argument(
        "--topology",
        default="here",
        help="TPU slice as in v5e-16, v5p-8, v6e-256, 7x-16 or v5p:2x2x4 (default: here)",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object")

    convert = command("convert", _CONVERT)
    convert.add_argument("model", help="folder of the Hugging Face hub, or a .gguf file")
    convert.add_argument("--run", required=True, help="folder of the new run")
    convert.add_argument("--mask-id", type=int, help="default: an id that stands for nothing yet")
    convert.add_argument("--block-size", type=int, default=8, help="to sample with at first (8)")
    convert.add_argument("--seed", type=int, default=0, help="of the noise on the mask's row (0)")

    sample = command("sample", _SAMPLE)
    sample.add_argument("run", help=_MODEL)
    sample.add_argument("--dtype", choices=_DTYPES, help=_DTYPE)
    sample.add_argument("--prompt", action="append", help="text to continue; repeat for more rows")
    sample.add_argument(
        "--infill",
        action="append",
        help="text whose blanks are filled, and nothing else; text right of a blank is seen only "
        "inside its block",
    )
    sample.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    sample.add_argument("--chat-template", metavar="FILE", help="Jinja (default: the model's own)")
    sample.add_argument("--prompts", metavar="FILE", help="a prompt a line; .jsonl: JSON, messages")
    sample.add_argument("--rows", type=int, default=8, help="of --prompts at a time (8)")
    sample.add_argument("--blank", default="_", help="the character that marks one blank (_)")
    sample.add_argument(
        "--tokens", type=int, default=128, help="new tokens after a prompt, at most (128)"
    )
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
    sample.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    sample.add_argument(
        "--separate-commit", action="store_true", help="one forward more per block, same text"
    )
    sample.add_argument(
        "--watch", action="store_true", help="show the first text being denoised, on a terminal"
    )
    sample.add_argument("--json", action="store_true", help="one JSON object per row")

    evaluate = command("evaluate", _EVALUATE)
    evaluate.add_argument("run", help=_MODEL)
    evaluate.add_argument("--dtype", choices=_DTYPES, help=_DTYPE)
    evaluate.add_argument("--files", nargs="+", help="UTF-8 files (default: the run's held-out)")
    evaluate.add_argument("--batches", type=int, help="stop after so many batches")
    evaluate.add_argument("--block-size", type=int, help="default: as trained")
    evaluate.add_argument("--draws", type=int, default=1, help="noise draws per row (1)")
    evaluate.add_argument(
        "--exact",
        action="store_true",
        help=f"enumerate all masks (block size up to {bdjax.EXACT_UP_TO})",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the noise draws (0)")
    evaluate.add_argument("--json", action="store_true", help="one JSON object")

    imported = command("import", _IMPORT)
    imported.add_argument("model", help="folder with config.json, tokenizer.json, *.safetensors")
    imported.add_argument("--run", required=True, help="folder of the new run")
    imported.add_argument("--dtype", choices=_DTYPES, help=_DTYPE)

    export = command("export", _EXPORT)
    export.add_argument("run", help=_MODEL)
    export.add_argument("--out", required=True, help="the folder to write")
    export.add_argument(
        "--as", dest="model_type", help="another family, as in sdar (default: fits)"
    )
    export.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as stored)")
    export.add_argument(
        "--max-length",
        type=int,
        help="longest text that the folder says it is for (default: the training rows' length)",
    )

    tokenizer = command("tokenizer", _TOKENIZER)
    tokenizer.add_argument("files", nargs="+", help="UTF-8 files, .gz and .zst too, or globs")
    tokenizer.add_argument("--vocab-size", type=int, default=4096, help="ids, at most (4096)")
    tokenizer.add_argument("--out", required=True, help="folder for tokenizer.json")
    return parser
