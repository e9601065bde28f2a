"""Attention forward on Hopper: two warpgroups of consumers, one that loads, tiles by the plan.

A thread block stays on its multiprocessor and takes one query tile after the other: between blocks
that come and go some 6000 cycles pass, which is two key tiles' time, and another 6000 until a new
one's products are under way.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper_product import read, tiled
from pallas_kernels.hopper_tiles import QueryPlan, rounds_of
from pallas_kernels.merge import EMPTY

# Queries of one warpgroup: the rows of a wgmma. Tiles of the plans: queries of a block, and keys.
ROWS = 64
TILE = 2 * ROWS

# Every warpgroup starts with 168 registers a thread: what the loading one gives up, 168 - 24, the
# two others get, 2 * (240 - 168). With less to give they would wait for ever.
LOADER_REGISTERS, MATH_REGISTERS = 24, 240

# Numbers of a plan's row in shared memory: copies go to multiples of 128 bytes.
PLAN_ROOM = 32

LOG2E = math.log2(math.e)

# Stands for a masked score; rows start from a maximum above it, so that it never counts.
_MASKED, _FLOOR = -1e30, -4e28


class Sizes(NamedTuple):
    """How many steps are in flight, and the width before padding."""

    stages: int
    width: int


class Runs(NamedTuple):
    """The key tiles of a query tile, as the plan lists them: first those without a mask."""

    clean: tuple[Array, Array, Array, Array]
    own: tuple[Array, Array, Array, Array]

    @classmethod
    def read(cls, plan, place) -> "Runs":
        """From the plan's columns, in device or shared memory."""
        at = [plan[place, column] for column in range(2, 10)]
        return cls(tuple(at[:4]), tuple(at[4:]))

    @property
    def full(self) -> Array:
        """Number of tiles without a mask."""
        return self.clean[2] - self.clean[1] + self.own[2] - self.own[1]

    @property
    def count(self) -> Array:
        """Number of all tiles."""
        return self.clean[3] - self.clean[0] + self.own[3] - self.own[0]

    def full_tile(self, step: Array) -> Array:
        """The key tile of a step below `full`."""
        begin, end = self.clean[1:3]
        return jnp.where(step < end - begin, begin + step, self.own[1] + step - (end - begin))

    def masked_tile(self, step: Array) -> tuple[Array, Array]:
        """The key tile of a step from `full` on, and whether the own interval masks it."""
        (a0, a1, a2, a3), (b0, b1, b2, _) = self.clean, self.own
        step = step - self.full
        left, clean = a1 - a0, a1 - a0 + a3 - a2
        mine = clean + b1 - b0
        tile = jnp.where(step < mine, b0 + step - clean, b2 + step - mine)
        tile = jnp.where(step < clean, a2 + step - left, tile)
        return jnp.where(step < left, a0 + step, tile), step >= clean

    def tile(self, step: Array) -> Array:
        """The key tile of any step."""
        return jnp.where(step < self.full, self.full_tile(step), self.masked_tile(step)[0])


class Halves(NamedTuple):
    """Which halves of the key tiles of its two runs a warpgroup sees."""

    clean: Array
    own: Array

    @classmethod
    def read(cls, plan, place, group: Array) -> "Halves":
        """From the plan's columns, in device or shared memory."""
        return cls(plan[place, 11 + group], plan[place, 13 + group])

    def of(self, tile: Array, own: Array) -> tuple[Array, Array]:
        """Whether it sees both halves of a tile, and if not, which one it may see."""
        cover = jnp.where(own, self.own, self.clean)
        first, begin, end = 2 * tile, cover >> 16, cover & 0xFFFF
        return (begin <= first) & (end >= first + 2), (begin > first).astype(jnp.int32)


def row_wise(x: Array) -> Array:
    """In the registers that belong to the rows of a product."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def read_rows(ref, optimized: bool = True) -> Array:
    """A value per row of a product."""
    return read(ref, plgpu.Layout.WGMMA.reduce(1), optimized)


def across(x: Array, shape: tuple[int, int]) -> Array:
    """A value per row, repeated along the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def column_index(shape: tuple[int, int]) -> Array:
    """The number of each column, in the registers of a product."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def masked(keep: Array, x: Array) -> Array:
    """x where `keep`, else 0; the barrier keeps LLVM from masking halves of packed pairs."""
    return lax.optimization_barrier(jnp.where(keep, x, 0))


def seen(bounds, own: Array, first: Array, shape: tuple[int, int]) -> Array:
    """Which scores of keys from `first` on the intervals `bounds` (4, rows) let through."""
    part = 2 * own.astype(jnp.int32)
    low, high = (read_rows(bounds.at[part + end]) for end in (0, 1))
    size = jnp.maximum(high - low, 0)
    # One comparison of unsigned numbers takes half the instructions of two.
    inside = column_index(shape) - across(low - first, shape)
    return inside.astype(jnp.uint32) < across(size, shape).astype(jnp.uint32)


def unclean(flags, some: Array, row: Array, key_tile: Array, clean) -> None:
    """Calls `clean` if a key tile holds keys that nobody sees; `some`: whether any of the row does.

    Without, no step waits for a flag out of device memory.
    """

    @pl.when(some > 0)
    def _():
        pl.when(flags[row, key_tile] > 0)(clean)


def used(flags, first: Array):
    """Reads the flags of 64 keys in device memory, `offset` after the `first` one of a tile."""
    return lambda offset: read_rows(flags.at[pl.ds(first + offset, ROWS)], optimized=False)


def zero_rows(tile, keep) -> None:
    """Zeros in the rows of a tile (64 n, H) in shared memory where `keep` (64 n,) is not positive.

    Zero times NaN is NaN: what nobody sees must not stand in a product. Both warpgroups write all
    of a tile, each the same values, so that neither waits for the other.
    """
    for first in range(0, tile.shape[0], ROWS):
        part = tile.at[pl.ds(first, ROWS)]
        held = read(part, plgpu.Layout.WGMMA)
        part[...] = jnp.where(across(keep(first) > 0, part.shape), held, 0).astype(part.dtype)
    plgpu.commit_smem()


class Stream(NamedTuple):
    """A source in device memory, its buffers, and their barriers: arrived, free again."""

    source: Any
    buffers: Any
    arrived: Any
    free: Any

    def load(self, slot: Array, key) -> None:
        """Fills a buffer."""
        plgpu.copy_gmem_to_smem(self.source.at[key], self.buffers.at[slot], self.arrived.at[slot])

    def await_free(self, step: Array, stages: int) -> Array:
        """Waits until what a buffer held `stages` steps before has been used; which buffer."""
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        return slot


def forward(
    sizes: Sizes,
    plan: QueryPlan,
    shares: Int[Array, "X R"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bounds: Int[Array, "B 4 T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and log-sum-exp; T and S are multiples of the tiles, H of 64.

    shares: `hopper_tiles.shares_of` the plan for as many heads; a thread block for each.
    The two warpgroups of a block take turns: while one computes a softmax, the other's products
    keep the tensor cores busy (the ping-pong of FlashAttention-3, Shah et al. 2024, section 3.1).
    """
    batch, queries, heads, width = q.shape
    group = heads // k.shape[2]
    scale = LOG2E / math.sqrt(sizes.width)

    items = heads * plan.columns.shape[0]

    def kernel(
        q_ref, k_ref, v_ref, bounds_ref, plan_ref, used_ref, unclean_ref, shares_ref, *scratch
    ):
        out_ref, lse_ref, q_smem, k_smem, v_smem, bounds_smem, plan_smem, lse_smem, *barriers = (
            scratch
        )
        q_here, q_free, k_here, v_here, k_free, v_free, turn = barriers
        block, group_id = lax.axis_index("block"), lax.axis_index("wg")
        rounds = rounds_of(block, items, shares.shape[0])

        def item(number):
            index = shares_ref[block, number]
            return lax.div(index, jnp.int32(heads)), lax.rem(index, jnp.int32(heads))

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def leave(buffer):
            """The output has left the place of the queries: the next but one may come."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[buffer])

        @pl.when(group_id < 2)
        def _():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            pl.when(group_id == 1)(take_turns)

            def attend(number, before):
                buffer = lax.rem(number, jnp.int32(2))
                mine, limits = q_smem.at[buffer, group_id], bounds_smem.at[buffer, group_id]
                plgpu.barrier_wait(q_here.at[buffer])
                row, tile = plan_smem[buffer, 0], plan_smem[buffer, 1]
                runs, some_unclean = Runs.read(plan_smem, buffer), plan_smem[buffer, 10]
                halves = Halves.read(plan_smem, buffer, group_id)

                def add(slot, keys, place, clean, carry):
                    """A step on the `keys` of a buffer; place: what `seen` takes, none without."""
                    acc, top, total = carry
                    here = (ROWS, keys.size)

                    def scores(ref):
                        plgpu.wgmma(ref, mine, k_smem.at[slot, keys].transpose((1, 0)))
                        take_turns()
                        return ref[...]

                    s = pl.run_scoped(scores, plgpu.ACC(here, jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    if place is not None:
                        s = jnp.where(seen(limits, *place, here), s, _MASKED)
                    higher = jnp.maximum(top, s.max(axis=1) * scale)
                    p = jnp.exp2(s * scale - across(higher, here))
                    shrink = jnp.exp2(top - higher)
                    acc *= across(shrink, acc.shape)
                    total = total * shrink + p.sum(axis=1)
                    p16 = p.astype(q.dtype)
                    acc, total, top, p16 = lax.optimization_barrier((acc, total, higher, p16))
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_here.at[slot])
                    clean()
                    plgpu.barrier_wait(turn)

                    def values(ref):
                        plgpu.wgmma(ref, p16, v_smem.at[slot, keys])

                    acc = pl.run_state(values)(plgpu.ACC.init(acc))
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc, top, total

                def arrived(step):
                    slot = lax.rem(before + step, jnp.int32(sizes.stages))
                    plgpu.barrier_wait(k_here.at[slot])
                    return slot

                def full_step(step, carry):
                    return add(arrived(step), pl.ds(0, TILE), None, lambda: None, carry)

                def masked_step(step, carry):
                    slot = arrived(step)
                    key_tile, own = runs.masked_tile(step)
                    both, part = halves.of(key_tile, own)
                    flags = used(used_ref.at[row], key_tile * TILE)
                    zeros = partial(zero_rows, v_smem.at[slot], flags)
                    clean = partial(unclean, unclean_ref, some_unclean, row, key_tile, zeros)

                    def on(first, size, carry):
                        place = own, key_tile * TILE + first
                        return add(slot, pl.ds(first, size), place, clean, carry)

                    whole, half = partial(on, 0, TILE), partial(on, part * ROWS, ROWS)
                    return lax.cond(both, whole, half, carry)

                acc = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
                top = row_wise(jnp.full((ROWS,), _FLOOR, jnp.float32))
                total = row_wise(jnp.zeros((ROWS,), jnp.float32))
                # Late, when the copies of the last output have long been under way, but before the
                # last step: in that one the second warpgroup waits for the first one's next item.
                last, bare = partial(leave, 1 - buffer), runs.full == runs.count
                pl.when((number > 0) & bare)(last)

                # For the same reason an item without steps has turns, those of one step.
                @pl.when(runs.count == 0)
                def _():
                    take_turns()
                    take_turns()

                carry = lax.fori_loop(0, runs.full, full_step, (acc, top, total))
                pl.when((number > 0) & ~bare)(last)
                acc, top, total = lax.fori_loop(runs.full, runs.count, masked_step, carry)
                some = total > 0
                factor = jnp.where(some, 1 / jnp.where(some, total, 1), 0)
                mine[...] = (acc * across(factor, acc.shape)).astype(q.dtype)
                lse = (top + jnp.log2(jnp.where(some, total, 1))) / LOG2E
                lse_smem[group_id] = jnp.where(some, lse, EMPTY)
                plgpu.commit_smem()
                # Here, so that no register holds it through the loops.
                _, head = item(number)
                at = pl.ds(tile * TILE + group_id * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(mine, out_ref.at[row, at, head])
                plgpu.copy_smem_to_gmem(lse_smem.at[group_id], lse_ref.at[row, head, at])
                return before + runs.count

            lax.fori_loop(0, rounds, attend, jnp.int32(0))
            pl.when(group_id == 0)(take_turns)
            leave(lax.rem(rounds - 1, jnp.int32(2)))

        @pl.when(group_id == 2)
        def _():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            streams = Stream(k_ref, k_smem, k_here, k_free), Stream(v_ref, v_smem, v_here, v_free)

            def load(number, before):
                buffer, (place, head) = lax.rem(number, jnp.int32(2)), item(number)
                row, tile, runs = plan_ref[place, 0], plan_ref[place, 1], Runs.read(plan_ref, place)
                pl.when(number >= 2)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
                here, columns = q_here.at[buffer], (buffer, pl.ds(0, plan.columns.shape[1]))
                plgpu.copy_gmem_to_smem(plan_ref.at[place], plan_smem.at[columns], here)
                for warpgroup in range(2):
                    at, mine = pl.ds(tile * TILE + warpgroup * ROWS, ROWS), (buffer, warpgroup)
                    plgpu.copy_gmem_to_smem(q_ref.at[row, at, head], q_smem.at[mine], here)
                    plgpu.copy_gmem_to_smem(bounds_ref.at[row, :, at], bounds_smem.at[mine], here)

                @pl.loop(0, runs.count)
                def _(step):
                    key = row, pl.ds(runs.tile(step) * TILE, TILE), lax.div(head, jnp.int32(group))
                    for stream in streams:
                        stream.load(stream.await_free(before + step, sizes.stages), key)

                return before + runs.count

            steps = lax.fori_loop(0, rounds, load, jnp.int32(0))

            # Every buffer has been freed before the block ends.
            @pl.loop(steps, steps + sizes.stages)
            def _(step):
                for stream in streams:
                    stream.await_free(step, sizes.stages)

            @pl.loop(jnp.maximum(rounds - 2, 0), rounds)
            def _(number):
                plgpu.barrier_wait(q_free.at[lax.rem(number, jnp.int32(2))])

    tile = (sizes.stages, TILE, width)
    per_stage = {"num_barriers": sizes.stages}
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ),
        scratch_types=(
            tiled((2, 2, ROWS, width), q.dtype),
            tiled(tile, q.dtype),
            tiled(tile, q.dtype),
            plgpu.SMEM((2, 2, 4, ROWS), jnp.int32),
            plgpu.SMEM((2, PLAN_ROOM), jnp.int32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=5, num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(**per_stage),
            plgpu.Barrier(**per_stage),
            plgpu.Barrier(num_arrivals=2, **per_stage),
            plgpu.Barrier(num_arrivals=2, **per_stage),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(shares.shape[0],),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        kernel_name="attention_forward",
    )(q, k, v, bounds, plan.columns, plan.used, plan.unclean, shares)
