"""Compiles kernels and whole steps for TPUs on a machine that has none, and reads the programs.

    python tools/compile_tpu.py kernel --topology v5e-4 --length 4096 --head-dim 128
    python tools/compile_tpu.py tiles --topology v5e-4 --head-dims 64 128 --json tiles.json
    python tools/compile_tpu.py configs/pod_1b.py --topology v5e-16 mesh.data=1 data.batch_size=16

kernel: forward, backward (both passes in one program) and window, for one chip of the slice.
tiles: the training kernel for a grid of tile sizes, and which of them do not compile; --table puts
the cheapest into pallas_kernels/tile_sizes.json.
A config: its train step and its sampler (`advance`), for the slice.

Bytes are per device. Cycles are the compiler's and leave out Mosaic kernels, for which it gives
none. Of those libtpu writes the schedule: "bundles" are instruction words, one issued per cycle if
nothing stalls, here the kernel's whole program and its two longest stretches without a branch: in
our training kernels the work on one pair of tiles with a mask and, the shorter, without. `tiles`
counts those over the pairs of tiles of the two-stream mask: an estimate, not a measurement.
"""

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from attention_peers import splash_kernel  # noqa: E402
from attention_race import Case, pairs, tile_counts  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import pallas_kernels  # noqa: E402
from bdjax import apply_overrides, load_config  # noqa: E402
from bdjax.chips import chip_of  # noqa: E402
from bdjax.hlo import collectives, estimated_cycles, mosaic_calls  # noqa: E402
from bdjax.objective import Alignment  # noqa: E402
from bdjax.plan import (  # noqa: E402
    abstract_arguments,
    compile_step,
    placed,
    platforms,
    read_plan,
    slice_mesh,
    tpu_slice,
)
from bdjax.policies import Dynamic  # noqa: E402
from bdjax.sampler import UNLIMITED, Controls, Request, Sampler, advance, start  # noqa: E402
from bdjax.sharding import make_mesh, spec  # noqa: E402
from pallas_kernels import CleanMode, Intervals  # noqa: E402
from pallas_kernels.tile_sizes import TileSizes  # noqa: E402

# --- What a compiled program says -----------------------------------------------------------------


def read(compiled, device, seconds: float) -> dict:
    """A compiled program in numbers; bytes per device."""
    text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    held = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    chip, found = chip_of(device.device_kind), collectives(text)
    optimal = (cost or {}).get("optimal_seconds", 0.0)
    return {
        "compile_seconds": seconds,
        "memory": held,
        "needed": sum(held.values()),
        "fits": sum(held.values()) <= chip.memory if chip else None,
        "mosaic_calls": mosaic_calls(text),
        "collectives": {kind: t._asdict() for kind, t in found.traffic.items()},
        "flops": (cost or {}).get("flops"),
        # Negative where some instruction has no estimate.
        "optimal_seconds": optimal if optimal > 0 else None,
        "estimated_cycles": estimated_cycles(text),
    }


def lines(found: dict) -> list[str]:
    """`read` for people."""
    if "failed" in found:
        return [f"  does not compile: {found['failed']}"]
    kinds = ", ".join(f"{kind} {size / 2**20:,.1f}" for kind, size in found["memory"].items())
    calls = ", ".join(f"{name} x {n}" for name, n in found["mosaic_calls"].items())
    moved = ", ".join(
        f"{kind} x {t['count']} ({t['bytes'] / 2**20:,.1f} MiB)"
        for kind, t in found["collectives"].items()
    )
    shown = [
        f"  compiled in {found['compile_seconds']:.1f} s",
        f"  MiB: {kinds}; in all {found['needed'] / 2**20:,.1f}"
        + {True: ", fits", False: ", DOES NOT FIT", None: ""}[found["fits"]],
        f"  Mosaic calls: {calls or 'none'}",
        f"  collectives: {moved or 'none'}",
        f"  XLA's FLOPs, loop bodies once and without kernels: {found['flops']:,.0f}",
        f"  estimated cycles, without kernels and collectives: {found['estimated_cycles']:,}",
    ]
    if found["optimal_seconds"]:
        shown.append(f"  optimal seconds, of what it can tell: {found['optimal_seconds']:.3g}")
    for name, size in found.get("bundles", {}).items():
        shown.append(f"  {name}: {size['total']} bundles, longest stretches {size['stretches']}")
    return shown


class Schedules:
    """Where libtpu writes the schedules of what it compiles; to be made before libtpu is loaded."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()

    def take(self, kernels) -> dict:
        """The bundles of these kernels since the last call."""
        names = "|".join(map(re.escape, kernels)) or "$^"
        found = {}
        for path in sorted(self.folder.iterdir()):
            name = re.fullmatch(
                rf"\d+-((?:{names})(?:\.\d+|\.clone)*)-\d+-final_bundles.txt", path.name
            )
            if name:
                found[name[1]] = bundles(path.read_text())
            path.unlink()
        return found


def bundles(schedule: str) -> dict:
    """Bundles of a kernel: all, and the two longest stretches without a branch, longest first."""
    ends, last = [0], 0
    for line in schedule.splitlines():
        address = re.match(r"\s*(0x[0-9a-f]+)\s*:", line)
        if address:
            last = int(address[1], 16)
            if "sbr.rel" in line:
                ends.append(last)
    stretches = sorted((b - a for a, b in itertools.pairwise([*ends, last])), reverse=True)
    return {"total": last + 1, "stretches": stretches[:2]}


def compiled_for(topology: str, function, arguments) -> dict:
    """`read` of a function of abstract arrays on one chip of the slice, or why it is refused."""
    mesh = one_chip(topology)
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        try:
            traced = jax.jit(function).trace(*placed(arguments, mesh))
            compiled = traced.lower(lowering_platforms=platforms(topology)).compile()
        except Exception as error:
            said = " ".join(str(error).split())
            return {"failed": f"{type(error).__name__}: {said[:300]}"}
        return read(compiled, mesh.devices.flat[0], time.perf_counter() - begin)


def one_chip(topology: str):
    """A mesh of one device of the slice: what a kernel inside `shard_map` sees."""
    devices = jax.devices() if topology == "here" else tpu_slice(topology)
    return make_mesh(devices=devices[:1])


# --- Kernels --------------------------------------------------------------------------------------


def case_of(args, head_dim: int) -> Case:
    """The training rows of the command line."""
    return Case(
        rows=args.rows,
        heads=args.heads,
        kv_heads=args.kv_heads or args.heads,
        head_dim=head_dim,
        length=args.length,
        block=args.block,
        documents=args.documents,
        clean=CleanMode(args.clean),
        dtype=args.dtype,
    )


def training_arguments(case: Case) -> tuple:
    """Abstract q, k, v, intervals and gradient of the output."""
    inputs = jax.eval_shape(case.inputs)
    return *inputs[:3], Intervals(*[_integers(case.rows, 2 * case.length)] * 4), inputs[3]


def _integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def implementation(args, case: Case, tiles: tuple[int | None, int | None]):
    """(q, k, v, intervals) -> out of the kernel on the command line, and its prefix_attention."""
    if args.implementation == "splash":
        kernel, _ = splash_kernel(case, tiles[0])

        def splash(q, k, v, seen):
            q, k, v = (x.swapaxes(1, 2) for x in (q * case.head_dim**-0.5, k, v))
            return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

        return splash, None
    impl = getattr(pallas_kernels, args.implementation.capitalize())
    if args.implementation == "mosaic":
        impl = partial(replace, impl.tuned(_device(args.topology).device_kind, case.head_dim))
    sizes = dict(zip(("query_tile", "key_tile"), tiles, strict=True))
    chosen = impl(**{name: size for name, size in sizes.items() if size})
    return lambda *inputs: chosen.attention(*inputs)[0], chosen.prefix_attention


def _device(topology: str):
    return one_chip(topology).devices.flat[0]


def gradients(attention):
    """Forward and backward in one program."""

    def both(q, k, v, seen, d_out):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, seen), q, k, v)
        return out, pull(d_out)

    return both


def kernel(args, schedules: Schedules) -> dict:
    """Forward, backward and window of one kernel."""
    case = case_of(args, args.head_dim)
    attention, window = implementation(args, case, (args.query_tile, args.key_tile))
    inputs = training_arguments(case)
    programs = {"forward": (attention, inputs[:4]), "backward": (gradients(attention), inputs)}
    if window:
        wide = case.rows, args.window_tokens, case.heads, case.head_dim
        stack = 2, case.rows, case.kv_heads, args.slots, case.head_dim
        q, cache = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in (wide, stack))
        seen = Intervals(*[_integers(*wide[:2])] * 4)
        programs["window"] = window, (q, cache, cache, _integers(), seen)
    found = {}
    for name, (function, arguments) in programs.items():
        found[name] = compiled_for(args.topology, function, arguments)
        found[name]["bundles"] = schedules.take(found[name].get("mosaic_calls", ()))
        print("\n".join([name, *lines(found[name])]), flush=True)
    return found


def tiles(args, schedules: Schedules) -> dict:
    """The training kernel over a grid of tiles, with its cycles per 1000 visible pairs and head."""
    titles = ("head_dim", "query", "key", "visited/visible", "cycles per 1000 pairs", "kernels")
    rows, found = [" | ".join(titles), " | ".join(["---"] * len(titles))], []
    for head_dim, query, key in itertools.product(args.head_dims, args.query_tiles, args.key_tiles):
        entry = tile_pair(args, schedules, case_of(args, head_dim), query, key)
        cycles, calls = entry["cycles_per_1000_pairs"], entry["bundles"].items()
        stretches = ", ".join(f"{name}: {size['stretches']}" for name, size in calls)
        ratio = f"{entry['visited_over_visible']:.3f}"
        cells = [head_dim, query, key, ratio, f"{cycles:.2f}" if cycles else ""]
        rows.append(" | ".join(map(str, [*cells, entry.get("failed", stretches)])))
        found.append(entry)
        print(f"... {rows[-1]}", file=sys.stderr, flush=True)
    print("\n".join(f"| {row} |" for row in rows))
    kind = _device(args.topology).device_kind
    if args.table:
        table = json.loads(args.table.read_text())
        args.table.write_text(json.dumps(with_best(table, kind, found), indent=1) + "\n")
    return {"kind": kind, "tiles": found}


def tile_pair(args, schedules: Schedules, case: Case, query: int, key: int) -> dict:
    """What a training kernel of these tiles costs, or why it does not compile."""
    if max(query, key) > case.length:
        raise SystemExit(
            f"rows of {2 * case.length} hold no two tiles of {max(query, key)}; type --length "
            f"{max(query, key)} or smaller tiles"
        )
    seen = case.intervals()
    attention, _ = implementation(args, case, (query, key))
    found = compiled_for(args.topology, gradients(attention), training_arguments(case))
    schedule = schedules.take(found.get("mosaic_calls", ()))
    visited, full = tile_counts(seen, query, key, 2 * case.length)
    cycles = 0
    for kernel in schedule.values():
        masked, unmasked = kernel["stretches"]
        cycles += case.kv_heads * ((visited - full) * masked + full * unmasked)
    return found | {
        "head_dim": case.head_dim,
        "query_tile": query,
        "key_tile": key,
        "bundles": schedule,
        "visited_over_visible": visited * query * key / pairs(seen),
        "cycles_per_1000_pairs": 1000 * cycles / pairs(seen) / case.heads or None,
    }


def with_best(table: dict, kind: str, found: list[dict]) -> dict:
    """The table of `pallas_kernels.tile_sizes` with the cheapest tiles found for this chip.

    Window tiles stay as they are: their cost is the cache's bytes, which no schedule shows.
    """
    rows = {(row["kind"], row["head_dim"]): row for row in table["rows"]}
    for entry in sorted(found, key=lambda e: e["cycles_per_1000_pairs"] or 0, reverse=True):
        if entry["cycles_per_1000_pairs"]:
            place = kind, entry["head_dim"]
            window = rows.get(place, {}).get("window", TileSizes().window)
            sizes = {"query": entry["query_tile"], "key": entry["key_tile"], "window": window}
            rows[place] = {"kind": kind, "head_dim": entry["head_dim"]} | sizes
    return {"rows": [rows[place] for place in sorted(rows)]}


# --- Configs --------------------------------------------------------------------------------------


def config(args, schedules: None) -> dict:
    """The train step and the sampler of a config."""
    chosen = apply_overrides(load_config(args.path), args.overrides)
    found = {}
    if "train" in args.programs:
        program = compile_step(chosen, args.topology)
        plan, text = read_plan(chosen, args.topology, program), program.compiled.as_text()
        more = {"mosaic_calls": mosaic_calls(text), "estimated_cycles": estimated_cycles(text)}
        found["train"] = plan.as_dict() | more
        print(f"{plan}\n\n{more}\n", flush=True)
    if "sampler" in args.programs:
        slots = args.slots or chosen.data.row_length
        found["sampler"] = sampler(chosen, args.topology, args.rows, slots)
        print("\n".join([f"sampler, {args.rows} rows of {slots} slots", *lines(found["sampler"])]))
    return found


def sampler(config, topology: str, rows: int, slots: int) -> dict:
    """`read` of the sampler's loop."""
    begin = time.perf_counter()
    compiled = compile_sampler(config, topology, rows, slots)
    return read(compiled, _device(topology), time.perf_counter() - begin)


def compile_sampler(config, topology: str, rows: int, slots: int) -> jax.stages.Compiled:
    """`advance`, traced with abstract arrays; rows a multiple of data x fsdp."""
    mesh, alignment = slice_mesh(config, topology), config.objective.alignment
    size = config.objective.block_size.largest
    loop = Sampler(
        model=config.build_model(),
        process=config.objective.process,
        canvas=size,
        alignment=alignment,
        fused=alignment is not Alignment.SHIFTED_NOISY,
    )
    with jax.set_mesh(mesh):

        def shape(dtype, *dims):
            where = NamedSharding(mesh, spec("batch", *["length"] * (len(dims) - 1)))
            return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

        params = abstract_arguments(config, mesh)[3].averaged
        integers = [shape(jnp.int32, rows)] * 4
        request = Request(shape(jnp.int32, rows, slots), shape(bool, rows, slots), *integers)
        whole = NamedSharding(mesh, PartitionSpec())
        controls = Controls(
            policy=Dynamic(threshold=0.9, steps=size),
            temperature=shape(jnp.float32, rows),
            top_k=None,
            top_p=None,
            bias=None,
            stop=jax.ShapeDtypeStruct((1,), jnp.int32, sharding=whole),
        )
        key = placed(jax.eval_shape(lambda: jax.random.key(0)), mesh)
        first = partial(start, loop, prefill=0)
        state = placed(jax.eval_shape(first, params, request, controls, key), mesh)
        traced = advance.trace(loop, params, state, UNLIMITED)
        return traced.lower(lowering_platforms=platforms(topology)).compile()


# --- Command line ---------------------------------------------------------------------------------


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; a path in the first place is a config."""
    commands = {"kernel": kernel, "tiles": tiles, "config": config}
    if words and words[0] not in commands and not words[0].startswith("-"):
        words = ["config", *words]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    some = parser.add_subparsers(dest="command", required=True)
    for name, function in commands.items():
        command = some.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--topology", default="v5e-4", help="v5e-16, v5p:2x2x4, .. or here")
        command.add_argument("--json", type=Path, metavar="FILE")
        if name == "config":
            command.add_argument("path")
            command.epilog = "More words are overrides: mesh.data=1 data.batch_size=16"
            command.add_argument("--programs", nargs="+", default=["train", "sampler"])
            command.add_argument("--rows", type=int, default=16, help="of the sampler")
            command.add_argument("--slots", type=int, help="of its cache; default data.row_length")
            continue
        command.add_argument("--rows", type=int, default=1)
        command.add_argument("--heads", type=int, default=16)
        command.add_argument("--kv-heads", type=int, help="default: --heads")
        command.add_argument("--length", type=int, default=4096, help="clean tokens")
        command.add_argument("--block", type=int, default=32)
        command.add_argument("--documents", type=int, help="pack documents of so many tokens")
        command.add_argument("--clean", choices=[m.value for m in CleanMode], default="token")
        command.add_argument("--dtype", default="bfloat16")
        if name == "kernel":
            choices = ("mosaic", "splash", "blockwise")
            command.add_argument("--implementation", default="mosaic", choices=choices)
            command.add_argument("--head-dim", type=int, default=128)
            command.add_argument("--query-tile", type=int, help="default: the kernel's own")
            command.add_argument("--key-tile", type=int, help="default: the kernel's own")
            command.add_argument("--slots", type=int, default=32768, help="of the window's cache")
            command.add_argument("--window-tokens", type=int, default=64)
        else:
            command.set_defaults(implementation="mosaic")
            command.add_argument(
                "--table", type=Path, help="pallas_kernels/tile_sizes.json: update"
            )
            command.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
            command.add_argument("--query-tiles", type=int, nargs="+", default=[256, 512, 1024])
            command.add_argument("--key-tiles", type=int, nargs="+", default=[256, 512, 1024])
    args, args.overrides = parser.parse_known_args(words)
    unknown = [w for w in args.overrides if args.command != "config" or "=" not in w or w[0] == "-"]
    if unknown:
        parser.error(f"unknown words {' '.join(unknown)}; type --help, or key=value for a config")
    return args


def main(words: list[str] | None = None) -> None:
    """Compiles, prints, writes."""
    args = arguments(sys.argv[1:] if words is None else words)
    # A program out of the cache has taken no time and has no schedule.
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as folder:
        # Of a whole step the schedules would be gigabytes.
        schedules = None if args.command == "config" else Schedules(folder)
        found = args.function(args, schedules)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
