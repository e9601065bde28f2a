"""The only file that knows mesh axes: everything else names what an array's axis means.

`spec("batch", "length", "embed")` is the sharding of an activation on the mesh in force,
`mesh(data=4, tensor=2)` makes one. Without a mesh in force every helper is the identity, so the
same code runs on a laptop in a plain shell.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# How chips of compute capability 9.0 name themselves.
_HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H20", "NVIDIA H800", "NVIDIA GH200")

# Meaning of an array axis -> the mesh axes it is split over. Weights carry "embed_in" where
# activations carry "embed": parameters are split over `fsdp` there, activations never.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "embed": (),
    "embed_in": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "rank": (),
}


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """An explicit mesh of data x fsdp x tensor devices.

    Raises ValueError when the product differs from the number of devices asked for.
    """
    devices = jax.devices() if devices is None else devices
    wanted = data * fsdp * tensor
    if wanted > len(devices):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {wanted} devices, "
            f"{len(devices)} are here; type mesh.data={len(devices)} mesh.fsdp=1 mesh.tensor=1"
        )
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[:wanted]
    )


def has_mesh() -> bool:
    """Whether a mesh is in force (`jax.set_mesh`)."""
    return not jax.sharding.get_abstract_mesh().empty


def is_hopper(kind: str) -> bool:
    """Whether the Hopper kernels run on a chip of this `device_kind`."""
    return kind.startswith(_HOPPER)


def device_kind() -> str:
    """The kind of the devices that a trace is for: of the mesh in force, else of this process."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def spec(*meanings: str | None) -> PartitionSpec | None:
    """The partition of an array whose axes mean `meanings`; None without a mesh.

    Mesh axes of size 1 are left out, so that one spelling of a sharding exists per mesh.
    Raises KeyError for a meaning that RULES does not list, ValueError when two axes of one array
    would be split over the same mesh axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    used: set[str] = set()
    entries = []
    for meaning in meanings:
        rule = () if meaning is None else RULES[meaning]
        axes = tuple(a for a in rule if mesh.shape.get(a, 1) > 1)
        if used & set(axes):
            raise ValueError(f"{meanings} would split two axes over {sorted(used & set(axes))}")
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def size(meaning: str) -> int:
    """Into how many pieces an axis of this meaning is cut on the mesh in force."""
    total = 1
    for axis in mesh_axes(meaning):
        total *= jax.sharding.get_abstract_mesh().shape[axis]
    return total


def mesh_axes(meaning: str) -> tuple[str, ...]:
    """Mesh axes of size > 1 that an axis of this meaning is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(a for a in RULES[meaning] if mesh.shape.get(a, 1) > 1)


def reshard(x: jax.Array, *meanings: str | None) -> jax.Array:
    """x laid out as `meanings` says; x itself without a mesh."""
    return jax.reshard(x, spec(*meanings)) if has_mesh() else x


def own_rows(rows: int) -> list[int]:
    """Which of `rows` global rows this process's devices hold, rising: all of them without a mesh.

    Several processes may hold the same rows, where a tensor axis spans them.
    """
    if not has_mesh():
        return list(range(rows))
    places = NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    slices = places.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in slices for row in range(*part.indices(rows))})


def from_host(x: np.ndarray, rows: int, *meanings: str | None) -> jax.Array:
    """The global array of `rows` rows of which `x` holds `own_rows(rows)`, in their order."""
    if not has_mesh():
        return jnp.asarray(x)
    places = NamedSharding(jax.sharding.get_mesh(), spec(*meanings))
    own = own_rows(rows)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        return x[own.index(start) :][: stop - start]

    return jax.make_array_from_callback((rows, *x.shape[1:]), places, part)


def to_host(x: jax.Array) -> np.ndarray:
    """All of a global array, in every process: all of them call this together."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def per_shard(function: Callable, in_specs, out_specs) -> Callable:
    """`function` run on each device's shards (`jax.shard_map`); `function` itself without a mesh.

    `in_specs` and `out_specs` are pytrees of tuples of meanings, written `("batch", "length")`.
    """
    if not has_mesh():
        return function

    def is_meanings(node) -> bool:
        return type(node) is tuple and all(m is None or isinstance(m, str) for m in node)

    def specs(tree):
        return jax.tree.map(lambda m: spec(*m), tree, is_leaf=is_meanings)

    return jax.shard_map(
        function, in_specs=specs(in_specs), out_specs=specs(out_specs), check_vma=False
    )


def by_layer(function: Callable, *meanings: str | None) -> Callable:
    """`function` of a stack of layers, computed by whole layers, each device its share of them.

    `function` maps (n, ...) to (n, ...) for any n, each entry by itself; the stack's first axis is
    the layers and `meanings` says how it is laid out, before and after. The layers are padded with
    zeros to a multiple of the devices. For each sharded axis there is one all-to-all in and one
    out; over the mesh axes that replicate the stack, a slice in and an all-gather out.
    Without a mesh it is `function` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1)
    if not devices:
        return function
    cut = [() if m is None else mesh_axes(m) for m in meanings]
    exchanges = [(axes, dim) for dim, axes in enumerate(cut) if axes and dim > 0]
    copies = tuple(a for a in devices if not any(a in axes for axes in cut))
    pieces = math.prod(mesh.shape[a] for a in devices if a not in cut[0])

    def inner(x: jax.Array) -> jax.Array:
        layers = x.shape[0]
        x = jnp.pad(x, ((0, -layers % pieces), *((0, 0),) * (x.ndim - 1)))
        for axes, dim in exchanges:
            x = jax.lax.all_to_all(x, axes, 0, dim, tiled=True)
        if copies:
            own = x.shape[0] // math.prod(mesh.shape[a] for a in copies)
            x = jax.lax.dynamic_slice_in_dim(x, own * jax.lax.axis_index(copies), own)
        x = function(x)
        if copies:
            x = jax.lax.all_gather(x, copies, axis=0, tiled=True)
        for axes, dim in reversed(exchanges):
            x = jax.lax.all_to_all(x, axes, dim, 0, tiled=True)
        return x[:layers]

    return per_shard(inner, (meanings,), meanings)


def psum(x, meanings: Sequence[str]):
    """Sum of x over the mesh axes that `meanings` are split over; inside `per_shard` only."""
    axes = tuple(a for m in meanings for a in mesh_axes(m))
    return jax.lax.psum(x, axes) if axes else x


def zeros(shape: tuple[int, ...], dtype, *meanings: str | None) -> jax.Array:
    """Zeros born with the sharding that `meanings` names."""
    return jnp.zeros(shape, dtype, out_sharding=spec(*meanings))
