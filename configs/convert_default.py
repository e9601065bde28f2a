"""An autoregressive model becomes a block-diffusion one: our recipe, blocks of 1, 2, 4, then 8.

bdjax convert MODEL --run runs/start
bdjax train configs/convert_default.py --start runs/start --run runs/converted \\
    data.source=TextFiles data.source.paths=mix/*.txt.zst steps=3000

The clean stream stays token-causal, so that it begins as the model it was, and keeps its next-token
loss; blocks double while masks are learned (NBDiff, arXiv 2512.06776, section 3). No number has
been measured with it yet.
"""

from dataclasses import replace

from bdjax import BlockSize, OptimConfig, StableDecay, TrainConfig, presets

STEPS = 2000


def get_config(start: TrainConfig) -> TrainConfig:
    """Two thousand steps of 16 rows of at most 1024 tokens."""
    size = BlockSize(first=1, last=8, double_every=STEPS // 10)
    recipe = presets.default(mask_id=start.tokenizer.mask_id, block_size=size)
    row = min(1024, start.data.row_length)
    return replace(
        start,
        name="convert_default",
        steps=STEPS,
        model=replace(start.model, clean=recipe.clean, dtype="bfloat16"),
        objective=recipe.objective,
        data=replace(start.data, row_length=row, batch_size=16),
        optim=OptimConfig(peak_lr=1e-4, warmup_fraction=0.05, decay=StableDecay(start=0.5)),
        evaluation=replace(start.evaluation, every=500),
        checkpoint_every=500,
    )
