"""Published recipes as settings of the one objective.

A recipe is an `Objective` and the clean mode its model needs:

    recipe = presets.sdar(mask_id=258, block_size=4)
    TrainConfig(objective=recipe.objective, model=DecoderConfig(clean=recipe.clean, ...), ...)

To write a preset, return a `Recipe`; what no field can express belongs into a new draw
(`bdjax.noise.Draw`) or process.
"""

from typing import NamedTuple

from bdjax.noise import Absorbing, Bernoulli, ExactCount, Scope
from bdjax.objective import Alignment, BlockSize, Normaliser, Objective
from pallas_kernels import CleanMode


class Recipe(NamedTuple):
    """What a preset fixes: the objective, and how the model's clean stream sees itself."""

    objective: Objective
    clean: CleanMode


def default(
    *,
    mask_id: int,
    block_size: int | BlockSize,
    ar_weight: float = 0.5,
    views: int = 1,
    alignment: Alignment = Alignment.SAME_POSITION,
) -> Recipe:
    """Ours: token-causal clean stream with next-token loss; exact counts stratified over rows."""
    size = block_size if isinstance(block_size, BlockSize) else BlockSize(first=block_size)
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=ExactCount()),
        block_size=size,
        alignment=alignment,
        views=views,
        ar_weight=ar_weight,
    )
    return Recipe(objective, CleanMode.TOKEN)


def ar(*, mask_id: int) -> Recipe:
    """An autoregressive model: the clean stream alone.

    Sampling reads each token from the clean one before it: a masked slot was never trained.
    """
    objective = Objective(
        process=Absorbing(mask_id=mask_id),
        block_size=BlockSize(first=1),
        alignment=Alignment.SHIFTED_CLEAN,
        views=0,
        ar_weight=1.0,
    )
    return Recipe(objective, CleanMode.TOKEN)


def mdlm(*, mask_id: int, row_length: int) -> Recipe:
    """MDLM (Sahoo et al. 2024): no clean stream, the row is one block, one antithetic t per row.

    Documents in a row see each other, as in the paper's wrapped text.
    """
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=Bernoulli(scope=Scope.ROW)),
        block_size=BlockSize(first=row_length),
        clean_stream=False,
        documents=False,
        normaliser=Normaliser.REAL,
    )
    return Recipe(objective, CleanMode.BLOCK)


def bd3lm(*, mask_id: int, block_size: int, low: float = 1e-3, high: float = 1.0) -> Recipe:
    """BD3-LM (Arriola et al. 2025): block-causal, one antithetic t in [low, high] per block.

    Blocks are counted along the row and documents see each other, as in the paper's wrapped text.
    """
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=Bernoulli(scope=Scope.BLOCK, low=low, high=high)),
        block_size=BlockSize(first=block_size),
        documents=False,
        normaliser=Normaliser.REAL,
    )
    return Recipe(objective, CleanMode.BLOCK)


def sdar(*, mask_id: int, block_size: int) -> Recipe:
    """SDAR (Cheng et al. 2025): block-causal, one t per document, no row without a mask."""
    draw = Bernoulli(scope=Scope.DOCUMENT, never_empty=True)
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=draw), block_size=BlockSize(first=block_size)
    )
    return Recipe(objective, CleanMode.BLOCK)
