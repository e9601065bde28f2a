"""Files -> documents: text, JSON lines and Parquet; `.gz` and `.zst` are decompressed as they come.

Every error is a sentence that names the file, and the line or row in it.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from bdjax.corpus import Document, utf8_error
from bdjax.messages import ConversationError, read_messages

Paths = str | Path | Iterable[str | Path]


def read_text_files(paths_or_globs: Paths, first: float = 0.0, last: float = 1.0) -> list[Document]:
    """One document per file, in the order given; the files of a pattern (`**` too) are sorted.

    A file that several patterns match is read once. Of a file of n bytes, those from
    int(first * n) to int(last * n) are taken, each cut moved on to the start of a character: parts
    that share a fraction meet there, with no byte lost or doubled.

    Raises FileNotFoundError for a path or pattern without a file, ValueError for a file that is
    not UTF-8 and for a corpus without a byte.
    """
    whole = [Document(str(path), read_bytes(path)) for path in _files(paths_or_globs)]
    for document in whole:
        _require_utf8(document)
    some = "" if (first, last) == (0, 1) else f" between the fractions {first} and {last}"
    documents = [_part(document, first, last) for document in whole]
    return _some_text(documents, f"files hold 0 bytes{some}", "such as 'texts/**/*.txt'")


def read_json_lines(paths_or_globs: Paths, field: str = "text") -> list[Document]:
    """One document per line: the string under `field` of the line's JSON object.

    Lines of white space alone are passed over. Raises FileNotFoundError for a path or pattern
    without a file; ValueError, with file and line, for a line that is not UTF-8 or not JSON and
    for a `field` that is missing or no string; ValueError for a corpus without a byte.
    """
    documents = [d for path in _files(paths_or_globs) for d in _json_documents(path, field)]
    return _some_text(documents, "lines hold 0 bytes", f"under the field {field!r}")


def read_conversations(paths_or_globs: Paths) -> list[Document]:
    """One conversation per line: {"messages": [{"role", "content"}, ..]} or {"prompt", "response"}.

    The documents hold the messages as JSON. Raises FileNotFoundError for a path or pattern without
    a file; ConversationError, with file and line, for a line that is not UTF-8, not JSON or no
    conversation, and for a file that cannot be unpacked; ValueError for files without a line.
    """
    found = [d for path in _files(paths_or_globs) for d in _conversations(path)]
    if not found:
        raise ValueError(
            "empty corpus: no file has a line; name at least one file with a conversation per line"
        )
    return found


def read_parquet(paths_or_globs: Paths, column: str = "text") -> list[Document]:
    """One document per row: the string in `column`. Needs pyarrow: pip install 'bdjax[data]'.

    Raises FileNotFoundError for a path or pattern without a file; ValueError, with the file, for
    one that is no whole Parquet file, for a `column` that is missing or holds no strings and, with
    the row counted from 1, for null and what is not UTF-8; ValueError for a corpus without a byte.
    """
    documents = [d for path in _files(paths_or_globs) for d in _parquet_documents(path, column)]
    return _some_text(documents, "rows hold 0 bytes", f"in the column {column!r}")


def read_bytes(path: Path) -> bytes:
    """The file's bytes, decompressed if its name ends in .gz or .zst.

    Raises ValueError for a compressed file that is cut off or damaged.
    """
    data = path.read_bytes()
    unpack = {".gz": _gunzip, ".zst": _unzstd}.get(path.suffix)
    return data if unpack is None else unpack(data, path)


def _gunzip(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise _cut_off(path) from error
    except (OSError, zlib.error) as error:
        raise ValueError(f"{path} is no gzip file or damaged ({error}); fetch it again") from error


def _unzstd(data: bytes, path: Path) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path} needs zstandard; type pip install 'bdjax[data]'") from error
    frames = []
    while data:
        # The readers of whole streams end at the end of their input and call nothing cut off.
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            frames.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise ValueError(
                f"{path} is no Zstandard file or damaged ({error}); fetch it again"
            ) from error
        if not frame.eof:
            raise _cut_off(path)
        data = frame.unused_data
    return b"".join(frames)


def _cut_off(path: Path) -> ValueError:
    return ValueError(f"{path} is cut off: its compressed data ends too early; fetch it again")


def _json_documents(path: Path, field: str) -> Iterator[Document]:
    for where, record in _json_records(path, {field: "some text"}):
        if not isinstance(record, dict) or field not in record:
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{where} has no field {field!r}; type field= one of those it has: {found}"
            )
        yield Document(where, _utf8(record[field], f"{where}, field {field!r}"))


def _conversations(path: Path) -> Iterator[Document]:
    try:
        for where, record in _json_records(path, {"prompt": "Hi", "response": "Hello"}):
            try:
                messages = read_messages(record)
            except ConversationError as error:
                raise ConversationError(f"{where}: {error}") from error
            text = json.dumps(messages, ensure_ascii=False)
            yield Document(where, _utf8(text, where), conversation=True)
    except ConversationError:
        raise
    except ValueError as error:
        raise ConversationError(str(error)) from error


def _json_records(path: Path, example: dict[str, str]) -> Iterator[tuple[str, object]]:
    """(file and line, value) of every line that holds something."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            _require_utf8(Document(where, line))
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where} is no JSON ({error}); expected one object per line, such as "
                    f"{json.dumps(example)}"
                ) from error


def _utf8(text: object, where: str) -> bytes:
    """The bytes of a text. Raises ValueError for what is no text and for lone surrogates."""
    if not isinstance(text, str):
        raise ValueError(
            f"{where} is {type(text).__name__}; expected a string: choose another field, or "
            "leave the line out"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has a lone surrogate at character {error.start}, which no UTF-8 can hold; "
            "leave the line out"
        ) from error


def _parquet_documents(path: Path, column: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow; type pip install 'bdjax[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(
                    f"has no column {column!r}; type column= one of those it has: "
                    f"{', '.join(file.schema_arrow.names) or 'none'}"
                )
            kind = file.schema_arrow.field(column).type
            words = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if words not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise ValueError(f"column {column!r} holds {kind}; expected strings")
            number = 0
            for batch in file.iter_batches(columns=[column]):
                # As bytes: Arrow promises UTF-8 and does not check it.
                texts = batch.column(0).cast(words).cast(pyarrow.large_binary())
                for text in texts.to_pylist():
                    number += 1
                    where = f"row {number}, column {column!r}"
                    if text is None:
                        raise ValueError(f"{where} is null; expected a string: leave the row out")
                    document = Document(f"{path}, {where}", text)
                    _require_utf8(document)
                    yield document
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _some_text(documents: list[Document], nothing: str, where: str) -> list[Document]:
    if not any(document.data for document in documents):
        raise ValueError(
            f"empty corpus: {len(documents)} {nothing}; name at least one file with text, {where}"
        )
    return documents


def _files(paths_or_globs: Paths) -> list[Path]:
    """The files of all paths and patterns, in the order given, each once."""
    several = not isinstance(paths_or_globs, str | Path)
    patterns = list(paths_or_globs) if several else [paths_or_globs]
    return list(dict.fromkeys(path for pattern in patterns for path in _matches(str(pattern))))


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


def _require_utf8(document: Document) -> None:
    """Raises ValueError that names file and byte offset if the document is not UTF-8."""
    error = utf8_error(document.data)
    if error is not None:
        raise ValueError(
            f"{document.name} is not UTF-8: byte 0x{document.data[error.start]:02x} at offset "
            f"{error.start} ({error.reason}); re-encode it, for example "
            f"`iconv -f LATIN1 -t UTF-8 {document.name}`, or leave it out"
        )
