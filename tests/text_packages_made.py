"""Tiny packages in the formats that `tools/text_mix.py` reads, written by hand."""

import io
import json
import struct
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from text_packages import Package


@dataclass(frozen=True, kw_only=True)
class Made(Package):
    """A package of these files. Its download writes them into a tar archive."""

    contents: tuple[tuple[str, bytes], ...]

    def cached(self, cache):
        return sorted(cache.glob(f"{self.name}.tar"))

    def download(self, folder):
        (folder / f"{self.name}.tar").write_bytes(tar_of(dict(self.contents)))

    def identity(self, archive):
        return self.name, "1.0"

    def tar(self, archive):
        return archive.read_bytes()


def tar_of(files):
    """A tar archive as dpkg-deb writes it, "./" before every path."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def prose(number):
    """Some 220 characters that no other number gives."""
    words = [f"word{number}x{k}" for k in range(25)]
    return " ".join(words) + "."


def speeches(count):
    return {f"package/sotu/data/{1790 + n}_a_b_n.txt": prose(n).encode() for n in range(count)}


def listed_novel(chapters):
    names = ["contents.txt", *(f"chapter_{n + 1}.txt" for n in range(len(chapters)))]
    files = {"contents.txt": b"CONTENTS", "data.txt": "".join(chapters).encode()}
    files |= dict(zip(names[1:], (text.encode() for text in chapters), strict=True))
    files["file_list.json"] = json.dumps(names).encode()
    return {f"package/moby-dick/data/{name}": data for name, data in files.items()}


def lazy_load_database(novels, kind=16):
    """[size][zlib stream] per novel: a version 3 XDR vector of UTF-8 strings, its lines."""
    out = b""
    for lines in novels:
        data = b"X\n" + struct.pack(">IIII", 3, 0x40201, 0x30500, 5) + b"UTF-8"
        data += struct.pack(">II", kind, len(lines))
        for line in lines:
            text = line.encode()
            data += struct.pack(">II", 0x40009, len(text)) + text
        out += struct.pack(">I", len(data)) + zlib.compress(data)
    return {"usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": out}


def bible_data(text, window=200):
    """Windows in the format of `compress`: so short that all codes are literals of nine bits."""
    data = text.encode()
    windows = []
    for start in range(0, len(data), window):
        part = data[start : start + window]
        bits = sum(byte << (9 * k) for k, byte in enumerate(part))
        windows.append(bits.to_bytes(-(-9 * len(part) // 8), "little"))
    head = b"EC02Compressed Data File".ljust(0x54, b"\0") + struct.pack(">II", window, len(windows))
    places = [len(head) + 4 * (len(windows) + 1) + 3]
    for one in windows:
        places.append(places[-1] + len(one))
    offsets = struct.pack(f">{len(places)}I", *places)
    return {"usr/lib/bible.data": head + offsets + b"\x1f\x9d\x90" + b"".join(windows)}


def commentary(chapters):
    packed, index = b"", b""
    for text in chapters:
        block = zlib.compress(text.encode())
        index += struct.pack("<III", len(packed), len(block), len(text.encode()))
        packed += block
    folder = "usr/share/sword/modules/comments/zcom/tdavid"
    return {
        f"{folder}/nt.czs": b"",
        f"{folder}/nt.czz": b"",
        f"{folder}/ot.czs": index,
        f"{folder}/ot.czz": packed,
    }


def synset(words, gloss, kind="n"):
    """A line of WordNet's data files, with one pointer."""
    fields = " ".join(f"{word} 0" for word in words)
    return f"00001740 03 {kind} {len(words):02x} {fields} 001 ~ 00001930 n 0000 | {gloss}  \n"


def page(text, before="", after=""):
    """A page with what stands around the text of the two manuals."""
    return (
        "<!DOCTYPE html><html><head><title>Title</title><style>p {}</style></head><body>"
        '<div class="navheader"><table><tr><td><div>Prev</div></td></tr></table></div>'
        f"<script>if (a < b) f();</script>{before}<h1>Head</h1><p>{text}</p>{after}"
        "<p align=center><small>This page last modified on <a>2021-10-05</a> UTC</small></p></body>"
    ).encode()
