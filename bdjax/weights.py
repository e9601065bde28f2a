"""Tensors of a model's files into our parameters, shard by shard, and back.

Layers are stacked where they land: a buffer per parameter and shard is filled layer by layer and
handed to its device, so that beside the parameters only one of them exists a second time.
"""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from bdjax.families import Family, groups
from bdjax.parameters import Parameter, Table
from bdjax.pretrained import Pretrained, PretrainedError, Tensors
from bdjax.sharding import has_mesh, spec

# Buffers of other programs that files carry along; they follow from the config.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias)$")
_READABLE = ("float32", "bfloat16", "float16")
# Rows of the embedding that are compared at a time.
_COMPARED = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One of our parameters in a model's files: a name per layer, or one name."""

    name: str
    files: tuple[str, ...]
    parameter: Parameter
    rows: int | None = None  # of the vocabulary in the file, where there may be fewer

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts layers."""
        return "layers" in self.parameter.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each tensor in the files."""
        sizes = self.parameter.shape
        shape = tuple(int(np.prod([sizes[a] for a in axes])) for axes in groups(self.parameter))
        return shape if self.rows is None else (self.rows, *shape[1:])


def stored(family: Family, table: Table, rows: int) -> list[Stored]:
    """Where every parameter of `table` is; the vocabulary has `rows` rows in the files."""
    found = []
    for name, (file, parameter) in family.file_names(table).items():
        files = (file,)
        if "layers" in parameter.axes:
            files = tuple(file.format(layer) for layer in range(parameter.shape[0]))
        own = rows if "vocab" in parameter.axes else None
        found.append(Stored(name=name, files=files, parameter=parameter, rows=own))
    return found


def check_tensors(pretrained: Pretrained, family: Family, wanted: Sequence[Stored]) -> None:
    """Raises one PretrainedError for all that is missing, of another shape or dtype, or unused.

    A tied model may bring its head along if it is the embedding, bit by bit.
    """
    expected = {file: one.shape for one in wanted for file in one.files}
    spare: frozenset[str] = frozenset()
    if family.head not in expected and family.head in pretrained.tensors.shapes:
        spare = frozenset((family.head,))
        _check_tied(pretrained, family)
    check_shapes(pretrained, family, expected, spare)


def check_shapes(
    pretrained: Pretrained,
    family: Family,
    expected: Mapping[str, tuple[int, ...]],
    spare: Set[str] = frozenset(),
) -> None:
    """The same for tensors by their names in the files; those in `spare` may be there, unused."""
    shapes, dtypes = pretrained.tensors.shapes, pretrained.tensors.dtypes
    unused = shapes.keys() - expected.keys() - spare
    extra = {name for name in unused if not _DERIVED.search(name)}
    both = sorted(expected.keys() & shapes.keys())
    odd = [name for name in both if shapes[name] != expected[name]]
    foreign = sorted({dtypes[name] for name in both} - {*_READABLE})
    faults = []
    for what, names in (("missing", expected.keys() - shapes.keys()), ("unused", extra)):
        if names:
            faults.append(f"{len(names)} {what} ({_brief(names)})")
    if odd:
        first = odd[0]
        faults.append(
            f"{len(odd)} of another shape ({_brief(odd)}; {first} is {_shape(shapes[first])}, "
            f"expected {_shape(expected[first])})"
        )
    if foreign:
        names = [name for name in both if dtypes[name] in foreign]
        faults.append(
            f"{len(names)} in {', '.join(foreign)} ({_brief(names)}), expected "
            f"{', '.join(_READABLE)}: quantised weights cannot be read"
        )
    if faults:
        raise PretrainedError(
            f"the tensors of {pretrained.where} are not those of its config.json "
            f"({family.model_type}): {'; '.join(faults)}; use the config.json that belongs to them"
        )


def _check_tied(pretrained: Pretrained, family: Family) -> None:
    shape = pretrained.tensors.shapes.get(family.embed)
    same = shape is not None and len(shape) == 2 and shape == pretrained.tensors.shapes[family.head]
    for begin in range(0, shape[0] if same else 0, _COMPARED):
        box = (slice(begin, min(begin + _COMPARED, shape[0])), slice(0, shape[1]))
        one, other = (pretrained.tensors.read(n, box) for n in (family.embed, family.head))
        same = same and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if not same:
        raise PretrainedError(
            f"{pretrained.where} has a {family.head} that is not its embedding, and its "
            "config.json says they are one; type tie_word_embeddings=false there"
        )


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes)) or "a scalar"


def _brief(names) -> str:
    """All names, those that differ in their numbers once: "model.layers.{0..3}.a"."""
    alike: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d{1,9}(?=\.)", name)
        key = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        alike.setdefault(key, []).extend([] if number is None else [int(number.group())])
    shown = []
    for key, numbers in sorted(alike.items()):
        numbers.sort()
        whole = numbers == list(range(numbers[0], numbers[-1] + 1)) if numbers else False
        text = f"{numbers[0]}..{numbers[-1]}" if whole else ",".join(map(str, numbers))
        text = text if len(numbers) > 1 else "".join(map(str, numbers))
        shown.append(key.replace("{}", f"{{{text}}}" if len(numbers) > 1 else text, 1))
    return ", ".join(shown)


def load_parameters(
    pretrained: Pretrained,
    wanted: Sequence[Stored],
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters as the nested dict of `Model.table`, each shard of them read by its device.

    On the mesh in force, else on the first device. dtype: of the parameters, None for that of the
    files (float16, which nothing computes in, becomes float32). Rows of the vocabulary that the
    files lack are zero. progress: called with bytes done and bytes to do, on this process.

    Raises PretrainedError when a file ends early.
    """
    tree: dict[str, Any] = {}
    places = [_place(one.parameter) for one in wanted]
    kinds = [_dtype(pretrained, one, dtype) for one in wanted]
    boxes = [_boxes(place, one.parameter.shape) for one, place in zip(wanted, places, strict=True)]
    sizes = [
        kind.itemsize * sum(_volume(box) for box in own.values())
        for kind, own in zip(kinds, boxes, strict=True)
    ]
    done, total = 0, sum(sizes)
    for one, place, kind, own, size in zip(wanted, places, kinds, boxes, sizes, strict=True):
        # Devices that hold the same share get one buffer.
        shards = {
            key: _aligned([part.stop - part.start for part in box], kind)
            for key, box in own.items()
        }
        for layer, file in enumerate(one.files):
            targets = [
                (box[1:], shards[key][layer]) if one.stacked else (box, shards[key])
                for key, box in own.items()
            ]
            _read_tensor(pretrained.tensors, one, file, targets)
            if progress is not None:
                progress(done + size * (layer + 1) // len(one.files), total)
        done += size
        array = jax.make_array_from_callback(
            one.parameter.shape,
            place,
            lambda index, one=one, shards=shards: shards[_key(_box(index, one.parameter.shape))],
            dtype=kind,
        )
        array.block_until_ready()
        *parents, last = one.name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _place(parameter: Parameter):
    if has_mesh():
        return NamedSharding(jax.sharding.get_mesh(), spec(*parameter.axes))
    return SingleDeviceSharding(jax.local_devices()[0])


def _boxes(place, shape: tuple[int, ...]) -> dict[tuple, tuple[slice, ...]]:
    """The distinct shards of this process's devices. No rule splits the layers."""
    indices = place.addressable_devices_indices_map(shape).values()
    return {_key(box): box for box in (_box(index, shape) for index in indices)}


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _key(box: Sequence[slice]) -> tuple:
    return tuple((part.start, part.stop) for part in box)


def _volume(box: Sequence[slice]) -> int:
    return int(np.prod([part.stop - part.start for part in box]))


def _dtype(pretrained: Pretrained, one: Stored, dtype: str | None):
    if dtype is not None:
        return jnp.dtype(dtype)
    kinds = {pretrained.tensors.dtypes[file] for file in one.files}
    return jnp.dtype("bfloat16" if kinds == {"bfloat16"} else "float32")


def _aligned(shape: Sequence[int], dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which a CPU device takes over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def _read_tensor(
    tensors: Tensors,
    one: Stored,
    file: str,
    targets: Sequence[tuple[tuple[slice, ...], np.ndarray]],
) -> None:
    """One tensor into the boxes of this process's shards, each with its array.

    Where they tile a larger box, that is read at once: rows of a file are long, their pieces short.
    """
    found = [_file_box(one, box) for box, _ in targets]
    around = tuple(
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*found, strict=True)
    )
    together = None
    if _volume(around) == sum(_volume(box) for box in found):
        together = tensors.read(file, around)
    for (_, out), box in zip(targets, found, strict=True):
        if together is None:
            _turn(one, tensors.read(file, box), out)
            continue
        begins = [part.start for part in around]
        inner = (slice(p.start - n, p.stop - n) for p, n in zip(box, begins, strict=True))
        _turn(one, together[tuple(inner)], out)


def _file_box(one: Stored, box: tuple[slice, ...]) -> tuple[slice, ...]:
    """The part of a file's tensor that holds `box` of our parameter, of one layer."""
    first = 1 if one.stacked else 0
    own_shape = one.parameter.shape[first:]
    found = []
    for axes in groups(one.parameter):
        lead, *inner = (axis - first for axis in axes)
        step = int(np.prod([own_shape[axis] for axis in inner]))
        if any(box[axis] != slice(0, own_shape[axis]) for axis in inner):
            raise ValueError(f"{one.name} cannot be split inside an axis of its files: {box}")
        found.append(slice(box[lead].start * step, box[lead].stop * step))
    if one.rows is not None:
        ends = (min(end, one.rows) for end in (found[0].start, found[0].stop))
        found[0] = slice(*ends)
    return tuple(found)


def _turn(one: Stored, found: np.ndarray, out: np.ndarray) -> None:
    """A box of the file's [out, in] order into ours; rows that the file lacks are zero."""
    if one.rows is not None:
        out[len(found) :] = 0
        out = out[: len(found)]
    if found.dtype == out.dtype and out.itemsize == 2:
        # NumPy moves plain integers several times faster than ml_dtypes' bfloat16.
        found, out = found.view(np.uint16), out.view(np.uint16)
    order = [axis for axes in groups(one.parameter) for axis in axes]
    if order == sorted(order):
        out[...] = found.reshape(out.shape)
        return
    # A matrix is only ever turned as a whole. By strips that fill a cache line of the result: three
    # to five times as fast as at once.
    turned = out.reshape(found.shape[::-1])
    strip = 64 // out.itemsize
    for begin in range(0, found.shape[0], strip):
        turned[:, begin : begin + strip] = found[begin : begin + strip].T


def to_file(one: Stored, array: np.ndarray) -> np.ndarray:
    """One layer's parameter, or an unstacked one, in the file's shape."""
    first = 1 if one.stacked else 0
    order = [axis - first for axes in groups(one.parameter) for axis in axes]
    if one.rows is not None:
        array = array[: one.rows]
    return np.ascontiguousarray(array.transpose(order)).reshape(one.shape)
