"""An autoregressive model becomes a block-diffusion one as Fast-dLLM v2 does (NVlabs, Qwen2.5).

bdjax convert MODEL --run runs/start
bdjax train configs/convert_fast_dllm_v2.py --start runs/start --run runs/fast_dllm_v2 \\
    data.source=JsonLines data.source.paths=mix/train/*.jsonl.zst \\
    data.held_out=JsonLines data.held_out.paths=mix/heldout/*.jsonl.zst

The authors': block-causal clean stream, labels shifted by one within the noisy view, two
complementary views of each row, flat weights over the masked tokens (no 1/t), blocks of 32 from the
first step on, documents in a row see each other and are filled up with tokens that are no labels.
Ours: rows of 1024 in place of 512 tokens, 32 of them, fewer steps (theirs: about 1 B tokens);
learning rate and decay (theirs: 2e-5, constant after a warm-up of 0.03), which are those of
configs/convert_default.py so that objectives are compared; the two views make a step dearer. Other
blocks: `objective.block_size.first=8`.
"""

from dataclasses import replace

from bdjax import TrainConfig, conversion_config, presets
from bdjax.data import Tail

STEPS = 2300


def get_config(start: TrainConfig, *, block_size: int = 32, steps: int = STEPS) -> TrainConfig:
    """`steps` steps of 32 rows of at most 1024 tokens, in two views each."""
    recipe = presets.fast_dllm_v2(mask_id=start.tokenizer.mask_id, block_size=block_size)
    config = conversion_config(start, recipe, name="convert_fast_dllm_v2", steps=steps)
    return replace(config, data=replace(config.data, tail=Tail.SHORT))
