"""The header of a GGUF file: metadata and where each tensor's bytes are, versions 2 and 3.

All numbers are little-endian: the magic "GGUF", u32 version, u64 tensor count, u64 metadata count;
per metadata entry a key, u32 type and value; per tensor a name, u32 dimension count, u64 dimensions
(the fastest first), u32 type, u64 offset; then the tensors' bytes, in this order, each aligned to
`general.alignment` (32). Strings are a u64 length and UTF-8, arrays a u32 type, a u64 count and the
values. (Described in docs/gguf.md of ggml-org/ggml.)

The reader of the `gguf` package believes every count: an altered header makes it loop for hours.
Here no count is believed that the file has no bytes for.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.pretrained import PretrainedError

_MAGIC = b"GGUF"
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True))
_BOOL, _STRING, _ARRAY = 7, 8, 9
# The fewest bytes that a string, a metadata entry and a tensor's description take.
_LEAST_STRING, _LEAST_ENTRY, _LEAST_TENSOR = 8, 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor: numpy's shape (rows first), the number of its ggml type, its first byte."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """Metadata (numbers, texts, lists of texts, arrays of numbers) and tensors in file order.

    Offsets of tensors count from the start of the file. `start` is the first byte behind the
    header, `alignment` that of tensors, `size` that of the file, all in bytes.
    """

    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    start: int
    alignment: int
    size: int


class _Cursor:
    """Reads values one after the other, never past the end."""

    def __init__(self, data, path: Path):
        self.data, self.path, self.at = data, path, 0

    def room(self, count: int, least: int, what: str) -> int:
        """`count`, if so many things of `least` bytes can still follow."""
        left = len(self.data) - self.at
        if count * least > left:
            raise PretrainedError(
                f"{self.path} is damaged or not whole: its header asks for {count} {what} at byte "
                f"{self.at}, and {left} bytes follow; fetch the file again"
            )
        return count

    def take(self, form: str) -> Any:
        size = struct.calcsize("<" + form)
        self.room(size, 1, "bytes")
        self.at += size
        return struct.unpack_from("<" + form, self.data, self.at - size)[0]

    def texts(self, count: int, what: str) -> list[str]:
        """So many texts. One loop: a vocabulary has hundreds of thousands."""
        self.room(count, _LEAST_STRING, what)
        data, at, found = self.data, self.at, []
        for _ in range(count):
            start = at + _LEAST_STRING
            at = start + int.from_bytes(data[at:start], "little")
            if start > len(data) or at > len(data):
                raise PretrainedError(
                    f"{self.path} is damaged or not whole: {what} at byte {start} should end at "
                    f"byte {at}, and the file has {len(data)}; fetch the file again"
                )
            try:
                found.append(data[start:at].decode())
            except UnicodeDecodeError as error:
                raise PretrainedError(
                    f"{self.path} is damaged: {what} at byte {start} is not UTF-8; fetch the file "
                    "again"
                ) from error
        self.at = at
        return found

    def text(self, what: str) -> str:
        return self.texts(1, what)[0]

    def value(self, key: str) -> Any:
        kind = self.take("I")
        if kind == _STRING:
            return self.text(f"the text of {shown(key)}")
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(key, kind, 1).tolist()[0]

    def _array(self, key: str) -> Any:
        kind, count = self.take("I"), self.take("Q")
        if kind != _STRING:
            return self._numbers(key, kind, count)
        return self.texts(count, f"texts of {shown(key)}")

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind != _BOOL and kind not in _NUMBERS:
            raise PretrainedError(
                f"{self.path} is damaged: the value of {shown(key)} has type {kind} at byte "
                f"{self.at}, expected a number, a text or a list of them; fetch the file again"
            )
        dtype = np.dtype("u1" if kind == _BOOL else "<" + _NUMBERS[kind])
        self.room(count, dtype.itemsize, f"values of {shown(key)}")
        # A copy: what is read outlives the map of the file.
        found = np.frombuffer(self.data, dtype, count, self.at).copy()
        self.at += found.nbytes
        if kind != _BOOL:
            return found
        if (found > 1).any():
            raise PretrainedError(
                f"{self.path} is damaged: {shown(key)} should be 0 or 1; fetch the file again"
            )
        return found.astype(bool)


def read_header(path: str | Path) -> Header:
    """The header of a GGUF file. Work and memory are bounded by the file's size.

    Raises PretrainedError with one sentence for what is no GGUF file, another version, big-endian,
    damaged or cut short; OSError where the file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + 4)
        if start[: len(_MAGIC)] != _MAGIC:
            raise PretrainedError(
                f"{path} is no GGUF file: it starts with {start[:4]!r}, expected {_MAGIC!r}; fetch "
                "the file again"
            )
        if len(start) < len(_MAGIC) + 4:
            raise PretrainedError(
                f"{path} is not whole: it ends after {len(start)} bytes; fetch it again"
            )
        _require_version(path, start[len(_MAGIC) :])
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, path)
            cursor.at = len(start)
            return _header(cursor)


def _require_version(path: Path, raw: bytes) -> None:
    version = int.from_bytes(raw, "little")
    if version in (2, 3):
        return
    if int.from_bytes(raw, "big") in (2, 3):
        raise PretrainedError(
            f"{path} is a big-endian GGUF file, and little-endian ones are read; type "
            "gguf-convert-endian FILE little (package gguf)"
        )
    raise PretrainedError(
        f"{path} is a GGUF file of version {version}, and versions 2 and 3 are read; convert the "
        "model again with today's llama.cpp"
    )


def _header(cursor: _Cursor) -> Header:
    path = cursor.path
    tensor_count, entry_count = cursor.take("Q"), cursor.take("Q")
    cursor.room(tensor_count, _LEAST_TENSOR, "tensors")
    cursor.room(entry_count, _LEAST_ENTRY, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text("a key")
        if key in metadata:
            raise PretrainedError(
                f"{path} is damaged: it has {shown(key)} twice; fetch the file again"
            )
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 8 <= alignment <= _MOST_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise PretrainedError(
            f"{path} is damaged: general.alignment is {shown(alignment)}, expected a power of two "
            f"from 8 to {_MOST_ALIGNMENT}; fetch the file again"
        )
    found = [_tensor(cursor) for _ in range(tensor_count)]
    start = padded(cursor.at, alignment)
    tensors = tuple(
        TensorInfo(name=name, shape=shape, kind=kind, offset=start + offset)
        for name, shape, kind, offset in found
    )
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise PretrainedError(f"{path} is damaged: it has a tensor twice; fetch the file again")
    return Header(
        metadata=metadata,
        tensors=tensors,
        start=start,
        alignment=alignment,
        size=len(cursor.data),
    )


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor's name")
    rank = cursor.take("I")
    shape = [cursor.take("Q") for _ in range(rank)] if 1 <= rank <= _MOST_DIMENSIONS else []
    # An element takes more than a hundredth of a byte in every format there is.
    if not shape or not 1 <= math.prod(shape) <= 100 * len(cursor.data):
        raise PretrainedError(
            f"{cursor.path} is damaged: tensor {shown(name)} has {rank} dimensions {shape}, "
            f"expected 1 to {_MOST_DIMENSIONS} that fit the file; fetch the file again"
        )
    return name, tuple(reversed(shape)), cursor.take("I"), cursor.take("Q")


def shown(value: Any) -> str:
    """What a file says, for a message: escaped and cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def padded(offset: int, alignment: int) -> int:
    """The next multiple of `alignment`, or `offset` if it is one."""
    return -(-offset // alignment) * alignment
