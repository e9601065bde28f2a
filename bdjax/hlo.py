"""Reads a compiled program's text: its collectives, kernels, arrays and the compiler's estimates.

XLA's own cost analysis counts a loop's body once. Here bodies are multiplied by their trip counts,
taken from XLA's annotation or from a condition `i < constant`, which is how scans come out (they
start at 0 and step by 1). A loop whose bound is data counts once and is reported.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\]")
_BUFFER = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]+)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|branch_computations|called_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%?[^\s,)}]+)"
)
_CONDITION = re.compile(r"\bcondition=%?([^\s,)}]+)")
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")  # groups of one device
_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
_CONSTANT = re.compile(r"%?(\S+) = [su]\d+\[\]\S* constant\((\d+)\)")
_BOUND = re.compile(r"ROOT .* compare\(%?([^\s,]+), %?([^\s,)]+)\), direction=LT")


class Traffic(NamedTuple):
    """Collectives of one kind in one run of the program, on one device.

    bytes: sizes of the whole arrays they make (of what goes in for a reduce-scatter), added up.
    """

    count: int
    bytes: int


class Collectives(NamedTuple):
    """Traffic by kind; `open_loops` bodies that hold collectives have a bound that is data and are
    counted once.
    """

    traffic: dict[str, Traffic]
    open_loops: int


class Buffer(NamedTuple):
    """An array type of a compiled program: "bf16", (2, 4096)."""

    kind: str
    shape: tuple[int, ...]


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


def collectives(text: str) -> Collectives:
    """The collectives of a compiled program (`compiled.as_text()`)."""
    traffic = {kind: Traffic(0, 0) for kind in KINDS}
    open_loops: set[str] = set()
    for run in _executed(text, _is_collective):
        open_loops.update(run.loops)
        kind = run.instruction.opcode.removesuffix("-start")
        if not _ALONE.search(run.instruction.rest) and _begins(run.instruction):
            size = _moved(kind, run.instruction, run.computation)
            before = traffic[kind]
            traffic[kind] = Traffic(before.count + run.times, before.bytes + run.times * size)
    return Collectives({k: t for k, t in traffic.items() if t.count}, len(open_loops))


def mosaic_calls(text: str) -> dict[str, int]:
    """How often one run calls each Pallas kernel of a TPU program, by the kernel's name.

    Loops whose bound is data count once.
    """
    found: dict[str, int] = {}
    for run in _executed(text, lambda i: 'custom_call_target="tpu_custom_call"' in i.rest):
        name = re.sub(r"(\.\d+|\.clone)+$", "", run.instruction.name)
        found[name] = found.get(name, 0) + run.times
    return found


def estimated_cycles(text: str) -> int:
    """The TPU compiler's estimates, added up over one run of the program on one core.

    It gives none for kernels, collectives, copies and some loops (int64's largest number there);
    loops whose bound is data count once.
    """
    known = ((run.times, _cycles(run.instruction)) for run in _executed(text, _cycles))
    return sum(times * cycles for times, cycles in known)


def _cycles(instruction: _Instruction) -> int:
    found = _CYCLES.search(instruction.rest)
    cycles = int(found[1]) if found else 0
    return 0 if cycles >= _NO_ESTIMATE else cycles


def largest_buffers(text: str, at_least: int) -> list[Buffer]:
    """The shapes of at least so many elements in a compiled program's text, largest first.

    Each shape once. Results inside fusions, which no memory holds, are among them.
    """
    found = {
        Buffer(kind, tuple(int(n) for n in dims.split(","))) for kind, dims in _BUFFER.findall(text)
    }
    found = {buffer for buffer in found if math.prod(buffer.shape) >= at_least}
    return sorted(found, key=lambda b: (-math.prod(b.shape), b))


class _Run(NamedTuple):
    """An instruction that runs `times` times, inside these loops whose bounds are data."""

    instruction: _Instruction
    computation: list[_Instruction]
    times: int
    loops: tuple[str, ...]


def _executed(text: str, wanted: Callable[[_Instruction], object]) -> Iterator[_Run]:
    """The wanted instructions in the order of one run of the program."""
    computations, entry = _computations(text)
    holding = _holding(computations, wanted)

    def visit(name: str, times: int, path: tuple[str, ...]) -> Iterator[_Run]:
        for instruction in computations.get(name, ()):
            if wanted(instruction):
                yield _Run(instruction, computations[name], times, path)
            inner, within = times, path
            if instruction.opcode == "while":
                trips = _trip_count(instruction, computations)
                inner *= trips or 1
                within = (*path, instruction.name) if trips is None else path
            if instruction.opcode in ("async-update", "async-done"):
                continue  # They name the computation that their start has run.
            for called in _CALLED.finditer(instruction.rest):
                for target in re.findall(r"[^\s,{}%]+", called[2]):
                    if target in holding:
                        yield from visit(target, inner, within)

    return visit(entry, 1, ())


def _is_collective(instruction: _Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _begins(instruction: _Instruction) -> bool:
    """False for the later spellings of a collective that a TPU spreads over several fusions.

    Channels cannot tell: XLA gives these spellings one channel, but `shard_map` gives channel 1 to
    every collective. The compiler marks the fusion that begins one with flag_start -1.
    """
    flag = _PIECE.search(instruction.rest)
    return flag is None or flag[1] == "-1"


def array_bytes(shape: str) -> int:
    """Bytes of an HLO shape such as "f32[2,3]{1,0}", or of all arrays of a tuple of them."""
    total = 0
    for kind, dims in _ARRAY.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            number = re.search(r"\d+", kind)
            bits = int(number[0]) if number else 0
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            if header:
                name = header[2]
                computations[name] = []
                entry = name if header[1] else entry
            continue
        instruction = _instruction(line.strip())
        if instruction is not None and name:
            computations[name].append(instruction)
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    name, equals, right = line.partition(" = ")
    if not equals:
        return None
    end = _closing(right) if right.startswith("(") else right.find(" ")
    shape, rest = right[:end], right[end:].strip()
    return _Instruction(name.split()[-1].lstrip("%"), shape, rest.partition("(")[0], line)


def _closing(text: str) -> int:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _operands(instruction: _Instruction, computation: list[_Instruction]) -> int:
    """Bytes of the operands: XLA writes their names, or their shapes before the names."""
    begin = instruction.rest.index(instruction.opcode + "(") + len(instruction.opcode)
    inside = instruction.rest[begin : begin + _closing(instruction.rest[begin:])]
    if _ARRAY.search(inside):
        return array_bytes(inside)
    shapes = {other.name: other.shape for other in computation}
    names = re.findall(r"%?([^\s,()]+)", re.sub(r"/\*.*?\*/", "", inside))
    return sum(array_bytes(shapes.get(name, "")) for name in names)


def _moved(kind: str, instruction: _Instruction, computation: list[_Instruction]) -> int:
    if kind == "reduce-scatter":
        return _operands(instruction, computation)
    result = array_bytes(instruction.shape)
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # The result of a start holds its operands too.
        result -= _operands(instruction, computation)
    return result


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = _CONDITION.search(loop.rest)
    lines = [i.rest for i in computations.get(condition[1], ())] if condition else []
    constants = {found[1]: int(found[2]) for line in lines if (found := _CONSTANT.search(line))}
    for line in lines:
        bound = _BOUND.search(line)
        if bound and bound[2] in constants:
            return constants[bound[2]]
    return None


def _holding(
    computations: dict[str, list[_Instruction]], wanted: Callable[[_Instruction], object]
) -> set[str]:
    """Computations that run a wanted instruction, themselves or in what they call."""
    calls = {
        name: {
            target
            for i in instructions
            for called in _CALLED.finditer(i.rest)
            for target in re.findall(r"[^\s,{}%]+", called[2])
        }
        for name, instructions in computations.items()
    }
    holding = {
        name for name, instructions in computations.items() if any(map(wanted, instructions))
    }
    while True:
        more = {name for name, called in calls.items() if called & holding} - holding
        if not more:
            return holding
        holding |= more
