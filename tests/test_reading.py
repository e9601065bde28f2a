"""Laws of reading: every text once whatever its file is; every fault names file and line."""

import gzip
import json
import sys

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bdjax.reading import read_json_lines, read_parquet, read_text_files

TEXTS = ["one\n", "", "zwei\u2028é", "\x00𝄞"]


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def lines(texts, **more) -> bytes:
    return b"".join(json.dumps({"text": text} | more).encode() + b"\n" for text in texts)


def table(path, texts, kind=None, **options):
    column = pyarrow.array(texts, kind)
    parquet.write_table(pyarrow.table({"text": column, "other": column}), path, **options)
    return path


def texts(documents):
    return [document.data.decode() for document in documents]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=9).filter(any))
def test_every_kind_of_file_gives_the_same_texts(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("texts")
    plain = lines(written)
    half = len(plain) // 2
    for name, data in {
        "a.jsonl": plain,
        "b.jsonl.gz": gzip.compress(plain),
        # Several gzip members or Zstandard frames are one file, wherever they are cut.
        "c.jsonl.gz": gzip.compress(plain[:half]) + gzip.compress(plain[half:]),
        "d.jsonl.zst": zst(plain),
        "e.jsonl.zst": zst(plain[:half]) + zst(plain[half:]),
        "f.jsonl": plain.rstrip(b"\n").replace(b"\n", b"\r\n\r\n"),
    }.items():
        (folder / name).write_bytes(data)
        assert texts(read_json_lines(folder / name)) == written
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")):
        path = table(folder / "a.parquet", written, kind, row_group_size=2)
        assert texts(read_parquet(path)) == written
    assert texts(read_json_lines(folder / "*.jsonl*")) == written * 6
    for place, text in enumerate(filter(None, written)):
        data = text.encode()
        for suffix, packed in (("", data), (".gz", gzip.compress(data)), (".zst", zst(data))):
            (folder / f"{place}.txt{suffix}").write_bytes(packed)
            assert texts(read_text_files(folder / f"{place}.txt{suffix}")) == [text]


def test_documents_are_named_by_line_and_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines(TEXTS, other=1))
    assert [d.name for d in read_json_lines(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl, line {number}" for number in (2, 3, 4, 5)
    ]
    path = table(tmp_path / "a.parquet", TEXTS)
    assert read_parquet(path, "other")[3].name == f"{path}, row 4, column 'other'"


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "is no JSON .*expected one object per line"),
        (b"[" * 100_000, "is no JSON"),
        (b'["text"]', "has no field 'text'; type field= one of those it has: list"),
        (b'{"body": "a", "id": 1}', "has no field 'text'; type field= one of .*: body, id"),
        (b'{"text": null}', "field 'text' is NoneType; expected a string"),
        (b'{"text": 3}', "field 'text' is int; expected a string"),
        (b'{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9 at offset 13"),
        (b'{"text": "a\\ud800"}', "lone surrogate at character 1"),
    ],
)
@pytest.mark.parametrize("pack, suffix", [(bytes, ""), (gzip.compress, ".gz"), (zst, ".zst")])
def test_a_broken_line_is_named(tmp_path, line, message, pack, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines(["fine", "fine"]) + line + b"\n" + lines(["fine"])))
    with pytest.raises(ValueError, match=rf"a\.jsonl{suffix}, line 3.*{message}"):
        read_json_lines(path)


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (zst, ".zst")])
def test_every_cut_of_a_compressed_file_is_noticed(tmp_path, pack, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack(lines(TEXTS * 9))
    for keep in range(1, len(whole)):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="a.jsonl.* (is cut off|damaged).*fetch it again"):
            read_json_lines(path)
    for wrong in (b"no such format", whole + b"tail"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="a.jsonl.*damaged"):
            read_json_lines(path)
    # gzip carries a checksum.
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    path.write_bytes(flipped)
    if suffix == ".gz":
        with pytest.raises(ValueError, match="damaged"):
            read_json_lines(path)


def test_faults_of_parquet_are_named(tmp_path):
    path = table(tmp_path / "a.parquet", ["a", None])
    with pytest.raises(ValueError, match=r"a\.parquet: row 2, column 'text' is null"):
        read_parquet(path)
    with pytest.raises(ValueError, match=r"a\.parquet: has no column 'body'.*: text, other"):
        read_parquet(path, "body")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' holds int64; expected str"):
        read_parquet(table(path, [1, 2]))
    invalid = pyarrow.array([b"a", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(ValueError, match=r"a\.parquet, row 2, .*is not UTF-8: byte 0xe9"):
        read_parquet(table(path, invalid))
    whole = table(path, TEXTS).read_bytes()
    for keep in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"a\.parquet: "):
            read_parquet(path)


def test_a_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["", ""]))
    with pytest.raises(ValueError, match="empty corpus: 2 lines hold 0 bytes"):
        read_json_lines(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="empty corpus: 1 rows hold 0 bytes"):
        read_parquet(table(tmp_path / "a.parquet", [""]))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="empty corpus: 1 files hold 0 bytes"):
        read_text_files(tmp_path / "a.txt.gz")


def test_what_to_install_is_said(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", ["a"])
    (tmp_path / "a.txt.zst").write_bytes(zst(b"a"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow; type pip .*'bdjax\[data\]'"):
        read_parquet(path)
    with pytest.raises(ValueError, match=r"a\.txt\.zst needs zstandard; type pip .*bdjax\[data\]"):
        read_text_files(tmp_path / "a.txt.zst")
