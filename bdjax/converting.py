"""An autoregressive model as the starting point of a block-diffusion one.

Its weights stay as they are: the clean stream is token-causal, so that before any training it is
the model that it was. What it lacks is a mask token. Its row starts as the mean of the rows that
stand for text, with a little noise: a reserved row that was never trained has often decayed to
nothing, from which gradients explode (LLaDA2.0, training at masked positions).
"""

from dataclasses import replace
from pathlib import Path

import jax
from jaxtyping import Array, Float, Key

from bdjax import presets
from bdjax.base import check_free, write_run
from bdjax.config import EvaluationConfig, MeshConfig, TrainConfig, check_seed
from bdjax.generation import LanguageModel, load
from bdjax.hf_tokenizer import HuggingFaceTokenizer
from bdjax.learning_rate import StableDecay
from bdjax.model import Remat
from bdjax.objective import Alignment
from bdjax.optim import OptimConfig
from bdjax.pretrained import PretrainedError
from bdjax.seeds import Purpose, key_for
from bdjax.weights import Progress

# Of the deviation of each coordinate over the rows of the embedding.
_NOISE = 0.1


def convert_model(
    path: str | Path,
    run: str | Path,
    *,
    mask_id: int | None = None,
    block_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainConfig:
    """The AR model at `path` (a model folder, a GGUF file or a run) as step 0 of a new run.

    The run has float32 parameters and our default objective with `block_size` and shifted labels:
    in blocks of one token it writes as the AR model does. `bdjax train --start` goes on from it.
    mask_id: of the mask token, by default the first id that the embedding has and the tokenizer
    does not name, else a new one behind all others. A run that cannot be finished is taken away.

    Raises PretrainedError for a model that is no AR model, a mask_id that means something and a
    block_size that does not divide the rows, ValueError for a seed of more than 32 bits;
    CheckpointError where `run` has checkpoints already.
    """
    check_free(run)
    check_seed(seed)
    loaded = load(path, dtype="float32", mesh=MeshConfig(), progress=progress)
    with jax.set_mesh(loaded.config.mesh.build()):
        config, params = with_mask(loaded, path, mask_id, block_size, seed)
        write_run(run, config, params)
    return config


def with_mask(
    loaded: LanguageModel, path: str | Path, mask_id: int | None, block_size: int, seed: int
) -> tuple[TrainConfig, dict]:
    """The config and parameters of the start, on the mesh in force; as `convert_model`."""
    tokenizer = loaded.config.tokenizer
    if loaded.config.objective.views:
        raise PretrainedError(
            f"{path} writes in blocks already; type bdjax train --start with its run"
        )
    if not (isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.size):
        raise PretrainedError(
            f"{path} is a run of ours, which has a mask token; type bdjax train --start {path}"
        )
    length = loaded.config.data.row_length
    if block_size < 1 or length % block_size:
        # The largest power of two that does, and is no larger: recipes double up to it.
        fits = 1 << min(max(block_size, 1), length & -length).bit_length() - 1
        raise PretrainedError(
            f"block_size={block_size} does not divide the rows of {length} tokens of {path}; type "
            f"--block-size {fits}"
        )
    rows, named = tokenizer.size, tokenizer.file_size
    mask = mask_id if mask_id is not None else min(named, rows)
    if not named <= mask <= rows:
        raise PretrainedError(
            f"mask_id={mask} is not one of the ids from {named} to {rows} that the tokenizer of "
            f"{path} leaves free; type --mask-id {min(named, rows)}"
        )
    config = replace(
        loaded.config,
        objective=presets.default(
            mask_id=mask, block_size=block_size, alignment=Alignment.SHIFTED_CLEAN
        ).objective,
        tokenizer=replace(tokenizer, mask=mask, size=max(rows, mask + 1)),
    )
    key = key_for(jax.random.key(seed), Purpose.INIT)
    params = dict(loaded.params)
    size = config.vocab_size
    params["embed"] = _start(params["embed"], named, mask, size, key)
    if not config.model.tied_head:
        # Nothing is read from it: the mask is never drawn.
        params["head"] = params["head"][:size]
    return config, params


def conversion_config(
    start: TrainConfig, recipe: presets.Recipe, *, name: str, steps: int
) -> TrainConfig:
    """A run from `start` by `recipe` in all that is no objective, so that recipes compare.

    32 rows of at most 1024 tokens a step in bfloat16; AdamW at 1e-3, a warm-up of a twentieth,
    decay to zero over the last seven tenths; three evaluations. The rate was chosen for 0.1 B
    parameters. Raises ValueError where the start's other fields do not go with these.
    """
    return replace(
        start,
        name=name,
        steps=steps,
        model=replace(start.model, clean=recipe.clean, dtype="bfloat16", remat=Remat.DOTS),
        objective=recipe.objective,
        data=replace(start.data, row_length=min(1024, start.data.row_length), batch_size=32),
        optim=OptimConfig(
            peak_lr=1e-3,
            warmup_fraction=0.05,
            decay=StableDecay(start=0.3),
            final_lr_fraction=0.0,
        ),
        evaluation=EvaluationConfig(every=max(1, steps // 4), batches=12),
        checkpoint_every=500,
    )


def _start(
    embed: Float[Array, "V D"], named: int, mask: int, size: int, key: Key[Array, ""]
) -> Float[Array, "size D"]:
    """The first `size` rows, with a new one for the mask."""
    text = embed[:named]
    noise = _NOISE * text.std(axis=0) * jax.random.normal(key, text.shape[1:], text.dtype)
    return embed[:size].at[mask].set(text.mean(axis=0) + noise)
