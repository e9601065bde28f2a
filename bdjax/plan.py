"""What a run costs before a chip is asked for: the real train step, compiled ahead of time.

`make_plan` traces `train_step` with abstract arrays on the mesh of a TPU slice that is not there,
compiles it with libtpu on a CPU, and reads the program: bytes per device, collectives, and bounds
on the time of a step. Nothing of the model's size is ever allocated.
"""

import importlib.util
import os
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdjax.chips import CHIPS, GIB, Chip, chip_of
from bdjax.config import TrainConfig
from bdjax.flops import Flops, scored_share, step_flops
from bdjax.hlo import Collectives, collectives
from bdjax.objective import Batch
from bdjax.optim import make_optimiser
from bdjax.sharding import make_mesh, spec
from bdjax.train_step import initial_state, train_step

_TPUS = {chip.name: chip for chip in CHIPS if any("TPU" in kind for kind in chip.kinds)}


class Roofline(NamedTuple):
    """Least seconds per step if one resource were the only limit; an estimate, not a measurement.

    compute: `Flops.hardware` at the peak. memory: arguments, outputs and temporaries once each way,
    gathered weights written and read. links: bytes that leave the chip in the collectives, rings
    over all links at full rate.
    """

    compute: float
    memory: float
    links: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled train step in numbers; bytes are per device.

    memory: bytes by kind, which add up to `needed`. capacity: HBM of a device, None if unknown.
    flops: of the whole step over all devices. xla_flops: XLA's count for one device, with the
    bodies of loops counted once. tokens: clean tokens of one step, padding included.
    """

    name: str
    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, int]
    capacity: float | None
    flops: Flops
    xla_flops: float
    collectives: Collectives
    roofline: Roofline | None
    tokens: int
    compile_seconds: float

    @property
    def needed(self) -> int:
        """Bytes that one device must hold while the step runs."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether a device holds it; None when its capacity is unknown."""
        return None if self.capacity is None else self.needed <= self.capacity

    def as_dict(self) -> dict:
        """Plain numbers for JSON."""
        found = asdict(self) | {"needed": self.needed, "fits": self.fits}
        found["flops"] |= {"total": self.flops.total, "hardware": self.flops.hardware}
        found["roofline"] = None if self.roofline is None else self.roofline._asdict()
        found["collectives"] = {
            "open_loops": self.collectives.open_loops,
            "traffic": {kind: t._asdict() for kind, t in self.collectives.traffic.items()},
        }
        return found

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={n}" for axis, n in self.mesh.items())
        lines = [
            f"{self.name}: {self.parameters / 1e6:,.1f} M parameters on {self.topology}: "
            f"{self.devices} x {self.device_kind}, {mesh}",
            f"compiled in {self.compile_seconds:.1f} s",
            "",
            "bytes per device",
            *(_row(kind, _size(size)) for kind, size in self.memory.items()),
            _row("total", _size(self.needed)),
            self._verdict(),
            "",
            "model FLOPs per step, all devices",
            _row("body", _short(self.flops.body)),
            _row("attention, visible pairs", _short(self.flops.attention)),
            _row("head, scored entries", _short(self.flops.head)),
            _row("total", _short(self.flops.total)),
            _row("computed twice, not in the total", _short(self.flops.recomputed)),
            _row("XLA's count, loop bodies once", _short(self.xla_flops) + " on one device"),
            "",
            "collectives per step and device",
        ]
        for kind, traffic in self.collectives.traffic.items():
            lines.append(_row(f"{kind} x {traffic.count}", _size(traffic.bytes)))
        if not self.collectives.traffic:
            lines.append("  none")
        if self.collectives.open_loops:
            lines.append(
                f"  bodies of {self.collectives.open_loops} loops of unknown length count once"
            )
        return "\n".join(lines + self._bounds())

    def _verdict(self) -> str:
        if self.capacity is None:
            return "  capacity of this device unknown"
        left = abs(self.capacity - self.needed) / GIB
        said = "fits with {:.2f} GiB to spare" if self.fits else "does not fit: {:.2f} GiB too many"
        return f"  {self.capacity / GIB:.2f} GiB here: {said.format(left)}"

    def _bounds(self) -> list[str]:
        if self.roofline is None:
            return []
        seconds = max(self.roofline)
        speed = self.tokens / seconds
        by = self.roofline._fields[self.roofline.index(seconds)]
        return [
            "",
            "least time per step, an estimate from data-sheet peaks (real steps are slower)",
            *(_row(n, f"{s * 1e3:.2f} ms") for n, s in self.roofline._asdict().items()),
            f"  bound by {by}: at most {speed:,.0f} clean tokens/s, {speed / self.devices:,.0f} a "
            "device",
        ]


class Program(NamedTuple):
    """A train step compiled for a mesh: its abstract arguments, and seconds it took to compile."""

    compiled: jax.stages.Compiled
    arguments: tuple
    mesh: Mesh
    seconds: float


def _row(name: str, value: str) -> str:
    number, _, unit = value.partition(" ")
    return f"  {name:36}{number:>10} {unit}"


def _size(count: int) -> str:
    """Bytes in GiB, or in MiB where that says more."""
    return f"{count / GIB:,.3f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.3f} MiB"


def _short(flops: float) -> str:
    return f"{flops / 1e12:,.3f} TFLOP" if flops >= 1e11 else f"{flops / 1e9:,.3f} GFLOP"


def make_plan(config: TrainConfig, topology: str) -> Plan:
    """Compiles the train step of `config` for `topology` and reads what it costs.

    topology: a TPU slice by its product name (v5e-16, v5p-8, v6e-256, 7x-16; v5p and 7x count
    TensorCores, two a chip) or by its shape in chips (v5p:2x2x4); "here" for this machine's
    devices. Needs no TPU. Raises ValueError for an unknown slice, a mesh of another size, a missing
    libtpu, and a program that the compiler refuses for want of memory.
    """
    return read_plan(config, topology, compile_step(config, topology))


def compile_step(config: TrainConfig, topology: str) -> Program:
    """The train step of `config`, compiled; raises as `make_plan` does."""
    mesh = slice_mesh(config, topology)
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(config, mesh)
        start = time.perf_counter()
        traced = train_step.trace(*arguments)
        try:
            compiled = traced.lower(lowering_platforms=platforms(topology)).compile()
        except jax.errors.JaxRuntimeError as error:
            raise _refused(error, topology, arguments) from error
    return Program(compiled, arguments, mesh, time.perf_counter() - start)


def read_plan(config: TrainConfig, topology: str, program: Program) -> Plan:
    """What a compiled train step costs."""
    compiled, arguments, mesh, seconds = program
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    memory = _memory(compiled.memory_analysis(), arguments)
    found = collectives(compiled.as_text())
    rows, length = config.data.batch_size, config.data.row_length
    flops = step_flops(
        config.build_model(),
        config.objective,
        [length] * rows,
        block_size=config.objective.block_size.largest,
        share=scored_share(config.objective, config.objective.block_size.largest),
    )
    return Plan(
        name=config.name,
        topology=topology,
        device_kind=device.device_kind,
        devices=mesh.size,
        mesh=_sizes(config),
        parameters=sum(x.size for x in jax.tree.leaves(arguments[3].averaged)),
        memory=memory,
        capacity=chip.memory if chip else _limit(device),
        flops=flops,
        xla_flops=_xla_flops(compiled),
        collectives=found,
        roofline=None if chip is None else _roofline(chip, mesh.size, flops, memory, found),
        tokens=rows * length,
        compile_seconds=seconds,
    )


def slice_mesh(config: TrainConfig, topology: str) -> Mesh:
    """The config's mesh over the devices of `topology`; raises as `make_plan` does."""
    here = topology == "here"
    devices = jax.devices()[: config.mesh.devices] if here else tpu_slice(topology)
    _check_mesh(config, topology, len(devices))
    return make_mesh(**_sizes(config), devices=devices)


def platforms(topology: str) -> tuple[str, ...] | None:
    """What a program for `topology` is lowered for."""
    return None if topology == "here" else ("tpu",)


def _sizes(config: TrainConfig) -> dict[str, int]:
    return {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}


def tpu_slice(topology: str) -> list:
    """The devices of a TPU slice that is not there, from libtpu; see `make_plan` for names.

    Raises ValueError for a name that is none, or without libtpu.
    """
    name, shape = slice_shape(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"planning for {topology} needs libtpu, which compiles for TPUs on any Linux machine; "
            "type pip install 'bdjax[plan]'"
        )
    # An installed libtpu is probed as a device unless told otherwise, asks the network what
    # machine this is, and locks itself to one process; none of that matters to a compiler.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    # libtpu takes a host for 2 x 2 chips, which a smaller slice does not fill.
    small = {} if min(shape[:2]) > 1 else {"chips_per_host_bounds": (*shape[:2], 1)}
    product = {"7x": "tpu7x"}.get(name, name)
    try:
        found = topologies.get_topology_desc(
            f"{product}:{'x'.join(map(str, shape))}",
            platform="tpu",
            **small,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu knows no slice {topology}: {error}") from error
    return list(found.devices)


def slice_shape(topology: str) -> tuple[str, tuple[int, ...]]:
    """Chip name and shape in chips of a slice: "v5p-8" is ("v5p", (2, 2, 1)).

    Raises ValueError for a name that is none.
    """
    known = ", ".join(f"{name}-16" for name in _TPUS)
    name, colon, shape = topology.removeprefix("tpu").partition(":")
    if colon and name in _TPUS and all(n.isdigit() and int(n) for n in shape.split("x")):
        return name, tuple(int(n) for n in shape.split("x"))
    name, _, count = topology.removeprefix("tpu").partition("-")
    if name not in _TPUS or not count.isdigit():
        raise ValueError(
            f"topology {topology!r} is unknown; type one of {known} or here, or a shape in chips "
            "as in v5p:2x2x4"
        )
    chips, rest = divmod(int(count), _TPUS[name].cores)
    if rest or chips < 1 or chips & (chips - 1):
        unit = "TensorCores, two a chip" if _TPUS[name].cores == 2 else "chips"
        raise ValueError(
            f"{topology}: {count} {unit} is no power of two of chips; type {name}-16, or the "
            f"slice's shape in chips as in {name}:{'2x2x4' if name in ('v5p', '7x') else '4x4'}"
        )
    doublings, axes = chips.bit_length() - 1, 3 if _TPUS[name].cores == 2 else 2
    split = [(doublings + i) // axes for i in range(axes)]
    # 2x2x1 is written with its short axis last, larger slices with the short ones first.
    return name, tuple(1 << n for n in sorted(split, reverse=chips < 8 and axes == 3))


def _check_mesh(config: TrainConfig, topology: str, devices: int) -> None:
    mesh = config.mesh
    if mesh.devices == devices:
        return
    typed = f"mesh.data=1 mesh.fsdp={devices} mesh.tensor=1"
    if config.data.batch_size % devices:
        typed += f" data.batch_size={-(-config.data.batch_size // devices) * devices}"
    raise ValueError(
        f"mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor} takes {mesh.devices} "
        f"devices, {topology} has {devices}; type for example {typed}"
    )


def abstract_arguments(config: TrainConfig, mesh: Mesh) -> tuple:
    """The arguments of `train_step` as shapes with shardings on the mesh in force."""
    model = config.build_model()
    optimiser = make_optimiser(config.optim, model.trained_table(), config.steps)

    state = jax.eval_shape(lambda: initial_state(config.seed, model, optimiser))
    state, root = placed((state, jax.eval_shape(lambda: jax.random.key(0))), mesh)
    shape = config.data.batch_size, config.data.row_length
    split = NamedSharding(mesh, spec("batch", "length"))
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    trainable = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=split)
    batch = Batch(integers, integers, integers, trainable)
    return config.objective, model, optimiser, state, batch, root


def placed(tree, mesh: Mesh):
    """Abstract arrays with their shardings on the devices of `mesh`; whole where they have none."""

    def one(x):
        where = PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, where))

    return jax.tree.map(one, tree)


def _bytes(x) -> int:
    shape = x.sharding.shard_shape(x.shape)
    # A key is two words; numpy does not know its size.
    size = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    total = size
    for n in shape:
        total *= n
    return total


def _kind(path) -> str:
    """The part of the state that a leaf belongs to: parameters, or a field of the optimiser."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    if names[0] == "params":
        return "parameters"
    moments = {"mu": "first moment", "nu": "second moment"}
    return moments.get(names[-1], " ".join(dict.fromkeys((names[0], names[-1]))))


def _held(arguments: tuple) -> dict[str, int]:
    """Bytes of the arguments on one device by kind; what is tiny is put together."""
    *_, state, batch, _ = arguments
    kinds: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        kind = _kind(path)
        kinds[kind] = kinds.get(kind, 0) + _bytes(leaf)
    kinds["batch"] = sum(_bytes(x) for x in batch)
    return {kind: size for kind, size in kinds.items() if size > 64}


def _memory(analysis, arguments: tuple) -> dict[str, int]:
    """Bytes per device by kind, from XLA's assignment of buffers."""
    held = _held(arguments)
    held["rounding, scalars"] = analysis.argument_size_in_bytes - sum(held.values())
    held["temporaries, gradients among them"] = analysis.temp_size_in_bytes
    held["outputs"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    held["program"] = analysis.generated_code_size_in_bytes
    return held


def _refused(error: Exception, topology: str, arguments: tuple) -> Exception:
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "Ran out of memory" not in said:
        return error
    held = sum(_held(arguments).values()) / GIB
    first = next((line for line in said.splitlines() if "Used" in line), said.splitlines()[0])
    return ValueError(
        f"the train step does not fit {topology}: {first.strip()} State and batch take "
        f"{held:.2f} GiB per device, activations the rest; type a smaller data.batch_size or "
        "data.row_length, model.remat=full, or a larger mesh.fsdp"
    )


def _xla_flops(compiled) -> float:
    analysis = compiled.cost_analysis()
    return float(analysis.get("flops", 0.0)) if analysis else 0.0


def _limit(device) -> float | None:
    stats = device.memory_stats()
    return float(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def _roofline(
    chip: Chip, devices: int, flops: Flops, memory: dict[str, int], found: Collectives
) -> Roofline:
    traffic = found.traffic
    gathered = traffic["all-gather"].bytes if "all-gather" in traffic else 0
    # A ring all-reduce sends everything twice, the others once.
    sent = sum(t.bytes * (2 if kind == "all-reduce" else 1) for kind, t in traffic.items())
    return Roofline(
        compute=flops.hardware / devices / chip.flops,
        memory=2 * (sum(memory.values()) - memory["program"] + gathered) / chip.bandwidth,
        links=sent / chip.links,
    )
