"""What a sampler asks of a few rows' logits, in one pass over the head, on Hopper.

Few rows are bound by reading the head. Every warpgroup goes through tiles of ids by itself: while
one reduces its tile the other's copies are under way, and the noise, a function of key and id, is
made between the products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import hopper_product as product
from pallas_kernels.hopper_head import BANNED, check

ROWS = 64
_STEP = 64
_STAGES = 4
_WARPGROUPS = 2
BLOCKS = 132
# Ids of a tile, in whole pieces. Accumulator and noise of 144 do not fit in registers: 64 rows take
# twice the time of 96 on an H100.
WIDTHS = (120, 96)
# Noise is made for so many ids at a time.
_PIECE = 24
# More ids than these exceed shared memory.
_WIDEST = 144
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Parts(NamedTuple):
    """Of every tile of ids; scaled logits s = logit / temperature.

    Ids are places in the head, as floats. top: largest s and its id; second: second largest.
    total = sum exp(s - top), weighted = sum s exp(s - top), raw_total = sum exp((s - top)
    temperature). drawn: largest s + Gumbel noise, its id and its s.
    """

    top: Float[Array, "tiles n"]
    top_id: Float[Array, "tiles n"]
    second: Float[Array, "tiles n"]
    total: Float[Array, "tiles n"]
    weighted: Float[Array, "tiles n"]
    raw_total: Float[Array, "tiles n"]
    drawn: Float[Array, "tiles n"]
    drawn_id: Float[Array, "tiles n"]
    drawn_scaled: Float[Array, "tiles n"]


def _threefry(key, ids):
    """First word of threefry-2x32 of (0, id), which is what `jax.random.fold_in` makes of it."""
    first, second = key
    keys = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    x, y = first, ids + second
    for i in range(5):
        for turn in _ROTATIONS[i % 2]:
            x = x + y
            y = (y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))
            y = y ^ x
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x


def _gumbel(bits):
    """Standard Gumbel noise as `bdjax.stats.gumbel` makes it of 32 bits.

    The chip's logarithm is exact to 2^-22, absolutely: where 1 - u is near 1 a series is better.
    """
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    series = jnp.full_like(u, 1 / 6)
    for i in range(5, 0, -1):
        series = series * u + 1 / i
    return -jnp.log(jnp.where(u < 1 / 16, series * u, -jnp.log(1.0 - u)))


def width_for(ids: int, row_tiles: int) -> int:
    """Ids per tile that leave the least work to the busiest warpgroup."""

    def longest(width):
        tiles = -(-ids // width) * row_tiles
        return -(-tiles // (BLOCKS * _WARPGROUPS)) * (width + ROWS)

    return min(WIDTHS, key=longest)


def statistics(
    x: Float[Array, "n D"],
    head: Float[Array, "V D"],
    temperature: Float[Array, "n"],
    keys: UInt32[Array, "n 2"],
    first_id: Int[Array, ""] | int = 0,
    banned: tuple[int, ...] = (),
    bias: Float[Array, "V"] | None = None,
    *,
    width: int | None = None,
) -> Parts:
    """Statistics of the logits x @ head^T + bias, tile by tile; n is a multiple of 64.

    head is a share of a vocabulary that starts at `first_id`; `banned` and the noise's ids are the
    vocabulary's. width: ids of a tile, a multiple of 24 up to 144. Raises NotImplementedError for
    hidden widths and dtypes not served, ValueError for another width of tiles.
    """
    check(x.shape[1], x.dtype)
    rows, ids = x.shape[0], head.shape[0]
    row_tiles, steps = rows // ROWS, x.shape[1] // _STEP
    width = width_for(ids, row_tiles) if width is None else width
    if width % _PIECE or not 0 < width <= _WIDEST:
        # Ids behind the last whole piece would have no noise and never be drawn.
        raise ValueError(
            f"width={width} must be a multiple of {_PIECE} up to {_WIDEST}; type one of {WIDTHS}"
        )
    tiles = -(-ids // width)
    pieces = width // _PIECE
    fields = len(Parts._fields)

    def body(x_ref, head_ref, scale_ref, first_ref, second_ref, bias_ref, integers, *out_refs):
        def run(x_smem, head_smem, out_smem, full):
            group = lax.axis_index("warpgroup")
            worker = lax.axis_index("block") + group * BLOCKS
            items = jnp.maximum(tiles * row_tiles - worker + BLOCKS * _WARPGROUPS - 1, 0)
            items = items // (BLOCKS * _WARPGROUPS)
            offset = integers[0]

            def place(index):
                number = worker + index * (BLOCKS * _WARPGROUPS)
                tile = number // row_tiles
                return (number - tile * row_tiles) * ROWS, tile

            def slot_of(step):
                return lax.rem(step, jnp.int32(_STAGES))

            def copy(step):
                @pl.when(step < items * steps)
                def _():
                    row, tile = place(step // steps)
                    along = pl.ds(lax.rem(step, jnp.int32(steps)) * _STEP, _STEP)
                    slot = slot_of(step)
                    barrier = full.at[group * _STAGES + slot]
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(row, ROWS), along], x_smem.at[group, slot], barrier
                    )
                    plgpu.copy_gmem_to_smem(
                        head_ref.at[pl.ds(tile * width, width), along],
                        head_smem.at[group, slot],
                        barrier,
                    )

            def spread(vector, size=width):
                return lax.broadcast_in_dim(vector, (ROWS, size), (0,))

            def columns(first, size):
                shape = (ROWS, size)
                count = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                return count + first

            def load(ref, row):
                return product.load(ref, row, ROWS, _ROW)

            def item(index, _):
                row, tile = place(index)
                first = tile * width
                scale = load(scale_ref, row)
                key = [spread(load(ref, row), _PIECE) for ref in (first_ref, second_ref)]

                def products(acc):
                    def step(k, _):
                        at = index * steps + k
                        slot = slot_of(at)
                        plgpu.barrier_wait(full.at[group * _STAGES + slot])
                        weight = head_smem.at[group, slot].transpose((1, 0))
                        plgpu.wgmma(acc, x_smem.at[group, slot], weight)
                        plgpu.wgmma_wait(0)
                        copy(at + _STAGES)

                    noise = []
                    for i in range(pieces):
                        bounds = i * steps // pieces, (i + 1) * steps // pieces
                        lax.fori_loop(*bounds, step, None)
                        here = columns(first + offset + i * _PIECE, _PIECE).astype(jnp.uint32)
                        noise.append(_gumbel(_threefry(key, here)))
                    return acc[...], *noise

                shape = plgpu.ACC((ROWS, width), jnp.float32)
                logits, *noise = pl.run_scoped(products, shape)
                local = columns(first, width)
                if bias is not None:
                    extra = product.load(bias_ref, first, width, _COLUMN)
                    logits += lax.broadcast_in_dim(extra, logits.shape, (1,))
                allowed = local < ids
                for i in range(len(banned)):
                    allowed &= local != integers[1 + i]
                scaled = jnp.where(allowed, logits, BANNED) / spread(scale)
                # Ids are exact in float32 below 2^24; the smallest one wins a tie.
                names = -local.astype(jnp.float32)
                nobody = -(2.0**24)
                top = scaled.max(axis=1)
                lead = scaled - spread(top)
                top_name = jnp.where(lead == 0, names, nobody).max(axis=1)
                share = jnp.exp(lead)
                others = jnp.where(names == spread(top_name), 2 * BANNED, scaled)

                def each(i, x):
                    return x[:, i * _PIECE : (i + 1) * _PIECE]

                noisy = [each(i, scaled) + n for i, n in enumerate(noise)]
                drawn = noisy[0].max(axis=1)
                for n in noisy[1:]:
                    drawn = jnp.maximum(drawn, n.max(axis=1))
                name, value = None, None
                for i, n in enumerate(noisy):
                    hit = n == spread(drawn, _PIECE)
                    own = jnp.where(hit, each(i, names), nobody).max(axis=1)
                    own_value = jnp.where(hit, each(i, scaled), 2 * BANNED).max(axis=1)
                    name = own if name is None else jnp.maximum(name, own)
                    value = own_value if value is None else jnp.maximum(value, own_value)
                part = Parts(
                    top,
                    -top_name,
                    others.max(axis=1),
                    share.sum(axis=1),
                    (share * jnp.where(share > 0, scaled, 0.0)).sum(axis=1),
                    jnp.exp(lead * spread(scale)).sum(axis=1),
                    drawn,
                    -name,
                    value,
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i, vector in enumerate(part):
                    out_smem[group, i] = vector
                plgpu.commit_smem()
                for i, ref in enumerate(out_refs):
                    there = ref.at[tile, pl.ds(row, ROWS)]
                    plgpu.copy_smem_to_gmem(out_smem.at[group, i], there)

            for step in range(_STAGES):
                copy(jnp.int32(step))
            lax.fori_loop(0, items, item, None)
            plgpu.wait_smem_to_gmem(0)

        lanes = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        pl.run_scoped(
            run,
            plgpu.SMEM((_WARPGROUPS, _STAGES, ROWS, _STEP), x.dtype, transforms=lanes),
            plgpu.SMEM((_WARPGROUPS, _STAGES, width, _STEP), x.dtype, transforms=lanes),
            plgpu.SMEM((_WARPGROUPS, fields, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=_WARPGROUPS * _STAGES),
            collective_axes="warpgroup",
        )

    extra = jnp.zeros((1,), jnp.float32)
    if bias is not None:
        extra = jnp.pad(bias.astype(jnp.float32), (0, tiles * width - ids))
    integers = [jnp.asarray(first_id, jnp.int32), *(jnp.int32(i) - first_id for i in banned)]
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((tiles, rows), jnp.float32)] * fields,
        grid=(BLOCKS,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        kernel_name="head_sampling_statistics",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return Parts(*run(x, head, temperature, keys[:, 0], keys[:, 1], extra, jnp.stack(integers)))
