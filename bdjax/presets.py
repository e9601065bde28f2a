"""Published recipes as settings of the one objective.

A recipe is an `Objective` and the clean mode its model needs:

    recipe = presets.sdar(mask_id=258, block_size=4)
    TrainConfig(objective=recipe.objective, model=DecoderConfig(clean=recipe.clean, ...), ...)

To write a preset, return a `Recipe`; what no field can express belongs into a new draw
(`bdjax.draws.Draw`) or process.
"""

from dataclasses import replace
from typing import NamedTuple

from bdjax.block_size import BlockSize, BlockSizes, BlockStages
from bdjax.draws import Bernoulli, Bound, Complement, ExactCount, Flat, Realised, Scope
from bdjax.noise import Absorbing
from bdjax.objective import Alignment, Normaliser, Objective
from bdjax.schedules import Beta, Discrete, Linear, Ramp, Rescaled, Schedule
from pallas_kernels import CleanMode


class Recipe(NamedTuple):
    """What a preset fixes: the objective, and how the model's clean stream sees itself."""

    objective: Objective
    clean: CleanMode


def default(
    *,
    mask_id: int,
    block_size: int | BlockSizes,
    ar_weight: float = 0.5,
    views: int = 1,
    alignment: Alignment = Alignment.SAME_POSITION,
) -> Recipe:
    """Ours: token-causal clean stream with next-token loss; exact counts stratified over rows."""
    size = _size(block_size)
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

    Documents in a row see each other, as in the paper's wrapped text: set data.aligned=false, or
    each is aligned to a row of its own and filled with EOS.
    """
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=Bernoulli(scope=Scope.ROW)),
        block_size=BlockSize(first=row_length),
        clean_stream=False,
        documents=False,
        normaliser=Normaliser.REAL,
    )
    return Recipe(objective, CleanMode.BLOCK)


def md4(*, mask_id: int, row_length: int, schedule: Schedule = Linear(), steps: int = 0) -> Recipe:
    """MD4 (Shi et al. 2024): MDLM's layout, any schedule, alpha kept within [1e-4, 1 - 1e-4].

    steps: the discrete-time bound of so many steps (the paper's 1000), 0 for continuous time.
    """
    noise: Schedule = Rescaled(schedule=schedule, eps=1e-4)
    if steps:
        noise = Discrete(schedule=noise, steps=steps)
    recipe = mdlm(mask_id=mask_id, row_length=row_length)
    draw = Bernoulli(scope=Scope.ROW, schedule=noise, low=0.0)
    process = Absorbing(mask_id=mask_id, draw=draw)
    return recipe._replace(objective=replace(recipe.objective, process=process))


def bd3lm(
    *,
    mask_id: int,
    block_size: int,
    low: float = 1e-3,
    high: float = 1.0,
    resample: bool = False,
) -> Recipe:
    """BD3-LM (Arriola et al. 2025): block-causal, one antithetic t in [low, high] per block.

    Blocks are counted along the row and documents see each other, as in the paper's wrapped text.
    As in its code, a band above one half weighs flatly; resample flips a block again whose masked
    share leaves the band.
    """
    weight = Flat() if low > 0.5 else Bound()
    draw = Bernoulli(scope=Scope.BLOCK, low=low, high=high, weight=weight, resample=resample)
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=draw),
        block_size=BlockSize(first=block_size),
        documents=False,
        normaliser=Normaliser.REAL,
    )
    return Recipe(objective, CleanMode.BLOCK)


def sdar(*, mask_id: int, block_size: int | BlockSizes) -> Recipe:
    """SDAR (Cheng et al. 2025): block-causal, one t per document, no row without a mask."""
    draw = Bernoulli(scope=Scope.DOCUMENT, never_empty=True)
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=draw), block_size=_size(block_size)
    )
    return Recipe(objective, CleanMode.BLOCK)


def sdar_vl(
    *,
    mask_id: int,
    steps: int,
    block_size: int = 4,
    last_mean: float = 0.7,
    last_concentration: float = 25.0,
    forced: tuple[int, ...] = (),
) -> Recipe:
    """SDAR-VL (arXiv 2512.14068): SDAR with a level per block and the realised ratio as weight.

    Levels follow a Beta law whose mean goes from 0.5 to `last_mean` and whose concentration from 4
    to `last_concentration` (25, for general data 50) over `steps` steps, uncorrected on purpose.
    forced: ids that are always masked.
    """
    law = Beta(steps=steps, last_mean=last_mean, last_concentration=last_concentration)
    draw = Bernoulli(scope=Scope.BLOCK, law=law, weight=Realised(), never_empty=True, forced=forced)
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=draw), block_size=BlockSize(first=block_size)
    )
    return Recipe(objective, CleanMode.BLOCK)


def tdar(*, mask_id: int, stage_steps: int, stages: tuple[int, ...] = (4, 8, 16, 32, 64)) -> Recipe:
    """TDAR: SDAR in stages of growing blocks, here of `stage_steps` steps each.

    Its stages are runs of their own: a fresh optimiser and learning rate at each, as we do not.
    """
    begins = tuple(stage_steps * n for n in range(len(stages)))
    return sdar(mask_id=mask_id, block_size=BlockStages(stages=stages, begins=begins))


def nbdiff(
    *,
    mask_id: int,
    double_every: int,
    begin: int = 0,
    block_size: int = 32,
    ar_weight: float = 0.5,
) -> Recipe:
    """NBDiff (arXiv 2512.06776): token-causal clean stream, shifted labels, blocks 1 to 32.

    Blocks double every `double_every` steps from `begin` on; the next-token weight goes from
    `ar_weight` to 0 while they grow (the paper: annealed as blocks grow).
    """
    size = BlockSize(first=1, last=block_size, double_every=double_every, begin=begin)
    end = begin + double_every * (len(size.sizes) - 1)
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=Bernoulli()),
        block_size=size,
        alignment=Alignment.SHIFTED_CLEAN,
        ar_weight=Ramp(first=ar_weight, last=0.0, begin=begin, end=end),
    )
    return Recipe(objective, CleanMode.TOKEN)


def fast_dllm_v2(*, mask_id: int, block_size: int = 32) -> Recipe:
    """Fast-dLLM v2 (NVlabs): a pair of complementary views, flat weights over the masked count.

    Labels are shifted in the noisy view: a block's first token is read from the noisy block before
    it, which sampling does not repeat. Documents see each other. Its data fill blocks with tokens
    that are no labels: type data.tail=short.
    """
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=Complement(draw=Bernoulli(weight=Flat()))),
        block_size=BlockSize(first=block_size),
        alignment=Alignment.SHIFTED_NOISY,
        views=2,
        documents=False,
        normaliser=Normaliser.MASKED,
    )
    return Recipe(objective, CleanMode.BLOCK)


def llada2(*, mask_id: int, block_size: int = 32, complement: bool = False) -> Recipe:
    """LLaDA2.0's fine-tuning (dFactory): t in [0.3, 0.8] per document, flat over the masked count.

    complement: two views, the second masks what the first left (the report's post-training).
    """
    draw = Bernoulli(scope=Scope.DOCUMENT, low=0.3, high=0.8, weight=Flat())
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=Complement(draw=draw) if complement else draw),
        block_size=BlockSize(first=block_size),
        views=2 if complement else 1,
        normaliser=Normaliser.MASKED,
    )
    return Recipe(objective, CleanMode.BLOCK)


def llada2_wsd(
    *, mask_id: int, row_length: int, warmup_steps: int, stable_steps: int, decay_steps: int
) -> Recipe:
    """LLaDA2.0's conversion: blocks 1, 4, 32, 64 in the warm-up, the row, halved down to 32.

    Weights are the bound's. The stages of the warm-up are equally long, those of the decay too;
    the clean stream stays in the row while one block fills it (the same losses, more work).
    Raises ValueError when row_length is no 64 times 2, 4, 8, ...
    """
    times = row_length // 64
    if row_length % 64 or times < 2 or times & (times - 1):
        raise ValueError(
            f"row_length={row_length} must be 64 times a power of two, from 128 on; "
            "type row_length=4096"
        )
    up = (1, 4, 32, 64)
    if warmup_steps < len(up) or stable_steps < 1:
        raise ValueError(
            f"warmup_steps={warmup_steps} and stable_steps={stable_steps} leave stages without a "
            "step; type warmup_steps=400 stable_steps=1000"
        )
    down = tuple(row_length >> n for n in range(1, times.bit_length() + 1))
    if decay_steps < len(down):
        raise ValueError(
            f"decay_steps={decay_steps} cannot hold {len(down)} stages; type decay_steps=700"
        )
    decay = warmup_steps + stable_steps
    begins = [warmup_steps * n // len(up) for n in range(len(up))] + [warmup_steps]
    begins += [decay + decay_steps * n // len(down) for n in range(len(down))]
    objective = Objective(
        process=Absorbing(mask_id=mask_id, draw=Bernoulli(scope=Scope.DOCUMENT)),
        block_size=BlockStages(stages=(*up, row_length, *down), begins=tuple(begins)),
    )
    return Recipe(objective, CleanMode.BLOCK)


def _size(block_size: int | BlockSizes) -> BlockSizes:
    return block_size if isinstance(block_size, BlockSizes) else BlockSize(first=block_size)
