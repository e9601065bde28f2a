"""Where a step's time goes on a GPU: a jax.profiler trace and the compiled program as two tables.

    python tools/kernel_profile.py FOLDER        # the newest trace below it, without the program

Kernels are summed by name, and by what they belong to: the scope of the model, the pass, and
whether they multiply matrices. The program's text says which instruction came from which scope;
a kernel without one (a captured graph keeps no names of libraries' kernels) counts as "other".
"""

import gzip
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

# Scopes of op names, the first that occurs in the name counts.
_SCOPES = ("embedding", "readout_nll", "optimiser", "attention", "mlp", "Decoder")
_TOP = 15
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_PRODUCTS = re.compile(r"\b(?:dot|convolution)\(|__cublas|__triton\w*gemm")


def events(folder: Path) -> list[dict]:
    """The kernels and copies of the newest trace below a folder, as the trace viewer has them."""
    found = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no *.trace.json.gz below {folder}")
    with gzip.open(found[-1], "rt") as file:
        trace = json.load(file)["traceEvents"]
    names: dict[tuple, str] = {}
    for event in trace:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            key = event["pid"], event.get("tid") if event["name"] == "thread_name" else None
            names[key] = event["args"]["name"]

    def on_stream(event):
        device, line = (names.get((event["pid"], x), "") for x in (None, event.get("tid")))
        return "GPU" in device and line.startswith("Stream")

    return [event for event in trace if event.get("ph") == "X" and on_stream(event)]


def origins(program: str) -> dict[str, tuple[str, bool]]:
    """instruction -> (op name, whether it multiplies matrices), from a compiled program's text."""
    lines: dict[str, list[str]] = {}
    inside = ""
    for line in program.splitlines():
        if begin := _COMPUTATION.match(line):
            inside = begin.group(1)
            lines[inside] = []
        elif inside:
            lines[inside].append(line)
    multiplies = {name for name, body in lines.items() if any(map(_PRODUCTS.search, body))}
    found = {}
    for body in lines.values():
        for line in body:
            named = _INSTRUCTION.match(line)
            if not named:
                continue
            op_name = re.search(r'op_name="([^"]*)"', line)
            called = re.search(r"calls=%?([\w.-]+)", line)
            product = bool(_PRODUCTS.search(line)) or (called and called.group(1) in multiplies)
            found[named.group(1)] = (op_name.group(1) if op_name else "", bool(product))
    return found


def group(event: dict, known: dict[str, tuple[str, bool]]) -> str:
    """Scope, pass and kind of a kernel, such as "mlp backward product"."""
    name = event["name"]
    instruction = event.get("args", {}).get("hlo_op") or name
    op_name, product = known.get(instruction, ("", False))
    # Kernels are called as their instruction, with underscores for dots.
    if not op_name:
        op_name, product = known.get(re.sub(r"_(\d+)$", r".\1", name), ("", False))
    product |= bool(re.search(r"gemm|nvjet|cutlass|xmma", name))
    scope = next((scope for scope in _SCOPES if f"{scope}" in op_name), "other")
    when = "forward"
    if "transpose(" in op_name:
        when = "again" if "rematted_computation" in op_name else "backward"
    attends = "sdpa" in name or name.startswith("attention_")
    kind = "product" if product else "attention kernel" if attends else "rest"
    if name.lower().startswith("mem"):
        kind = "copy"
    return f"{scope} {kind}" if scope in ("other", "optimiser") else f"{scope} {when} {kind}"


def busy(found: list[dict]) -> tuple[float, float]:
    """Microseconds between the first and the last kernel, and those with a kernel running."""
    spans = sorted((e["ts"], e["ts"] + e.get("dur", 0)) for e in found)
    covered, end = 0.0, spans[0][0]
    for start, stop in spans:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return end - spans[0][0], covered


def _ranked(found: list[dict], key, steps: int, wall: float) -> list[str]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in found:
        total = sums[key(event)]
        total[0] += event.get("dur", 0)
        total[1] += 1
    ranked = sorted(sums.items(), key=lambda item: -item[1][0])[:_TOP]
    return [
        f"{time / steps / 1e3:10.3f} ms {time / wall:6.1%} {count / steps:8.0f} x  {name}"
        for name, (time, count) in ranked
    ]


def profile_table(folder: Path, program: str = "", steps: int = 1) -> str:
    """Time per step by group and by kernel, the longest first; the share is of the wall time."""
    found = events(folder)
    if not found:
        return f"no kernels of a GPU in the trace below {folder}"
    known = origins(program)
    wall, covered = busy(found)
    return "\n".join(
        [
            f"{wall / steps / 1e3:.3f} ms a step, {1 - covered / wall:.1%} of it without a kernel",
            "by scope, pass and kind:",
            *_ranked(found, lambda event: group(event, known), steps, wall),
            "by kernel:",
            *_ranked(found, _described(known), steps, wall),
        ]
    )


def _described(known):
    def key(event):
        instruction = event.get("args", {}).get("hlo_op", "")
        where = known.get(instruction, ("",))[0].rsplit("/", 3)[-3:]
        return f"{event['name'][:70]}  {'/'.join(where)}"

    return key


if __name__ == "__main__":
    print(profile_table(Path(sys.argv[1])))
