"""An autoregressive model becomes a block-diffusion one: our recipe, blocks of 2, 4, then 8.

bdjax convert MODEL --run runs/start
bdjax train configs/convert_default.py --start runs/start --run runs/converted \\
    data.source=JsonLines data.source.paths=mix/train/*.jsonl.zst \\
    data.held_out=JsonLines data.held_out.paths=mix/heldout/*.jsonl.zst

Other blocks: `objective.block_size.last=16`; other lengths: `steps=4000
objective.block_size.double_every=400`. The clean stream stays token-causal and keeps its next-token
loss. Labels are shifted by one, and a block's first is read from the clean stream: with blocks of 1
that is the model as it was, so blocks start at 2 and double while masks are learned (NBDiff, arXiv
2512.06776, section 3, starts at 1). Masks are exact counts. The learning rate is meant for models
of about 0.1 B parameters: the published recipes train 4 B to 8 B at 1e-5 (`optim.peak_lr=1e-5
model.remat=full`). With your own model: docs/conversion.md

Measured (SmolLM2-135M, Q4_1; 2300 steps, 70 M tokens, 485 s on an H100, 2026-11-27): held-out bound
1.147 bits/byte in blocks of 8, 1.173 in blocks of 16 and 1.131 in blocks of 4, each trained so; AR
before 1.059, after .95 to .96. At `optim.peak_lr=5e-4` blocks of 8 reach 1.151, read in blocks of 4
1.113, AR after .927. An 80 GB card needs nothing recomputed: `model.remat=none model.unroll=30`.
"""

from bdjax import Alignment, BlockSize, TrainConfig, conversion_config, presets

STEPS = 2300


def get_config(start: TrainConfig, *, block_size: int = 8, steps: int = STEPS) -> TrainConfig:
    """`steps` steps of 32 rows of at most 1024 tokens; blocks grow in a tenth of them each."""
    grown = BlockSize(first=2, last=block_size, double_every=max(1, steps // 10))
    recipe = presets.default(
        mask_id=start.tokenizer.mask_id, block_size=grown, alignment=Alignment.SHIFTED_CLEAN
    )
    return conversion_config(start, recipe, name="convert_default", steps=steps)
