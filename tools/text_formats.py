"""How documents lie in packages: readers from an archive's files to texts, in a fixed order.

A byte that is not UTF-8 becomes a lone surrogate (`surrogateescape`), by which the text is known.
"""

import json
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import PurePosixPath

from text_packages import Files, PackageError

# A gloss is a line: too short for a document.
GLOSSES = 50

_STRING_VECTOR, _STRING, _R_VERSIONS = 16, 9, (2, 3)
_CHAPTER = re.compile(r"chapter [ivxlc\d]+\.?", re.IGNORECASE)
_VERSE = re.compile(r"(\d?[A-Za-z]+?)(\d+:\d+) (.*)")
_PARTS_OF_SPEECH = {"adj": "adjective", "adv": "adverb", "noun": "noun", "verb": "verb"}
# What else is said on every page of the two manuals: menus, footers, tables of contents.
_NO_PROSE = frozenset(
    ("menu", "searchmenu", "tagline", "fancy_toc")  # SQLite
    + ("navheader", "navfooter", "toc")  # PostgreSQL
)
_DROPPED = frozenset(("script", "style", "nav", "svg", "button", "form", "title"))
_PARAGRAPHS = frozenset(
    ("p", "div", "pre", "ul", "ol", "dl", "table", "blockquote", "hr", "section", "title", "list")
    + ("h1", "h2", "h3", "h4", "h5", "h6")
)
_LINES = frozenset(("br", "li", "tr", "dt", "dd", "item", "l"))


def plain_texts(files: Files) -> list[str]:
    """Every file is a document, sorted by path."""
    return [_decoded(data) for data in files.values()]


def listed_texts(files: Files) -> list[str]:
    """The files that file_list.json names beside itself, in its order."""
    (listing,) = (path for path in files if path.endswith("/file_list.json"))
    folder = PurePosixPath(listing).parent
    paths = [str(folder / name) for name in json.loads(files[listing])]
    return [_decoded(files[path]) for path in paths if path in files]


def lazy_load_chapters(files: Files) -> list[str]:
    """The chapters of the novels in an R lazy-load database: [size][zlib stream] ..

    Each stream is a serialised vector of strings, the lines of one novel. What stands before the
    first chapter belongs to it. Raises ValueError for another kind of R object.
    """
    (data,) = files.values()
    documents = []
    while data:
        stream = zlib.decompressobj()
        lines = _string_vector(stream.decompress(data[4:]))
        data = stream.unused_data
        starts = [i for i, line in enumerate(lines) if _CHAPTER.fullmatch(line.strip())]
        cuts = [0, *starts[1:], len(lines)]
        documents += ["\n".join(lines[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return documents


def _string_vector(data: bytes) -> list[str]:
    """The strings of an R object in XDR serialisation (R Internals, section 1.8)."""
    mark, version = struct.unpack_from(">2s I", data)
    place = 14
    if mark != b"X\n" or version not in _R_VERSIONS:
        raise ValueError(f"an R object starts with {data[:6]!r}, expected b'X\\n' and version 2, 3")
    if version == 3:
        place += 4 + struct.unpack_from(">I", data, place)[0]  # the native encoding's name
    kind, count = struct.unpack_from(">II", data, place)
    if kind & 0xFF != _STRING_VECTOR:
        raise ValueError(f"an R object has the type {kind & 0xFF}, expected strings, 16")
    strings, place = [], place + 8
    for _ in range(count):
        kind, size = struct.unpack_from(">Ii", data, place)
        if kind & 0xFF != _STRING:
            raise ValueError(f"a string has the type {kind & 0xFF}, expected 9")
        place += 8
        strings.append(_decoded(data[place : place + max(size, 0)]))  # -1: not available
        place += max(size, 0)
    return strings


def bible_books(files: Files) -> list[str]:
    """The books of the Debian package bible-kjv-text, a line "chapter:verse text" each verse.

    The file has the number of its windows at 0x58, their offsets and the end of the last one, and
    each window by itself in the format of `compress`, which gzip reads, without the three bytes
    that such a file starts with. Raises ValueError for another header, PackageError without gzip.
    """
    (data,) = files.values()
    if not data.startswith(b"EC02"):
        raise ValueError(f"bible.data starts with {data[:4]!r}, expected b'EC02'")
    (windows,) = struct.unpack_from(">I", data, 0x58)
    offsets = struct.unpack_from(f">{windows + 1}I", data, 0x5C)
    parts = [_uncompressed(data[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]
    verses = filter(None, map(_VERSE.fullmatch, _decoded(b"".join(parts)).splitlines()))
    return [
        "\n".join(f"{verse[2]} {verse[3]}" for verse in book)
        for _, book in groupby(verses, key=lambda verse: verse[1])
    ]


def _uncompressed(window: bytes) -> bytes:
    window = b"\x1f\x9d\x90" + window
    try:
        return subprocess.run(["gzip", "-dc"], input=window, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise PackageError("gzip is not installed; type sudo apt-get install gzip") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"a window of bible.data is damaged: {error.stderr.decode()}") from error


def sword_chapters(files: Files) -> list[str]:
    """The blocks of a SWORD commentary (zCom, by chapter), its OSIS marks taken out.

    .bzs or .czs holds (offset, size, size unpacked) of the zlib streams in .czz, little-endian.
    """
    documents = []
    for path in files:
        if path.endswith(".czs"):
            packed = files[path.removesuffix("s") + "z"]
            for start, size, _ in struct.iter_unpack("<III", files[path]):
                text = _decoded(zlib.decompress(packed[start : start + size]))
                documents.append(_prose(text, _DROPPED - {"title"}))
    return documents


def wordnet_glosses(files: Files) -> list[str]:
    """Documents of `GLOSSES` consecutive lines "words (part of speech): gloss", by file.

    A line of WordNet's data files is "offset file type count(hex) word id word id .. | gloss".
    """
    documents = []
    for path, data in files.items():
        kind = _PARTS_OF_SPEECH[path.rpartition(".")[2]]
        lines = [
            f"{words} ({kind}): {gloss}" for words, gloss in map(_gloss, _synsets(_decoded(data)))
        ]
        documents += ["\n".join(lines[i : i + GLOSSES]) for i in range(0, len(lines), GLOSSES)]
    return documents


def _synsets(text: str) -> Iterator[tuple[str, str]]:
    """The two halves of every line but those of the licence at the top, which are indented."""
    for line in text.splitlines():
        if line and not line.startswith("  "):
            synset, _, gloss = line.partition(" | ")
            yield synset, gloss


def _gloss(line: tuple[str, str]) -> tuple[str, str]:
    fields = line[0].split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    # Adjectives may end in a mark of where they stand: (a), (p), (ip).
    plain = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words]
    return ", ".join(plain), line[1].strip()


def web_pages(files: Files) -> list[str]:
    """The prose of HTML pages, sorted by path."""
    pages = [_prose(_decoded(data), _DROPPED) for data in files.values()]
    return [re.sub(r"^This page last modified on .*$", "", page, flags=re.M) for page in pages]


def _prose(text: str, dropped: frozenset[str]) -> str:
    parser = _Prose(dropped)
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


class _Prose(HTMLParser):
    """Text without marks: paragraphs apart, white space as it stands inside <pre> alone."""

    def __init__(self, dropped: frozenset[str]):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._dropped = dropped
        self._preformatted = 0
        # The element that is left out just now, and how many of its name are open.
        self._skipped, self._open = "", 0

    def handle_starttag(self, tag, attrs):
        classes = (dict(attrs).get("class") or "").split()
        if self._open:
            self._open += tag == self._skipped
        elif tag in self._dropped or not _NO_PROSE.isdisjoint(classes):
            self._skipped, self._open = tag, 1
        else:
            self._preformatted += tag == "pre"
            self._part(tag)

    def handle_endtag(self, tag):
        if self._open:
            self._open -= tag == self._skipped
        else:
            self._preformatted -= tag == "pre" and self._preformatted > 0
            self._part(tag)

    def handle_data(self, data):
        if self._open:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def _part(self, tag):
        if tag in _PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in _LINES:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")
