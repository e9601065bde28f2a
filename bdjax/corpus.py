"""Where text comes from: files, the interpreter's own source, and a split that never moves."""

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

# Tests and tables read unlike the rest; site-packages differs from machine to machine.
_SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__")
    + ("test", "tests", "encodings", "idlelib", "lib2to3")
)


class Document(NamedTuple):
    """One text, read as a stream of its own. data: UTF-8 bytes."""

    name: str
    data: bytes


def read_text_files(
    paths_or_globs: str | Path | Iterable[str | Path], first: float = 0.0, last: float = 1.0
) -> list[Document]:
    """One document per file, in the order given; the files of a pattern (`**` too) are sorted.

    A file that several patterns match is read once. Of a file of n bytes, those from
    int(first * n) to int(last * n) are taken, each cut moved on to the start of a character: parts
    that share a fraction meet there, with no byte lost or doubled.

    Raises FileNotFoundError for a path or pattern without a file, ValueError for a file that is
    not UTF-8 and for a corpus without a byte.
    """
    patterns = [paths_or_globs] if isinstance(paths_or_globs, str | Path) else list(paths_or_globs)
    paths = dict.fromkeys(path for pattern in patterns for path in _matches(str(pattern)))
    whole = [Document(str(path), path.read_bytes()) for path in paths]
    for document in whole:
        _require_utf8(document)
    documents = [_part(document, first, last) for document in whole]
    if not any(document.data for document in documents):
        some = "" if (first, last) == (0, 1) else f" between the fractions {first} and {last}"
        raise ValueError(
            f"empty corpus: {len(documents)} files from {[str(p) for p in patterns]} hold 0 bytes"
            f"{some}; name at least one file with text, such as 'texts/**/*.txt'"
        )
    return documents


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
            if data and _utf8_error(data) is None:
                by_content.setdefault(data, Document(name.as_posix(), data))
    if not by_content:
        raise FileNotFoundError(
            f"no .py source under {root}: this Python ships without it; use another interpreter, "
            "or read_text_files('texts/**/*.txt')"
        )
    return list(by_content.values())


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


def describe(documents: Sequence[Document]) -> str:
    """Number and size, such as "571 files, 10.43 MB" (10^6 bytes)."""
    size = sum(len(document.data) for document in documents)
    return f"{len(documents)} files, {size / 1e6:.2f} MB"


def _matches(pattern: str) -> list[Path]:
    """The files that a path or glob names, sorted; never none."""
    # A path that exists is taken as it stands, even if it holds a `[` or a `*`.
    names = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
    files = sorted(path for path in map(Path, names) if path.is_file())
    if not files and Path(pattern).is_dir():
        raise FileNotFoundError(
            f"{pattern!r} is a folder; type {str(Path(pattern) / '**' / '*.txt')!r} for its files"
        )
    if not files:
        raise FileNotFoundError(
            f"no file matches {pattern!r} (from {Path.cwd()}); type a path that exists, or a "
            "pattern such as 'texts/**/*.txt'"
        )
    return files


def _part(document: Document, first: float, last: float) -> Document:
    """The bytes between two fractions of a document, in whole characters."""
    data = document.data
    start, stop = (_next_character(data, int(share * len(data))) for share in (first, last))
    return document._replace(data=data[start:stop])


def _next_character(data: bytes, place: int) -> int:
    """The first place from `place` on that is no continuation byte (0b10xxxxxx)."""
    while place < len(data) and data[place] & 0xC0 == 0x80:
        place += 1
    return place


def _utf8_error(data: bytes) -> UnicodeDecodeError | None:
    """Why `data` is not UTF-8, or None."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def _require_utf8(document: Document) -> None:
    """Raises ValueError that names file and byte offset if the document is not UTF-8."""
    error = _utf8_error(document.data)
    if error is not None:
        raise ValueError(
            f"{document.name} is not UTF-8: byte 0x{document.data[error.start]:02x} at offset "
            f"{error.start} ({error.reason}); re-encode it, for example "
            f"`iconv -f LATIN1 -t UTF-8 {document.name}`, or leave it out"
        )


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
