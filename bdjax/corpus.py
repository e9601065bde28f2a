"""Documents: the interpreter's own source as text, and a split that never moves."""

import hashlib
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# Tests and tables read unlike the rest; site-packages differs from machine to machine.
_SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__")
    + ("test", "tests", "encodings", "idlelib", "lib2to3")
)


class Document(NamedTuple):
    """One text, read as a stream of its own. data: UTF-8 bytes. part: its place in a mixture.

    conversation: `data` is the JSON of a conversation's messages. tokens: what stands in place of
    `data` in one that is encoded (`bdjax.chat`), the ids of a prompt and of its answer.
    """

    name: str
    data: bytes
    part: int = 0
    conversation: bool = False
    tokens: tuple[Int[np.ndarray, "P"], Int[np.ndarray, "A"]] | None = None


def standard_library() -> list[Document]:
    """The running interpreter's own .py files: 474 files, 9.65 MB in Python 3.11.7.

    Without installed packages, tests, encodings, idlelib and lib2to3; equal files once, empty and
    non-UTF-8 ones left out; names are relative to the library's folder and sorted.

    Raises FileNotFoundError when the interpreter comes without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    by_content: dict[bytes, Document] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts[:-1]):
            data = path.read_bytes()
            if data and utf8_error(data) is None:
                by_content.setdefault(data, Document(name.as_posix(), data))
    if not by_content:
        raise FileNotFoundError(
            f"no .py source under {root}: this Python ships without it; use another interpreter, "
            "or TextFiles(paths=('texts/**/*.txt',))"
        )
    return list(by_content.values())


def sums(questions: Sequence[str]) -> Document:
    """The conversation in which each of the questions, such as "12 + 7", gets its answer."""
    messages = []
    for asked in questions:
        total = str(sum(map(int, asked.split(" + "))))
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": total}]
    return Document(", ".join(questions), json.dumps(messages).encode(), conversation=True)


def split_by_hash(
    documents: Sequence[Document], held_out_fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """(train, held out), each in the order given; about `held_out_fraction` of the documents.

    A document is held out if the first 8 bytes of its content's SHA-256, read as a fraction of
    2^64, are below `held_out_fraction`. Neither names, order nor other documents matter: a file
    that is added moves no other one, and equal texts never stand on both sides.

    Raises ValueError for a fraction outside (0, 1) and when a side would be empty.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(
            f"held_out_fraction={held_out_fraction} must lie between 0 and 1; type 0.05"
        )
    places = [_hash_fraction(document.data) for document in documents]
    train = [d for d, place in zip(documents, places, strict=True) if place >= held_out_fraction]
    held_out = [d for d, place in zip(documents, places, strict=True) if place < held_out_fraction]
    if not train or not held_out:
        empty = "held-out" if train else "training"
        raise ValueError(
            f"the {empty} side of the split is empty: {len(documents)} documents, "
            f"held_out_fraction={held_out_fraction}; {_split_remedy(places)}"
        )
    return train, held_out


def utf8_error(data: bytes) -> UnicodeDecodeError | None:
    """Why `data` is not UTF-8, or None."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def describe(documents: Sequence[Document]) -> str:
    """Number and size, such as "571 files, 10.43 MB" (10^6 bytes)."""
    size = sum(len(document.data) for document in documents)
    return f"{len(documents)} files, {size / 1e6:.2f} MB"


def _hash_fraction(data: bytes) -> float:
    """A place in [0, 1] that only the content decides."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def _split_remedy(places: Sequence[float]) -> str:
    """What to type so that both sides of the split hold a document."""
    distinct = sorted(set(places))
    if len(distinct) < 2:
        return "a split needs at least two different documents; cut the text into several files"
    return (
        f"type a held_out_fraction above {distinct[0]:.4g} and up to {distinct[-1]:.4g}, "
        "or give more files"
    )
