"""An autoregressive model becomes a block-diffusion one as NBDiff does (arXiv 2512.06776).

bdjax convert MODEL --run runs/start
bdjax train configs/convert_nbdiff.py --start runs/start --run runs/nbdiff \\
    data.source=JsonLines data.source.paths=mix/train/*.jsonl.zst \\
    data.held_out=JsonLines data.held_out.paths=mix/heldout/*.jsonl.zst

The paper's: token-causal clean stream, labels shifted by one and a block's first token read from
the clean stream, one uniform level per block with weight 1/t, blocks doubling from 1 to 32 over the
first 2500 of 4000 steps, next-token loss of weight 0.5 that falls to 0 while they grow. Ours: rows
of 1024 in place of 8192 tokens, 32 in place of 1024 of them, fewer steps; learning rate and decay
(the paper: 1e-5 for 4 B to 8 B parameters), which are those of configs/convert_default.py so that
objectives are compared. The largest block is an argument of `get_config`; with another number of
steps on the command line, objective.block_size.double_every and objective.ar_weight.end move too.

Measured (H100, 2026-11-27; SmolLM2-135M, Q4_1; blocks to 8): held-out bound 1.292 bits/byte in
blocks of 8 after 600 steps at 3e-4, where our recipe had 1.224; AR before 1.059, after .962. On the
way through 2300 steps at the rate set here, at step 1725: 1.236 against our recipe's 1.154.
"""

from bdjax import TrainConfig, conversion_config, presets

STEPS = 2300


def get_config(start: TrainConfig, *, block_size: int = 32, steps: int = STEPS) -> TrainConfig:
    """`steps` steps of 32 rows of at most 1024 tokens; five eighths of them while blocks grow."""
    doublings = max(1, block_size.bit_length() - 1)
    recipe = presets.nbdiff(
        mask_id=start.tokenizer.mask_id,
        double_every=max(1, 5 * steps // (8 * doublings)),
        block_size=block_size,
    )
    return conversion_config(start, recipe, name="convert_nbdiff", steps=steps)
