"""Attention under the two-stream mask, ours and other people's, timed in one process.

    python tools/bench_attention.py --rows 2 --length 4096 --block 32 --out attention.json
    python tools/bench_attention.py --window --slots 32768 --window-tokens 32

Rows are [clean; noisy]. Useful FLOPs are those of visible pairs alone: 4 H per pair and query head
forward, 14 H forward and backward together, which is what "backward" means here (two products
forward, five backward with the scores computed again, the usual count for flash attention;
bdjax.flops counts 12 H, without the second scores). Causal anchors count their own pairs.
visited/visible: pairs that a kernel computes over those it must.

Before it is timed every contestant is compared with float32 dense attention on the same inputs,
output and gradients; with a relative error (by norms) above 2e-2 it is not timed. All rows and
heads are compared, but of long rows only the first row's first KV head and the last row's last one,
with all their tokens and query heads: the output says which. Contestants take turns; a number is
the median over the repeats. "spread" is the largest minus the smallest, "again" how far the medians
of the first and the second half of the repeats are apart, in % of the median.

--window reads one layer of a stacked cache, all slots visible: GB/s of keys and values beside those
of a device copy (bytes read and written).
"""

import argparse
import importlib.metadata
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU.
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from arguments import positive  # noqa: E402
from attention_peers import PEERS  # noqa: E402
from attention_race import (  # noqa: E402
    Case,
    Runner,
    hopper_pairs,
    jax_runner,
    normals,
    only,
    race,
    reference,
    tiled_pairs,
)

import pallas_kernels  # noqa: E402
from pallas_kernels import CleanMode, Intervals  # noqa: E402

# FLOPs per visible pair, query head and head dimension.
FLOPS = {"forward": 4, "backward": 14}
# Scores, probabilities, their gradients and the mask: bytes per pair of dense attention.
_DENSE_BYTES = 24


def _kernel(name: str, head_dim: int):
    """One of `pallas_kernels` by class name, on the platform that it is for."""
    if name in ("Cudnn", "Hopper", "Mosaic"):
        only("tpu" if name == "Mosaic" else "gpu")
    kind = getattr(pallas_kernels, name)
    return kind.tuned(jax.devices()[0].device_kind, head_dim) if name == "Mosaic" else kind()


def ours(name: str, case: Case, inputs, seen: Intervals) -> Runner:
    """An implementation of `pallas_kernels` as a contestant."""
    kernel, length, visited = _kernel(name, case.head_dim), 2 * case.length, None
    if name == "Dense":
        visited = case.rows * length**2
        size, stats = case.heads * visited, jax.devices()[0].memory_stats() or {}
        if _DENSE_BYTES * size > stats.get("bytes_limit", 8e9):
            raise NotImplementedError(f"scores of {4 * size / 2**30:.0f} GiB do not fit")
    elif name == "Hopper":
        visited = hopper_pairs(seen, length)
    elif hasattr(kernel, "query_tile") and length >= 2 * max(kernel.query_tile, kernel.key_tile):
        # In shorter rows the kernels take smaller tiles.
        visited = tiled_pairs(seen, kernel.query_tile, kernel.key_tile, length)

    def call(q, k, v, seen):
        return kernel.attention(q, k, v, seen)[0]

    return jax_runner(call, inputs, seen, visited=visited)


OURS = {
    "dense": "Dense",
    "blockwise": "Blockwise",
    "cudnn": "Cudnn",
    "hopper": "Hopper",
    "mosaic": "Mosaic",
}


def training(args) -> dict:
    """The table of the training mask."""
    case = Case(
        rows=args.rows,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        length=args.length,
        block=args.block,
        documents=args.documents,
        clean=CleanMode(args.clean),
        dtype=args.dtype,
    )
    inputs, seen = case.inputs(), case.intervals()
    known = {name: partial(ours, kind) for name, kind in OURS.items()} | PEERS
    contestants = {
        name: partial(build, case, inputs, seen)
        for name, build in known.items()
        if name in (args.only or known)
    }
    truths, units = {}, case.compared()

    def expected(mask):
        if id(mask) not in truths and len(mask.a0):
            truths[id(mask)] = mask, reference(inputs, mask, "backward" in args.passes, units)
        return truths[id(mask)][1]

    found = race(contestants, args.passes, expected, repeats=args.repeats, at_least=args.at_least)
    for entry in found:
        for which, timed in entry["passes"].items():
            flops = FLOPS[which] * case.head_dim * case.heads * entry["visible_pairs"]
            timed["useful_tflops"] = flops / timed["seconds"] / 1e12
    described = asdict(case) | {"clean": case.clean.value}
    rows_and_heads = [[int(u) // case.kv_heads, int(u) % case.kv_heads] for u in units]
    return {
        "case": described,
        "flops_per_pair": FLOPS,
        "compared_rows_and_kv_heads": rows_and_heads,
        "contestants": found,
    }


def window(args) -> dict:
    """The table of a short window against a long cache."""
    layers, shape = 2, (args.rows, args.kv_heads, args.slots, args.head_dim)
    queries = args.rows, args.window_tokens, args.heads, args.head_dim
    q, cache_k, cache_v = normals(0, args.dtype, queries, (layers, *shape), (layers, *shape))
    end = jnp.full(queries[:2], args.slots, jnp.int32)
    seen, layer = Intervals(end * 0, end, end * 0, end * 0), jnp.int32(layers - 1)

    def build(name):
        kernel = _kernel(name, args.head_dim)

        def call(q, k, v, extra):
            return kernel.prefix_attention(q, k, v, *extra)[0]

        return jax_runner(call, (q, cache_k, cache_v, q), seen, extra=(layer, seen))

    def copy():
        # Half a gigabyte like the rest, but no reader of attention: it moves what it is given.
        moved = jax.jit(lambda x: x + 1)
        return Runner(
            lambda which, calls: lambda: moved(cache_k),
            None,
            jax.block_until_ready,
            seen,
            bundles=False,
        )

    keys = (jnp.swapaxes(x[layers - 1], 1, 2) for x in (cache_k, cache_v))
    truth = reference((q, *keys, q), seen, backward=False)
    contestants = {"copy": copy} | {
        name: partial(build, kind) for name, kind in OURS.items() if name in (args.only or OURS)
    }
    found = race(
        contestants, ("forward",), lambda _: truth, repeats=args.repeats, at_least=args.at_least
    )
    size = jnp.dtype(args.dtype).itemsize * args.rows * args.kv_heads * args.slots * args.head_dim
    for entry in found:
        # The copy reads and writes both layers of the keys, a window reads keys and values of one.
        moved = 2 * layers * size if entry["name"] == "copy" else 2 * size
        for timed in entry["passes"].values():
            timed["gigabytes_per_second"] = moved / timed["seconds"] / 1e9
    names = ("rows", "heads", "kv_heads", "head_dim", "slots", "window_tokens", "dtype")
    return {"case": {n: getattr(args, n) for n in names}, "contestants": found}


def table(found: dict) -> str:
    """The contestants as a Markdown table."""
    passes = list(dict.fromkeys(which for e in found["contestants"] for which in e["passes"]))
    heads = {"forward": "forward", "backward": "forward+backward"}
    titles = ["attention", "visited/visible", "error"]
    for which in passes:
        titles += [f"{heads[which]} ms", "spread, again %", _rate_name(found)]
    lines = [" | ".join(titles), " | ".join(["---"] * len(titles))]
    for entry in found["contestants"]:
        ratio, error = entry.get("visited_over_visible"), entry.get("error")
        cells = [entry["name"], f"{ratio:.3f}" if ratio else "", f"{error:.1e}" if error else ""]
        if entry["status"] != "ok":
            cells += [f"{entry['status']}: {entry['reason']}"]
            cells += [""] * (len(titles) - len(cells))
        for timed in entry["passes"].values():
            cells.append(f"{timed['seconds'] * 1e3:.3f}")
            cells.append(f"{timed['spread'] * 100:.1f}, {timed['again'] * 100:.1f}")
            cells.append(f"{timed.get('useful_tflops', timed.get('gigabytes_per_second')):.4g}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def compared(found: dict) -> str:
    """Which outputs and gradients the errors are of."""
    case, units = found["case"], found.get("compared_rows_and_kv_heads")
    if units is None or len(units) == case["rows"] * case["kv_heads"]:
        return "compared with float32: all rows and heads"
    some = ", ".join(f"row {row} with KV head {head}" for row, head in units)
    return f"compared with float32: {some}; not the others of {case['rows']} x {case['kv_heads']}"


def _rate_name(found: dict) -> str:
    return "useful TFLOP/s" if "flops_per_pair" in found else "GB/s"


def machine() -> dict:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    versions = {}
    for package in ("jax", "jaxlib", "torch", "triton", "tokamax", "libtpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"platform": device.platform, "device": device.device_kind, "versions": versions}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=positive, default=2)
    parser.add_argument("--heads", type=positive, default=16)
    parser.add_argument("--kv-heads", type=positive, help="default: --heads")
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--length", type=positive, default=4096, help="clean tokens; a row is 2 x")
    parser.add_argument("--block", type=positive, default=32)
    parser.add_argument("--documents", type=positive, help="pack documents of so many tokens")
    parser.add_argument("--clean", choices=[mode.value for mode in CleanMode], default="token")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], help="default: all")
    parser.add_argument("--passes", default="forward,backward", help="forward,backward")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--at-least", type=float, default=0.2, help="seconds in one sample")
    parser.add_argument("--window", action="store_true", help="a window against a cache")
    parser.add_argument("--slots", type=positive, default=32768)
    parser.add_argument("--window-tokens", type=positive, default=32)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args(words)
    args.kv_heads = args.kv_heads or args.heads
    args.passes = tuple(args.passes.split(","))
    if not set(args.passes) <= set(FLOPS):
        parser.error(f"--passes {','.join(args.passes)}: type some of {','.join(FLOPS)}")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}")
    return args


def main(words: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    args = arguments(words)
    found = machine() | (window if args.window else training)(args)
    print(f"{found['platform']}, {found['device']}, {found['versions']}\n{found['case']}")
    print(f"{compared(found)}\n\n{table(found)}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
