"""Bits per byte of an AR model and bounds of a block-diffusion one, on the same rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

import bdjax
from bdjax import likelihood, presets
from bdjax.data import RowBatch
from pallas_kernels import CleanMode

Sources = Mapping[str, Sequence[RowBatch]]


def as_ar(loaded: bdjax.LanguageModel) -> bdjax.LanguageModel:
    """The same weights as an autoregressive model: the clean stream alone, token by token."""
    recipe = presets.ar(mask_id=loaded.config.tokenizer.mask_id)
    config = replace(
        loaded.config,
        objective=recipe.objective,
        model=replace(loaded.config.model, clean=recipe.clean),
    )
    return replace(loaded, config=config, model=config.build_model())


def has_ar(loaded: bdjax.LanguageModel) -> bool:
    """Whether the clean stream still is a model of the next token: it sees nothing to its right."""
    return loaded.config.model.clean is CleanMode.TOKEN


def ar_bits(loaded: bdjax.LanguageModel, sources: Sources) -> dict:
    """Bits per byte of the weights as an AR model, in all and by source."""
    return _bits(as_ar(loaded), sources, "ar", block_size=1, draws=1)


def bound_bits(loaded: bdjax.LanguageModel, sources: Sources, block_size: int, draws: int) -> dict:
    """The diffusion bound at `block_size`; blocks of one have one mask pattern and need one draw.

    Documents never see each other, and a block's first token of a shifted model is read from the
    clean stream, as in sampling. `se`: of the mean over the draws, given the text.
    """
    objective = loaded.config.objective
    alignment = objective.alignment
    if alignment is bdjax.Alignment.SHIFTED_NOISY:
        alignment = bdjax.Alignment.SHIFTED_CLEAN
    objective = replace(objective, documents=True, alignment=alignment, ar_weight=0.0)
    asked = replace(loaded, config=replace(loaded.config, objective=objective))
    return _bits(
        asked, sources, "diffusion", block_size=block_size, draws=1 if block_size == 1 else draws
    )


def _bits(
    loaded: bdjax.LanguageModel, sources: Sources, part: str, *, block_size: int, draws: int
) -> dict:
    nats = np.zeros((len(sources), draws))
    tokens, sizes = np.zeros((2, len(sources)), int)
    token_bytes = loaded.config.tokenizer.token_bytes()
    with jax.set_mesh(loaded.config.mesh.build()):
        for number, batches in enumerate(sources.values()):
            for draw in range(draws):
                found = likelihood.evaluate(
                    loaded.config.objective,
                    loaded.model,
                    loaded.params,
                    batches,
                    token_bytes,
                    block_size=block_size,
                    seed=draw * len(sources) + number,
                )
                nats[number, draw] = getattr(found, part).nats_per_token * found.tokens
                tokens[number], sizes[number] = found.tokens, found.bytes
    bits = nats / math.log(2)
    totals = bits.sum(axis=0) / sizes.sum()
    return {
        "block_size": block_size,
        "draws": draws,
        "tokens": int(tokens.sum()),
        "bytes": int(sizes.sum()),
        "bits_per_byte": float(totals.mean()),
        "se": float(totals.std(ddof=1) / draws**0.5) if draws > 1 else 0.0,
        "sources": {
            name: float(own.mean() / size)
            for name, own, size in zip(sources, bits, sizes, strict=True)
        },
    }
