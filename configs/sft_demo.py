"""Supervised fine-tuning in small: questions of addition, the loss on the answers alone.

bdjax train configs/sft_demo.py --run runs/sft_demo
bdjax sample runs/sft_demo --chat --temperature 0
Two CPU cores, jax 0.10.2, 2026-11-27, from scratch: 266 s of CPU time with compilation, 786 s of
wall because the machine was shared. 49 of the 58 held-out sums are right at temperature 0, in 1.43
tokens per forward; bound on the held-out answers 0.112 +- 0.068 nats/token. One question a chat is
trained: a second one in the same chat is not answered well.
"""

from pathlib import Path

from bdjax import (
    ChatTemplate,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    OptimConfig,
    Remat,
    StableDecay,
    Sums,
    TrainConfig,
    presets,
)
from bdjax.tokenizer import ByteTokenizer
from pallas_kernels import Blockwise


def get_config() -> TrainConfig:
    """0.6 M parameters, block size 4, sums of numbers up to 29; the shape of configs/demo.py."""
    recipe = presets.default(mask_id=ByteTokenizer.mask_id, block_size=4)
    return TrainConfig(
        name="sft_demo",
        steps=700,
        model=DecoderConfig(
            num_layers=3,
            width=128,
            num_heads=2,
            num_kv_heads=1,
            head_dim=64,
            mlp_width=320,
            clean=recipe.clean,
            dtype="float32",
            remat=Remat.FULL,
            attention=Blockwise(query_tile=32, key_tile=32),
        ),
        objective=recipe.objective,
        data=DataConfig(source=Sums(), held_out=Sums(held_out=True), row_length=128, batch_size=8),
        optim=OptimConfig(
            peak_lr=0.006,
            warmup_fraction=0.03,
            decay=StableDecay(start=0.4),
            final_lr_fraction=0.02,
            muon=True,
        ),
        evaluation=EvaluationConfig(every=0),
        checkpoint_every=350,
        chat_template=ChatTemplate(path=str(Path(__file__).with_name("chat_template.jinja"))),
    )
