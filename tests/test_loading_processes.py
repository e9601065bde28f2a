"""Two processes load one model: each reads its own half of every matrix, and no other byte."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from pretrained import pretrained, write_folder
from test_processes import ROOT, free_port

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[4])
import jax
from dataclasses import replace
from pretrained import ROWS, network
from bdjax import start_processes
from bdjax.hf_folder import read_folder
from bdjax.sharding import make_mesh
from bdjax.weights import load_parameters, stored

class Noted:
    def __init__(self, inner):
        self.inner, self.shapes, self.dtypes, self.boxes = inner, inner.shapes, inner.dtypes, []

    def read(self, name, index):
        self.boxes.append((name, [(part.start, part.stop) for part in index]))
        return self.inner.read(name, index)

start_processes(process_id=int(sys.argv[2]), process_count=2, coordinator=sys.argv[3])
found = read_folder(sys.argv[1])
noted = Noted(found.tensors)
found = replace(found, tensors=noted)
family, model = network(found)
with jax.set_mesh(make_mesh(fsdp=2)):
    params = load_parameters(found, stored(family, model.table(), ROWS))
    total = jax.jit(lambda tree: sum((x**2).sum() for x in jax.tree.leaves(tree)))(params)
print(json.dumps({"boxes": noted.boxes, "total": float(total)}), flush=True)
"""


def test_each_process_reads_its_own_bytes(tmp_path):
    found = pretrained("qwen3")
    folder = write_folder(tmp_path / "model", found, None)
    port, tests = free_port(), str(ROOT / "tests")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(n), f"localhost:{port}", tests],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    answers = []
    try:
        for child in children:
            out, err = child.communicate(timeout=300)
            assert child.returncode == 0, err
            answers.append(json.loads(out.splitlines()[-1]))
    finally:
        for child in children:
            child.kill()
    counts = {n: np.zeros(a.shape, int) for n, a in found.tensors.arrays.items()}
    for answer in answers:
        own = {n: np.zeros(a.shape, int) for n, a in found.tensors.arrays.items()}
        for name, box in answer["boxes"]:
            own[name][tuple(slice(*ends) for ends in box)] += 1
        for name, count in own.items():
            assert count.max() == 1
            # Norms are whole on every device, and small.
            assert count.mean() == (0.5 if count.ndim == 2 else 1.0), name
            counts[name] += count
    for name, count in counts.items():
        np.testing.assert_array_equal(count, 1 if count.ndim == 2 else 2, name)
    squares = sum((a.astype(np.float64) ** 2).sum() for a in found.tensors.arrays.values())
    for answer in answers:
        np.testing.assert_allclose(answer["total"], squares, rtol=1e-4)
