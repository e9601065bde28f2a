"""Damaged GGUF files: a sentence every time, soon, in little memory, and nothing half-written."""

import resource
import time

import numpy as np
import pytest

from bdjax.cli import main
from bdjax.families import family_of
from bdjax.gguf_file import open_gguf
from bdjax.gguf_header import read_header
from bdjax.importing import config_of
from bdjax.pretrained import PretrainedError
from bdjax.weights import check_tensors, stored

pytest.importorskip("gguf", reason="needs the extra hf")
pytest.importorskip("tokenizers", reason="needs the extra hf")
files = pytest.importorskip("gguf_files")

COUNTS = (0, 1, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**64 - 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return files.write(tmp_path_factory.mktemp("gguf") / "x.gguf", kind=files.TYPE.Q8_0)


def altered(data, end, draw):
    """`data` with its first `end` bytes damaged in one of seven ways.

    Half of the damage is behind the vocabulary, where the tensors are described: most of the header
    is text that may be any other.
    """
    data = bytearray(data)
    begin = 4 if draw.random() < 0.5 else end - 1500
    at = int(draw.integers(begin, end - 8))
    way = draw.integers(7)
    if way == 0:
        data[at] ^= 1 << int(draw.integers(8))
    elif way == 1:
        data[at] = int(draw.choice([0, 1, 0x7F, 0x80, 0xFF]))
    elif way == 2:
        data[at : at + 8] = COUNTS[draw.integers(len(COUNTS))].to_bytes(8, "little")
    elif way == 3:
        del data[at : at + int(draw.integers(1, 9))]
    elif way == 4:
        data[at:at] = draw.bytes(int(draw.integers(1, 9)))
    elif way == 5:
        source = int(draw.integers(4, end - 16))
        data[at : at + 8] = data[source : source + 8]
    else:
        del data[at:]
    return bytes(data)


def import_all(path):
    """What importing reads and checks, and every tensor; no arrays on a device."""
    pretrained = open_gguf(path)
    config = config_of(pretrained)
    family = family_of(pretrained.config["model_type"], pretrained.where)
    table = config.build_model().table()
    check_tensors(pretrained, family, stored(family, table, pretrained.config["vocab_size"]))
    with np.errstate(all="ignore"):
        for name, shape in pretrained.tensors.shapes.items():
            assert pretrained.tensors.read(name, ()).shape == shape


def fuzz(llama, folder, cases, seed):
    """How many of so many damaged files are refused; the others are whole for all one can tell."""
    data, end = llama.read_bytes(), read_header(llama).start
    draw = np.random.default_rng(seed)
    import_all(llama)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = folder / "x.gguf"
    refused = 0
    for case in range(cases):
        path.write_bytes(altered(data, end, draw))
        begin = time.perf_counter()
        try:
            import_all(path)
        except PretrainedError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000, (case, str(error))
        assert time.perf_counter() - begin < 20, case
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KiB"
    return refused


@pytest.mark.filterwarnings("ignore:config.json")
def test_damaged_headers_are_refused_or_read(llama, tmp_path):
    assert fuzz(llama, tmp_path, 200, seed=0) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:config.json")
def test_ten_thousand_damaged_headers_are_refused_or_read(llama, tmp_path):
    assert fuzz(llama, tmp_path, 10_000, seed=1) > 5_000


@pytest.mark.parametrize("damage", ["cut", "other", "family"])
def test_the_command_line_says_one_sentence_and_writes_nothing(llama, tmp_path, capsys, damage):
    path = tmp_path / "broken.gguf"
    if damage == "family":
        files.write(path, metadata={"general.architecture": "gemma3"})
    else:
        path.write_bytes(llama.read_bytes()[:5000] if damage == "cut" else b"something else")
    assert main(["import", str(path), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("bdjax: ") and said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
