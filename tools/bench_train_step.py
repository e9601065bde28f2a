"""The train step of a Qwen3-1.7B shape on one GPU, bdjax beside PyTorch, in turn on one chip.

    python tools/bench_train_step.py --out train_step.json
    python tools/bench_train_step.py --only ours:dots:2 --profile profile

Rows are [clean; noisy], 4096 tokens each, in blocks of 32 with exact-count masks; the loss is that
of the masked tokens (and --ar-weight times the next-token loss). A contestant is
SIDE:REMAT:ROWS. Ours: `bdjax.train_step.train_step` itself, float32 parameters and moments, bf16
compute. Peer: FlexAttention, torch.compile, fused AdamW, float32 parameters and moments as ours, or
all in bf16 (peer-bfloat16). Each runs in a process of its own, one after another, so that memory is
free again; one that fails or exceeds its time says so and the others go on.

Clean tokens/s counts rows x length per step. MFU is model FLOPs (bdjax.flops, the same number for
all) over the data sheet's bf16 peak. Compilation is not timed.

--profile traces two steps of ours and prints the groups and kernels that take longest. CUDA graphs
are off in that process alone, since captured kernels lose their names.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from arguments import positive  # noqa: E402
from train_step_case import Contestant, Shape, contestant  # noqa: E402

_DEFAULT = (
    "ours:dots:2",
    "ours:none:2",
    "peer:none:1",
    "peer:full:2",
    "peer:none:2",
    "ours:dots:1",
)
_RESULT = "RESULT "


def alone(args: argparse.Namespace, who: Contestant, shape: Shape) -> dict:
    """Measures one contestant in this process."""
    settings = {"steps": args.steps, "samples": args.samples}
    if who.side == "peer":
        import train_step_peer

        cuda = args.device == "gpu"
        place = {"device": "cuda" if cuda else "cpu", "compiled": cuda}
        return train_step_peer.measure(who, shape, **settings, **place)
    import train_step_ours

    return train_step_ours.measure(who, shape, **settings, profile=args.profile)


def environment(args: argparse.Namespace, who: Contestant) -> dict[str, str]:
    """That of a contestant's process: memory for it alone, and nothing of JAX on the peer's GPU."""
    found = dict(os.environ)
    if who.side == "peer":
        found["JAX_PLATFORMS"] = "cpu"
        found.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        return found
    found["JAX_PLATFORMS"] = {"gpu": "cuda", "cpu": "cpu"}[args.device]
    found.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if args.profile:
        flags = found.get("XLA_FLAGS", "")
        found["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()
    return found


def in_its_own_process(args: argparse.Namespace, who: Contestant, words: list[str]) -> dict:
    """Its numbers, or {"error": why there are none}."""
    command = [sys.executable, __file__, *words, "--alone", str(who)]
    process = subprocess.Popen(
        command,
        env=environment(args, who),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=args.limit)
    except subprocess.TimeoutExpired:
        # The compilers' workers go with it: they would hold the pipe and the GPU.
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        return {"error": f"over {args.limit} s", "output": output[-2000:]}
    lines = output.splitlines()
    results = [line for line in lines if line.startswith(_RESULT)]
    if process.returncode or not results:
        told = next((x for x in reversed(lines) if "Error" in x or "RESOURCE" in x), "")
        error = f"exit {process.returncode}: {told[:300]}"
        return {"error": error, "output": output[-4000:]}
    if args.profile and who.side == "ours":
        print("\n".join(line for line in lines if not line.startswith(_RESULT)), flush=True)
    return json.loads(results[-1].removeprefix(_RESULT))


def rates(found: dict, who: Contestant, shape: Shape) -> dict:
    """Clean tokens/s, model FLOPs and MFU of a measured step."""
    # bdjax and its FLOPs touch no device.
    from train_step_ours import flops

    from bdjax.chips import chip_of

    work, chip = flops(shape, who.remat, who.rows), chip_of(found["device"])
    total = work.total
    return found | {
        "clean_tokens_per_second": who.rows * shape.length / found["seconds"],
        "model_flops": asdict(work) | {"total": total},
        "mfu": total / found["seconds"] / chip.flops if chip else None,
    }


def table(entries: list[dict]) -> str:
    """The contestants as a Markdown table."""
    titles = ("step", "ms", "spread %", "clean tokens/s", "MFU %", "peak GB", "parameters, moments")
    lines = [titles, ("---",) * len(titles)]
    for entry in entries:
        if "error" in entry:
            lines.append((entry["name"], entry["error"].replace("|", "/")) + ("",) * 5)
            continue
        peak, mfu, dtypes = entry["peak_bytes"], entry["mfu"], entry["dtypes"]
        lines.append(
            (
                entry["name"],
                f"{entry['seconds'] * 1e3:.1f}",
                f"{entry['spread'] * 100:.1f}",
                f"{entry['clean_tokens_per_second']:,.0f}",
                "" if mfu is None else f"{mfu * 100:.1f}",
                "" if peak is None else f"{peak / 1e9:.1f}",
                f"{dtypes['parameters']}, {dtypes['moments']}",
            )
        )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    speeds: dict[str, list[float]] = {"ours": [0.0], "peer": [0.0]}
    for entry in entries:
        speeds[entry["name"][:4]].append(entry.get("clean_tokens_per_second", 0.0))
    best = {side: max(found) for side, found in speeds.items()}
    if all(best.values()):
        text += f"\nbest of ours over best of the peer: {best['ours'] / best['peer']:.3f}"
    return text


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Shape):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument(
        "--only",
        nargs="+",
        type=contestant,
        default=[contestant(text) for text in _DEFAULT],
        metavar="SIDE:REMAT:ROWS",
        help=f"default: {' '.join(_DEFAULT)}",
    )
    parser.add_argument("--steps", type=positive, default=5, help="in a sample")
    parser.add_argument("--samples", type=positive, default=3)
    parser.add_argument("--limit", type=float, default=180, help="seconds for one contestant")
    parser.add_argument("--profile", type=Path, help="a folder for traces of ours")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--alone", type=contestant, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measures, prints, writes after every contestant."""
    words = sys.argv[1:] if words is None else words
    args = arguments(words)
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    if args.alone:
        print(_RESULT + json.dumps(alone(args, args.alone, shape)), flush=True)
        return
    entries = []
    for who in args.only:
        found = in_its_own_process(args, who, words)
        if "error" in found:
            print(f"{who}: {found['error']}\n{found.get('output', '')}", flush=True)
        else:
            found = rates(found, who, shape)
            print(
                f"{who}: {found['clean_tokens_per_second']:,.0f} clean tokens/s, "
                f"{found['compile_seconds']:.0f} s to compile, first loss "
                f"{found['first_loss']:.3f}, {found['parameters']:,} parameters",
                flush=True,
            )
        entries.append({"name": str(who)} | found)
        if args.out:
            args.out.write_text(json.dumps({"shape": asdict(shape), "steps": entries}, indent=1))
    measured = [entry for entry in entries if "error" not in entry]
    if measured:
        versions = {k: v for entry in measured for k, v in entry["versions"].items()}
        print(f"\n{measured[0]['device']}, {versions}\n{shape}\n")
    print(table(entries))


if __name__ == "__main__":
    main()
