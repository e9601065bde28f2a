"""A state as nested dicts and as leaves by their paths: what checkpoints call things by."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding


def by_path(tree) -> dict[str, Any]:
    """Leaves by their path, "params/layers/wq": the same for dicts and NamedTuples."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}


def halves_of(state) -> dict[str, dict]:
    """`state` as plain nested dicts: `params`, `ema` if there is one, and the `rest`.

    Raises ValueError for a state without parameters.
    """
    nested = as_dicts(state)
    if "params" not in nested:
        raise ValueError(f"a state holds `params`; this one has {', '.join(nested) or 'nothing'}")
    halves = {name: nested.pop(name) for name in ("params", "ema") if name in nested}
    return halves | {"rest": nested} if nested else halves


def as_dicts(tree) -> dict[str, Any]:
    """The same leaves in plain nested dicts."""
    nested: dict[str, Any] = {}
    for name, leaf in by_path(tree).items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def in_structure(abstract, nested: dict):
    """The loaded leaves in the structure of `abstract`."""
    loaded = by_path(nested)
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[k] for k in by_path(abstract)])


def on_devices(leaf) -> jax.ShapeDtypeStruct:
    """The leaf on real devices: eval_shape names only an abstract mesh, or nothing at all."""
    place = getattr(leaf, "sharding", None)
    if place is None or isinstance(place, NamedSharding):
        mesh = jax.sharding.get_mesh()
        named = isinstance(place, NamedSharding)
        if named and isinstance(place.mesh, jax.sharding.Mesh):
            mesh = place.mesh
        spec = place.spec if named else PartitionSpec()
        place = SingleDeviceSharding(jax.local_devices()[0])
        if not mesh.empty:
            place = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
