"""Is a plan's memory the memory a step takes? Prints planned bytes, measured peak and their ratio.

XLA_PYTHON_CLIENT_PREALLOCATE=false python tools/plan_check.py configs/pod_1b.py \\
    mesh.data=1 mesh.fsdp=1 model.num_layers=8 data.batch_size=2

Runs three real steps on random tokens. Needs a device that counts its memory (a GPU or a TPU): on a
CPU the steps run and the peak is unknown.
"""

import argparse
import json

import jax
import numpy as np

from bdjax import apply_overrides, load_config, make_plan
from bdjax.likelihood import to_device
from bdjax.optim import make_optimiser
from bdjax.train_step import initial_state, train_step


def random_rows(config) -> dict[str, np.ndarray]:
    """One batch: a document per row, random tokens."""
    rows, length = config.data.batch_size, config.data.row_length
    position = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    tokens = np.random.default_rng(0).integers(0, 256, (rows, length), np.int32)
    ones = np.ones((rows, length), np.int32)
    return {"tokens": tokens, "segment": ones, "position": position, "trainable": position > 0}


def main() -> None:
    """Plans, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[])
    args = parser.parse_args()
    config = apply_overrides(load_config(args.config), args.overrides)
    plan = make_plan(config, "here")
    print(plan)
    with jax.set_mesh(config.mesh.build()):
        model = config.build_model()
        optimiser = make_optimiser(config.optim, model.trained_table(), config.steps)
        state = initial_state(config.seed, model, optimiser)
        batch, root = to_device(random_rows(config)), jax.random.key(config.seed)
        for _ in range(3):
            state, metrics = train_step(config.objective, model, optimiser, state, batch, root)
        loss = float(metrics["loss"])
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    found = {"planned": plan.needed, "peak": peak, "loss": loss}
    found["ratio"] = None if peak is None else plan.needed / peak
    print(json.dumps(found))


if __name__ == "__main__":
    main()
