"""Tiny Shakespeare by characters at nanoGPT's shape and budget: the proof that the bound is right.

bdjax train configs/tinyshakespeare.py          (with tinyshakespeare.txt in the working folder)
python tools/block_sizes.py run tinyshakespeare.txt --gpus 2
H100, jax 0.11.2, 2026-11-23, two runs sharing a GPU: 3 to 5 minutes each. Held-out nats per
character: AR 1.495 at its best (it overfits); after 5000 steps block 4 1.536, 8 1.581, 16 1.632,
32 1.649, MDLM 1.700; nanoGPT 1.4697. Curves and what they mean: docs/tinyshakespeare.md
"""

from dataclasses import replace

from bdjax import (
    CosineDecay,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    OptimConfig,
    Remat,
    TextFiles,
    TrainConfig,
    presets,
)
from bdjax.noise import Bernoulli
from bdjax.tokenizer import ByteTokenizer
from pallas_kernels import Cudnn

ROW = 256


def recipe_of(kind: str) -> presets.Recipe:
    """ "ar", "mdlm", a block size, or "16-bernoulli": a block size with coin flips and 1/t."""
    mask = ByteTokenizer.mask_id
    if kind == "ar":
        return presets.ar(mask_id=mask)
    if kind == "mdlm":
        return presets.mdlm(mask_id=mask, row_length=ROW)
    size, _, draw = kind.partition("-")
    recipe = presets.default(mask_id=mask, block_size=int(size), ar_weight=0.0)
    if not draw:
        return recipe
    process = replace(recipe.objective.process, draw=Bernoulli())
    return recipe._replace(objective=replace(recipe.objective, process=process))


def get_config(kind: str = "4", seed: int = 0, text: str = "tinyshakespeare.txt") -> TrainConfig:
    """10.7 M parameters; the first 90 % of the text to train on, the last 10 % held out."""
    recipe = recipe_of(kind)
    return TrainConfig(
        name=f"tinyshakespeare-{kind}",
        steps=5000,
        model=DecoderConfig(
            num_layers=6,
            width=384,
            num_heads=6,
            num_kv_heads=6,
            head_dim=64,
            mlp_width=1024,
            clean=recipe.clean,
            dropout=0.2,
            remat=Remat.NONE,
            attention=Cudnn(),
        ),
        objective=recipe.objective,
        data=DataConfig(
            source=TextFiles(paths=(text,), last=0.9),
            held_out=TextFiles(paths=(text,), first=0.9),
            row_length=ROW,
            batch_size=64,
        ),
        optim=OptimConfig(peak_lr=1e-3, b2=0.99, weight_decay=0.1, decay=CosineDecay()),
        evaluation=EvaluationConfig(every=250, batches=100, tokens=32),
        checkpoint_every=2500,
        seed=seed,
    )
