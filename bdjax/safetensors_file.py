"""The safetensors format: boxes of tensors out of one file or of several, and writing one.

    8 bytes    length N of the header, little-endian
    N bytes    JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest   the tensors, row-major and little-endian, without gaps

The library of that name maps files into memory, where pages that were read count like arrays, and
knows no bfloat16 in NumPy; here bytes go by `pread` straight to where they are wanted.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bdjax.pretrained import PretrainedError

_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
# Named where one of them is refused.
_OTHERS = {"F64", "F8_E4M3", "F8_E5M2", "BOOL", *(f"{k}{n}" for k in "IU" for n in (8, 16, 32, 64))}
_BYTES = {"F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1} | {
    f"{k}{n}": n // 8 for k in "IU" for n in (8, 16, 32, 64)
}
# The format's own limit on a header, and one on lengths that no file has.
_LONGEST_HEADER, _LARGEST = 100_000_000, 2**48


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor is: `offset` bytes into `path`; `code` is the format's name of its dtype."""

    path: Path
    offset: int
    code: str
    shape: tuple[int, ...]


class SafetensorsFiles:
    """`Tensors` of .safetensors files. Each is opened anew by every read: nothing is kept open.

    Raises PretrainedError for a file that is no safetensors, was cut off, or has a name twice.
    """

    def __init__(self, *paths: Path):
        self._entries: dict[str, Entry] = {}
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise PretrainedError(
                        f"{path} has the tensor {name!r} that {self._entries[name].path} has too; "
                        "download the model again"
                    )
                self._entries[name] = entry

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor's place."""
        return self._entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """NumPy's name of every tensor's dtype; the format's own where NumPy arrays have none."""
        return {
            name: np.dtype(_DTYPES[e.code]).name if e.code in _DTYPES else e.code
            for name, e in self._entries.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One box of a tensor, and no byte outside it.

        Raises PretrainedError for a dtype that is no parameter's, and when the file ends early.
        """
        entry = self._entries[name]
        if entry.code not in _DTYPES:
            raise PretrainedError(
                f"{entry.path} has {name!r} in {entry.code}; expected F32, BF16 or F16: quantised "
                "weights cannot be read, use the model's unquantised files"
            )
        ends = [part.indices(size)[:2] for part, size in zip(index, entry.shape, strict=True)]
        out = np.empty([max(stop - start, 0) for start, stop in ends], _DTYPES[entry.code])
        if not out.size:
            return out
        view = memoryview(out.reshape(-1).view(np.uint8))
        try:
            with entry.path.open("rb", buffering=0) as file:
                for at, begin, length in _runs(entry.shape, ends, out.itemsize):
                    _fill(file.fileno(), view[at : at + length], entry.offset + begin, entry.path)
        except OSError as error:
            raise PretrainedError(f"{entry.path} cannot be read: {error.strerror}") from error
        return out


def _runs(shape, ends, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(place in the box, place in the tensor, length) of its contiguous pieces, in bytes."""
    cut = [n for n, (size, end) in enumerate(zip(shape, ends, strict=True)) if end != (0, size)]
    last = cut[-1] if cut else 0
    strides = [itemsize * math.prod(shape[n + 1 :]) for n in range(len(shape))]
    if not shape:
        yield 0, 0, itemsize
        return
    length = (ends[last][1] - ends[last][0]) * strides[last]
    places = itertools.product(*(range(*end) for end in ends[:last]))
    for number, place in enumerate(places):
        begin = sum(i * stride for i, stride in zip(place, strides, strict=False))
        yield number * length, begin + ends[last][0] * strides[last], length


def _fill(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise PretrainedError(f"{path} ends early; download it again")
        done += count


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, checked against its size: every byte of it belongs to one of them.

    Raises PretrainedError.
    """

    def fail(reason: str) -> PretrainedError:
        return PretrainedError(f"{path} is no whole safetensors file: {reason}; download it again")

    if not path.is_file():
        raise PretrainedError(f"{path} is no file that can be read; download the model again")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise fail(f"its header of {length} bytes does not fit its {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise fail(f"its header cannot be read ({_short(error)})") from error
    if not isinstance(header, dict):
        raise fail("its header is no JSON object")
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, found in header.items():
        reason = _wrong(found)
        if reason:
            raise fail(f"{_short(name)!r} {reason}")
        begin, end = found["data_offsets"]
        spans.append((begin, end))
        entries[name] = Entry(
            path=path,
            offset=8 + length + begin,
            code=found["dtype"],
            shape=tuple(found["shape"]),
        )
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise fail(f"its tensors overlap or leave a gap at byte {place}")
        place = end
    if 8 + length + place != size:
        raise fail(f"its header tells of {8 + length + place} bytes and it has {size}")
    return entries


def _wrong(found: Any) -> str:
    """What is wrong with a tensor's description, "" if nothing is."""
    if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    code, shape, ends = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(code, str) or (code not in _DTYPES and code not in _OTHERS):
        return f"has the unknown dtype {_short(code)!r}"
    for numbers in (shape, ends):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < _LARGEST for n in numbers
        ):
            return "has a shape or data_offsets that are no lists of lengths"
    if len(ends) != 2 or len(shape) > 8:
        return "has a shape or data_offsets of a wrong length"
    item = _BYTES.get(code) or np.dtype(_DTYPES[code]).itemsize
    if math.prod(shape) * item != ends[1] - ends[0]:
        return f"of shape {shape} in {code} does not have {ends[1] - ends[0]} bytes"
    return ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def write(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
) -> None:
    """One file of `tensors` (name -> shape and dtype), each asked of `read` when its turn comes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (shape, dtype) in tensors.items():
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            file.write(np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())
