"""A model is read, and imported, without a second copy of it; on one device and on four."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from pretrained import config, pretrained

from bdjax import safetensors_file

pytestmark = pytest.mark.slow

# Of a 1.7 B model the widths, of its layers a quarter and of its vocabulary a sixteenth.
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 9496,
    "tie_word_embeddings": True,
}
PROGRAM = """
import json, sys
from pathlib import Path
import jax
from bdjax import weights
from bdjax.checkpoint import Checkpoints
from bdjax.embedding import TokenEmbedding
from bdjax.families import family_of
from bdjax.family_config import decoder_config, rows_of
from bdjax.importing import read_pretrained
from bdjax.readout import TokenReadout
from bdjax.sharding import make_mesh
from bdjax.step import Model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

found = read_pretrained(sys.argv[1])
family, rows = family_of("qwen3", ""), rows_of(found, family_of("qwen3", ""))
c = decoder_config(found, family)
embedding = TokenEmbedding(vocab_size=rows, width=c.width)
readout = TokenReadout(vocab_size=rows, width=c.width, tied=True)
model = Model(decoder=c, embedding=embedding, readout=readout)
wanted = weights.stored(family, model.table(), rows)
weights.check_tensors(found, family, wanted)
jax.devices()
before, seen = peak(), []
with jax.set_mesh(make_mesh(fsdp=len(jax.devices()))):
    params = weights.load_parameters(found, wanted, progress=lambda *x: seen.append(x))
    if sys.argv[2:]:
        with Checkpoints(sys.argv[2]) as checkpoints:
            checkpoints.save(0, {"params": params}, "{}")
print(json.dumps({"grown": peak() - before, "seen": seen[-1]}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """0.76 GB of bfloat16: noise, since compressed zeros would take no memory."""
    path = tmp_path_factory.mktemp("model")
    small = pretrained("qwen3", num_hidden_layers=7, tie_word_embeddings=True)
    ours = config("qwen3", **SIZES)
    sizes = {288: SIZES["vocab_size"], 32: 2048, 48: 6144, 64: 2048, 16: 128}
    shapes = {}
    for name, shape in small.tensors.shapes.items():
        wide = [sizes[n] for n in shape]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            wide = [1024, 2048]
        shapes[name] = (tuple(wide), np.dtype(ml_dtypes.bfloat16))
    rng = np.random.default_rng(0)

    def noise(name):
        return rng.integers(0, 2**14, shapes[name][0], np.uint16).view(ml_dtypes.bfloat16)

    safetensors_file.write(path / "model.safetensors", shapes, noise)
    (path / "config.json").write_text(json.dumps(ours))
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what is used")
@pytest.mark.parametrize(
    ("devices", "saves", "most"), [(1, False, 1.3), (4, False, 1.3), (1, True, 1.4)]
)
def test_peak_memory_is_little_more_than_the_file(folder, devices, saves, most, tmp_path):
    """Saved as a run too: 1.10 with all layers of a 1.7 B model (3.44 GB), of which the programs'
    own memory is a smaller part. Orbax's database of all arrays would make that 2.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *[str(tmp_path / "run")] * saves],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    size = (folder / "model.safetensors").stat().st_size
    assert said["seen"][0] == said["seen"][1] > 0.99 * size
    assert size < said["grown"] < most * size
