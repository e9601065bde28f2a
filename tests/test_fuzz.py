"""Damaged model files, by the thousand: each is read as it is or refused with one sentence.

Never another exception, a hang or a huge allocation. What is read must be what the files say.
"""

import json
import resource
import struct
import time
import warnings

import numpy as np
import pytest
from pretrained import pretrained, tokenizer_json, write_folder

from bdjax.cli import main
from bdjax.importing import config_of, parameters_of, read_pretrained
from bdjax.pretrained import PretrainedError

STRANGE = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 10**30, -(2**40), 0.5, -0.0),
    *(
        1e-300,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "0",
        "silu",
        "gelu",
        "llama",
        "../x",
        "\u0000",
    ),
    *("é" * 50, [], [0], [1, 2, 3], [[]], [None] * 5, {}, {"a": 1}, {"rope_type": "llama3"}),
    *({"rope_type": "default", "rope_theta": 1e9}, {"type": "BPE"}, ["a"] * 3, [True], [2**40]),
)
FILES = ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors")


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """File contents of a small model that can be read."""
    folder = tmp_path_factory.mktemp("model")
    found = pretrained("sdar", num_hidden_layers=1, intermediate_size=16)
    tokenizer = tokenizer_json(tmp_path_factory.mktemp("tokenizer"))
    write_folder(folder, found, tokenizer, generation_config={"eos_token_id": [1, 3]})
    return {name: (folder / name).read_bytes() for name in FILES}


def mutate_bytes(rng, data: bytes, most: int) -> bytes:
    """A few bytes changed, cut, doubled or inserted in the first `most`."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, max(min(most, len(data)), 1)))
        kind = int(rng.integers(0, 5))
        if kind == 0 and data:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and data:
            data[at] = int(rng.integers(0, 256))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 20))).astype(np.uint8))
        else:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
    return bytes(data)


def mutate_json(rng, found):
    """One value, somewhere, replaced by a strange one, taken away, doubled or renamed."""
    node, path = found, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[int(rng.integers(0, len(keys)))]
        path.append((node, key))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            break
        node = inner
    if not path:
        return found
    node, key = path[-1]
    kind = rng.random()
    if kind < 0.7:
        node[key] = STRANGE[int(rng.integers(0, len(STRANGE)))]
    elif kind < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node[str(key) + "x"] = node.pop(key)
    else:
        node.append(node[key])
    return found


def mutated(rng, name: str, data: bytes) -> bytes:
    """One damaged file."""
    if name != "model.safetensors":
        if rng.random() < 0.75:
            return json.dumps(mutate_json(rng, json.loads(data))).encode()
        return mutate_bytes(rng, data, len(data))
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.5:
        return mutate_bytes(rng, data, 8 + size)
    header = mutate_json(rng, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def outcome(folder) -> str:
    """ "read", or the sentence it is refused with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_pretrained(folder)
            made = config_of(found)
            parameters_of(found, made)
            made.tokenizer.encode("the cat, é")
        except PretrainedError as error:
            return str(error)
    # What was read is what config.json says, and not something else.
    c, said = made.model, found.config
    assert (c.width, c.num_layers, c.norm_eps) == (
        said["hidden_size"],
        said["num_hidden_layers"],
        float(said["rms_norm_eps"]),
    )
    assert c.head_dim == said.get("head_dim", 128)
    assert made.tokenizer.mask_id == said.get("mask_token_id")
    return "read"


def fuzz(contents, folder, cases: range) -> dict[str, int]:
    """How many cases of every file were refused; everything else is a failure."""
    folder.mkdir()
    refused = dict.fromkeys(FILES, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        rng = np.random.default_rng([20, case])
        name = FILES[int(rng.integers(0, len(FILES)))]
        for other, data in contents.items():
            (folder / other).write_bytes(mutated(rng, name, data) if other == name else data)
        begin = time.monotonic()
        try:
            said = outcome(folder)
        except BaseException as error:
            raise AssertionError(f"case {case}, {name}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - begin < 10, f"case {case}, {name} took long"
        assert 0 < len(said) < 3000 and "\n" not in said.strip(), f"case {case}, {name}: {said}"
        refused[name] += said != "read"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"{grown} kB were allocated"
    return refused


def test_undamaged_files_are_read(contents, tmp_path):
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    assert outcome(tmp_path) == "read"


def test_300_damaged_models(contents, tmp_path):
    refused = fuzz(contents, tmp_path / "model", range(300))
    assert sum(refused.values()) > 150 and min(refused.values()) > 10


@pytest.mark.slow
def test_10000_damaged_models(contents, tmp_path):
    refused = fuzz(contents, tmp_path / "model", range(300, 10_300))
    assert sum(refused.values()) > 5000 and min(refused.values()) > 500


def test_the_command_line_makes_it_a_sentence_and_exit_code_2(contents, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    codes = []
    for case in range(40):
        rng = np.random.default_rng([21, case])
        name = FILES[case % len(FILES)]
        for other, data in contents.items():
            (folder / other).write_bytes(mutated(rng, name, data) if other == name else data)
        if outcome(folder) == "read":
            continue
        codes.append(main(["import", str(folder), "--run", str(tmp_path / "run")]))
        said = capsys.readouterr().err
        assert len([x for x in said.splitlines() if "warning:" not in x]) == 1, said
        assert "Traceback" not in said and not (tmp_path / "run").exists()
    assert len(codes) > 10 and set(codes) == {2}
