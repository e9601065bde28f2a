"""A Llama 3.2 1B shape on a v5e-256 slice, from random weights: planned, never run.

bdjax plan configs/pod_1b.py --topology v5e-256
Two CPU cores, jax 0.10.2, libtpu 0.0.42.1, 2026-11-27: 114 s in all on a slow machine. Per chip:
state 0.68 GiB, temporaries 2.25, in all 2.97 of 16.00 GiB. 13.9 PFLOP a step; 226 all-gathers,
3.63 GiB, and 37 all-reduces, 1.82 GiB. Data-sheet bound: 374 ms a step, 2.8 M clean tokens/s.
The plan "here" against the measured peak, both 18.758 GB (H100, jax 0.11.2, 2026-11-23, with cuDNN
attention and the head in XLA's loops):
python tools/plan_check.py configs/pod_1b.py mesh.data=1 mesh.fsdp=1 data.batch_size=2
"""

from bdjax import (
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    presets,
)
from bdjax.tokenizer import ByteTokenizer


def get_config() -> TrainConfig:
    """1.0 B parameters, block size 32, a row of 4096 tokens per chip, weights over 16 chips."""
    recipe = presets.default(mask_id=ByteTokenizer.mask_id, block_size=32)
    return TrainConfig(
        name="pod_1b",
        steps=100_000,
        model=DecoderConfig(
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            mlp_width=8192,
            clean=recipe.clean,
            rope_theta=500_000.0,
        ),
        objective=recipe.objective,
        data=DataConfig(row_length=4096, batch_size=256),
        optim=OptimConfig(peak_lr=3e-4),
        mesh=MeshConfig(data=16, fsdp=16),
        evaluation=EvaluationConfig(every=0),
    )
