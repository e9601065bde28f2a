"""The Hopper kernels compiled for an H100 that is not there: registers, spills, shared memory.

    pip install 'jax[cuda13]'        # its compiler; no GPU and no driver are needed
    python tools/compile_gpu.py
    python tools/compile_gpu.py attention --length 4096 --heads 16 --kv-heads 8 --keep dump

Compiles down to the chip's instructions, so that what a kernel asks of the chip is known before one
is at hand, and errors of lowering are. --keep leaves PTX and reports in a folder. Warnings of the
assembler are printed as they are: C7510 and C7512 say that it serialised products.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from arguments import positive  # noqa: E402

# What XLA has to know of the chip: an H100 SXM with 80 GB, as such a machine reports it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100():
    """A mesh of one H100 that is not there; exits where jax has no CUDA compiler."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    jax.devices()  # finds the plugins
    try:
        found = topologies.get_topology_desc(
            "H100", platform="cuda", target_config=_H100, topology="1x1x1"
        )
    except Exception as error:
        sys.exit(
            f"jax finds no CUDA compiler ({str(error).splitlines()[0]}); type "
            "pip install 'jax[cuda13]'"
        )
    return jax.sharding.Mesh(np.array(found.devices[:1]), ("x",))


def programs(args, shape: Callable) -> dict[str, tuple[Callable, tuple]]:
    """Name -> function and arguments of what the command line asks for."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import Hopper, Intervals, hopper_head

    rows, tokens, width = args.rows, 2 * args.length, args.head_dim
    q = shape((rows, tokens, args.heads, width), jnp.bfloat16)
    k = shape((rows, tokens, args.kv_heads, width), jnp.bfloat16)
    ends = Intervals(*[shape((rows, tokens), jnp.int32)] * 4)
    window = shape((rows, args.window, args.heads, width), jnp.bfloat16)
    cache = shape((2, rows, args.kv_heads, args.slots, width), jnp.bfloat16)
    own = Intervals(*[shape((rows, args.window), jnp.int32)] * 4)
    x = shape((16_384, 2048), jnp.bfloat16)
    head = shape((args.vocab, 2048), jnp.bfloat16)
    of_row = [shape((16_384,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    count = shape((), jnp.int32)

    def attention(q, k, v, d_out, ends):
        found, pull = jax.vjp(lambda *x: Hopper().attention(*x, ends)[0], q, k, v)
        return found, pull(d_out)

    def gradients(x, head, target, log_total, scale, count):
        return hopper_head.gradients(
            x, head, target, log_total, scale, count, (), dtype=jnp.bfloat16
        )

    return {
        "attention": (attention, (q, k, k, q, ends)),
        "window": (Hopper().prefix_attention, (window, cache, cache, count, own)),
        "statistics": (
            lambda *a: hopper_head.statistics(*a, ()),
            (x, head, of_row[0], count),
        ),
        "gradients": (gradients, (x, head, *of_row, count)),
    }


def reports(folder: Path) -> list[str]:
    """A line per kernel that the assembler reported on, and its warnings."""
    lines = []
    for file in sorted(folder.glob("*.ptxas")):
        text = file.read_text()
        registers, spilled = (
            re.search(words, text)
            for words in (r"Used (\d+) registers", r"(\d+) bytes spill loads")
        )
        resources = file.with_suffix(".resources.txt")
        shared = resources.exists() and re.search(r"scratch_bytes=(\d+)", resources.read_text())
        cells = [
            f"{found.group(1) if found else '?'} {what}"
            for found, what in (
                (registers, "registers"),
                (spilled, "bytes of spills read"),
                (shared, "bytes of shared memory"),
            )
        ]
        lines.append(f"  {file.stem}: {', '.join(cells)}")
        lines += [f"    {line}" for line in text.splitlines() if "(C7" in line]
    return lines


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("attention", "window", "statistics", "gradients")
    parser.add_argument("only", nargs="*", metavar="NAME", help=f"{', '.join(names)}; default: all")
    parser.add_argument("--rows", type=positive, default=2)
    parser.add_argument("--length", type=positive, default=4096, help="clean tokens; a row is 2 x")
    parser.add_argument("--heads", type=positive, default=16)
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--slots", type=positive, default=32_768)
    parser.add_argument("--window", type=positive, default=32)
    parser.add_argument("--vocab", type=positive, default=151_936)
    parser.add_argument("--keep", type=Path, help="a folder for PTX and reports")
    args = parser.parse_args()
    unknown = set(args.only) - set(names)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: type some of {', '.join(names)}")
    # The kernels' compiler reads these when it is loaded.
    kept = args.keep or Path(tempfile.mkdtemp())
    kept.mkdir(parents=True, exist_ok=True)
    os.environ |= {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "RESOURCES")}
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(kept)

    import jax

    here = jax.sharding.NamedSharding(h100(), jax.sharding.PartitionSpec())

    def shape(size, dtype):
        return jax.ShapeDtypeStruct(size, dtype, sharding=here)

    for name, (function, arguments) in programs(args, shape).items():
        if args.only and name not in args.only:
            continue
        for file in [*kept.glob("*.ptxas"), *kept.glob("*.resources.txt")]:
            file.unlink()
        traced = jax.jit(function).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(f"{name}: {temporary / 2**20:.1f} MiB beside inputs and outputs")
        print("\n".join(reports(kept)), flush=True)


if __name__ == "__main__":
    main()
