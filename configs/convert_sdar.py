"""An autoregressive model becomes a block-diffusion one as SDAR does (JetAstra/SDAR, Qwen3).

bdjax convert MODEL --run runs/start
bdjax train configs/convert_sdar.py --start runs/start --run runs/sdar \\
    data.source=JsonLines data.source.paths=mix/train/*.jsonl.zst \\
    data.held_out=JsonLines data.held_out.paths=mix/heldout/*.jsonl.zst

The authors': block-causal clean stream, no shift, blocks of 4 from the first step on, one level in
[0.001, 1] per document with weight 1/t, never a row without a mask, documents filled up with
trained end tokens. Ours: rows of 1024 and 32 of them; fewer steps (theirs: 50 B tokens); learning
rate and decay (theirs in fine-tuning: 1e-5, constant after a warm-up of 0.03: optim.peak_lr=1e-5
optim.decay.start=1.0 optim.warmup_fraction=0.03), which are those of configs/convert_default.py so
that objectives are compared. Other blocks: `objective.block_size.first=8`.
"""

from bdjax import TrainConfig, conversion_config, presets

STEPS = 2300


def get_config(start: TrainConfig, *, block_size: int = 4, steps: int = STEPS) -> TrainConfig:
    """`steps` steps of 32 rows of at most 1024 tokens."""
    recipe = presets.sdar(mask_id=start.tokenizer.mask_id, block_size=block_size)
    return conversion_config(start, recipe, name="convert_sdar", steps=steps)
