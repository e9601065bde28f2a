"""Tensors of a GGUF file as float32, dequantised when they are read and only where they are read.

The formats are those of the `gguf` package (an extra: `pip install 'bdjax[hf]'`), which is imported
here and nowhere else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bdjax.gguf_header import Header, TensorInfo, padded, shown
from bdjax.pretrained import PretrainedError

# Rows are dequantised by so many values at a time: the library needs some ten times their bytes.
_CHUNK = 1 << 20


class Format(NamedTuple):
    """A ggml type: `block` neighbours of a row are stored together in `block_bytes` bytes."""

    kind: Any
    block: int
    block_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor lies and how.

    `interleaved`: rows belong to heads of this many, and each head's halves are interleaved (row 2i
    is row i of the first half, row 2i + 1 of the second) for a RoPE of neighbours; 0 where they are
    in order.
    """

    info: TensorInfo
    format: Format
    interleaved: int = 0

    @property
    def rows(self) -> int:
        """All axes but the last, flattened."""
        return math.prod(self.info.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Of one row in the file."""
        return self.info.shape[-1] // self.format.block * self.format.block_bytes


@dataclass(frozen=True, kw_only=True)
class GGUFTensors:
    """The tensors of `path` under the names of `stored`: shapes, dtypes and slices of them."""

    path: Path
    stored: Mapping[str, Stored]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to numpy's shape, rows first."""
        return {name: stored.info.shape for name, stored in self.stored.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Name to the dtype that `read` returns: "float32", which holds every format exactly."""
        return dict.fromkeys(self.stored, "float32")

    def read(self, name: str, index: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        """The values of `name` at `index`, one slice of step 1 per axis (axes left out: whole).

        Only the rows and blocks that `index` touches are read; of interleaved rows, whole heads.
        Raises PretrainedError for another step and where the file has changed; KeyError for `name`.
        """
        stored = self.stored[name]
        shape = stored.info.shape
        whole = [*index, *[slice(None)] * (len(shape) - len(index))]
        spans = [_span(name, one, size) for one, size in zip(whole, shape, strict=True)]
        head = stored.interleaved or 1
        begin, end = spans[0]
        first, last = begin // head * head, padded(end, head)
        if len(shape) == 1:
            found = self._rows(stored, (0, 1), (first, last))[0]
        else:
            found = self._rows(stored, (first, last), spans[1])
        if stored.interleaved:
            found = found.reshape(-1, head // 2, 2, *found.shape[1:]).swapaxes(1, 2)
            found = found.reshape(last - first, *(stop - start for start, stop in spans[1:]))
        return found[begin - first : end - first]

    def _rows(self, stored: Stored, rows, columns) -> Float[np.ndarray, "R C"]:
        """Rows as they lie in the file, columns cut to `columns`."""
        kind, block, block_bytes = stored.format
        first = columns[0] // block
        last = -(-columns[1] // block)
        cut = slice(columns[0] - first * block, columns[1] - first * block)
        part = slice(first * block_bytes, last * block_bytes)
        found = np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
        if not found.size:
            return found
        step = max(1, _CHUNK // stored.info.shape[-1])
        with self.path.open("rb") as file:
            file.seek(stored.info.offset + rows[0] * stored.row_bytes)
            for at in range(0, len(found), step):
                count = min(step, len(found) - at)
                raw = np.fromfile(file, np.uint8, count * stored.row_bytes)
                if raw.size < count * stored.row_bytes:
                    raise PretrainedError(
                        f"{self.path} got shorter while it was read; fetch the file again"
                    )
                raw = np.ascontiguousarray(raw.reshape(count, -1)[:, part])
                found[at : at + count] = _package().dequantize(raw, kind)[:, cut]
        return found


def _span(name: str, index: slice, size: int) -> tuple[int, int]:
    start, stop, step = index.indices(size)
    if step != 1:
        raise PretrainedError(f"{name} is read by slices of step 1, got {index}")
    return start, max(stop, start)


def lay_out(path: Path, header: Header) -> dict[str, Stored]:
    """Every tensor of a header by its GGUF name, checked against the size of the file.

    Raises PretrainedError for formats that cannot be dequantised, tensors of more than two axes or
    that overlap, leave gaps or reach past the end, for bytes behind the last one, and without the
    `gguf` package.
    """
    package = _package()
    found: dict[str, Stored] = {}
    end = header.start
    formats: dict[int, Format] = {}
    for info in header.tensors:
        if info.kind not in formats:
            formats[info.kind] = _format(package, path, info)
        stored = Stored(info=info, format=formats[info.kind])
        kind, block, _ = stored.format
        if len(info.shape) > 2:
            raise PretrainedError(
                f"{path}: tensor {shown(info.name)} has the shape {info.shape}, expected one or "
                "two axes, as a dense decoder's have"
            )
        if info.shape[-1] % block:
            raise PretrainedError(
                f"{path} is damaged: rows of {shown(info.name)} have {info.shape[-1]} values, "
                f"expected a multiple of {block} ({kind.name}); fetch the file again"
            )
        # Tensors stand in file order without gaps, as llama.cpp demands too: an altered shape, type
        # or count does not read its neighbour's bytes.
        if info.offset != padded(end, header.alignment):
            raise PretrainedError(
                f"{path} is damaged: tensor {shown(info.name)} lies at byte {info.offset}, "
                f"expected {padded(end, header.alignment)}; fetch the file again"
            )
        end = info.offset + stored.rows * stored.row_bytes
        if end > header.size:
            raise PretrainedError(
                f"{path} is not whole: tensor {shown(info.name)} ends at byte {end}, and the file "
                f"has {header.size}; fetch the file again"
            )
        found[info.name] = stored
    if header.size > padded(end, header.alignment):
        raise PretrainedError(
            f"{path} is damaged: {header.size - end} bytes follow its last tensor; fetch the file "
            "again"
        )
    return found


def _format(package, path: Path, info: TensorInfo) -> Format:
    """How a ggml type is laid out; a block of zeros tells whether the package can read it."""
    try:
        kind = package.GGMLQuantizationType(info.kind)
        block, block_bytes = package.GGML_QUANT_SIZES[kind]
        package.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise PretrainedError(
            f"{path}: tensor {shown(info.name)} is of ggml type {info.kind}, which the package "
            "gguf cannot turn into numbers; type pip install -U gguf, or take a file of another "
            "quantisation, as Q8_0 or F16"
        ) from error
    return Format(kind, block, block_bytes)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise PretrainedError(
            "a GGUF file needs the package gguf; type pip install 'bdjax[hf]'"
        ) from error
    return gguf
