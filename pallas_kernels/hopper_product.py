"""A tiled matrix product for Hopper whose tiles end in a function of the caller's.

Persistent blocks of two computing warpgroups and one that copies: an output tile of 128 x 256 is
two accumulators of 64 x 256 that share the second operand, and the copies for the next tile are
under way while the last one is finished. How many tiles there are may be data.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

TILE_ROWS, TILE_COLUMNS = 128, 256
HALF = TILE_ROWS // 2
_STEP = 64
_STAGES = 4
# Blocks of an H100; a chip with fewer runs the rest in a second wave.
BLOCKS = 132
# Blocks that take the tiles below each other and share the copies of the second operand.
CLUSTER = 2
_GROUP = 8
# A row of a shared buffer that copies understand.
_BYTES = 128


# jax 0.10 wants an index with a load, 0.11 wants none.
_WHOLE = () if jax.__version_info__ >= (0, 11) else ((),)


def read(ref, layout, optimized: bool = True):
    """What stands in memory, in registers of that layout."""
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=optimized)


def load(ref, first, size: int, layout):
    """`size` numbers from `first` on, out of global memory into registers."""
    return read(ref.at[pl.ds(first, size)], layout, optimized=False)


class Operand(NamedTuple):
    """A matrix of 16-bit numbers in global memory, the axis summed over and where the sum starts.

    What lies outside of the matrix counts as zeros.
    """

    ref: jax.Ref
    summed: int
    start: Int[Array, ""] | int = 0


def tiled(shape: tuple[int, ...], dtype):
    """Shared memory as wgmma and copies read it."""
    tiling = plgpu.TilingTransform((8, _BYTES // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(_BYTES)))


def outbox(dtype):
    """Scratch for `write`: two slots for each computing warpgroup."""
    return tiled((2, 2, HALF, _BYTES // jnp.dtype(dtype).itemsize), dtype)


def write(values: Float[Array, "64 256"], box, half, ref, row, column, reduction=None):
    """Starts copies of `values` to ref[row:, column:], or adds them there ("add").

    What lies outside of `ref` is dropped. `plgpu.wait_smem_to_gmem(0)` is due before the kernel
    ends.
    """
    piece = box.shape[-1]
    for i in range(TILE_COLUMNS // piece):
        slot = i % 2
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        box[half, slot] = values[:, i * piece : (i + 1) * piece]
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(row, HALF), HALF)
        across = pl.ds(pl.multiple_of(column + i * piece, piece), piece)
        plgpu.copy_smem_to_gmem(box.at[half, slot], ref.at[rows, across], reduction_op=reduction)


def tall() -> int:
    """Rows of the tiles of a cluster together; operands are filled up to a multiple of it."""
    return TILE_ROWS * CLUSTER


def grouped(index, rows, columns):
    """(row, column) of an item: groups of rows run through all columns, rows fastest.

    Blocks that run at one time then share their operands in the second-level cache.
    """
    group = index // (_GROUP * columns)
    inside = index - group * _GROUP * columns
    height = jnp.minimum(_GROUP, rows - group * _GROUP)
    column = inside // height
    return group * _GROUP + inside - column * height, column


def own_share(total):
    """How many of `total` items this cluster takes: `item_number` of 0, 1, ..."""
    clusters = BLOCKS // CLUSTER
    return jnp.maximum(total - lax.axis_index("cluster") + clusters - 1, 0) // clusters


def item_number(index):
    """Which of all items is the index-th of this cluster."""
    return lax.axis_index("cluster") + index * (BLOCKS // CLUSTER)


def _operand_buffer(operand: Operand, size: int):
    shape = (size, _STEP) if operand.summed else (_STEP, size)
    return tiled((_STAGES, *shape), operand.ref.dtype)


def run(
    a: Operand,
    b: Operand,
    *,
    tiles,
    steps,
    place: Callable,
    compute: Callable,
    scratch=(),
):
    """Runs `compute` on the computing warpgroups while a third feeds them.

    tiles: how many a block visits, the same in a cluster; steps: chunks of 64 along the summed
    axis, at least 1; `place(i)` -> first row of `a`, first row of `b` of a cluster's i-th tiles,
    together `tall()` x 256. `compute(half, offset, product, *scratch)` is to call
    `product(i, finish)` for each i in order and gets what `finish(acc)` returns, acc of 64 x 256:
    rows from `offset` on. half: 0 or 1.
    """

    def body(a_smem, b_smem, full, empty, *own):
        group, peer = lax.axis_index("warpgroup"), lax.axis_index("peer")

        def slot_of(step):
            return lax.rem(step, jnp.int32(_STAGES))

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def copy(operand, size, first, k, target, barrier, **options):
                start = pl.multiple_of(operand.start + k * _STEP, _STEP)
                along, across = pl.ds(start, _STEP), pl.ds(pl.multiple_of(first, HALF), size)
                at = (across, along) if operand.summed else (along, across)
                plgpu.copy_gmem_to_smem(operand.ref.at[at], target, barrier, **options)

            def tile(i, _):
                row, column = place(i)
                row += peer * TILE_ROWS
                shared = {"collective_axes": "peer"} if CLUSTER > 1 else {}

                def step(k, _):
                    at = i * steps + k
                    slot = slot_of(at)

                    @pl.when(at >= _STAGES)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    copy(a, TILE_ROWS, row, k, a_smem.at[slot], full.at[slot])
                    copy(b, TILE_COLUMNS, column, k, b_smem.at[slot], full.at[slot], **shared)

                lax.fori_loop(0, steps, step, None)

            lax.fori_loop(0, tiles, tile, None)

            def drain(at, _):
                plgpu.barrier_wait(empty.at[slot_of(at)])

            total = tiles * steps
            lax.fori_loop(jnp.maximum(total - _STAGES, 0), total, drain, None)

        @pl.when(group < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds(group * HALF, HALF)

            def product(i, finish):
                def accumulate(acc):
                    def step(k, _):
                        at = i * steps + k
                        slot = slot_of(at)
                        plgpu.barrier_wait(full.at[slot])
                        left, right = a_smem.at[slot], b_smem.at[slot]
                        left = left.at[rows] if a.summed else left.at[:, rows].transpose((1, 0))
                        plgpu.wgmma(acc, left, right.transpose((1, 0)) if b.summed else right)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(at + _STAGES - 1)])

                    lax.fori_loop(0, steps, step, None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot_of(i * steps + steps - 1)])
                    return acc[...]

                shape = (HALF, TILE_COLUMNS)
                return finish(pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32)))

            compute(group, peer * TILE_ROWS + group * HALF, product, *own)

    freed = {"num_arrivals": 2, "num_barriers": _STAGES}
    empty = plgpu.Barrier(**freed)
    if CLUSTER > 1:
        empty = plgpu.ClusterBarrier(collective_axes=("peer",), **freed)

    pl.run_scoped(
        body,
        _operand_buffer(a, TILE_ROWS),
        _operand_buffer(b, TILE_COLUMNS),
        plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        empty,
        *scratch,
        collective_axes="warpgroup",
    )


def kernel(body, out_type, name: str):
    """`body` over the blocks of a chip, three warpgroups each; operands may be Refs."""
    # Not `plgpu.kernel`: its batching rule does not take Refs in jax 0.10.
    mesh = plgpu.Mesh(
        grid=(BLOCKS // CLUSTER,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("peer",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=name,
    )
    params = plgpu.CompilerParams(approx_math=True)
    return pl.kernel(body, out_type, mesh=mesh, compiler_params=params, name=name)
