"""Attention backward on Hopper: dQ by query tiles, dK and dV by key tiles; no atomics.

With P = exp(S - lse): dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q, where delta
is rowsum(dO * O) - dlse. Both kernels compute P again: sums stay in one order, equal bit by bit.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper_forward import (
    LOADER_REGISTERS,
    LOG2E,
    MATH_REGISTERS,
    PLAN_ROOM,
    ROWS,
    TILE,
    Halves,
    Runs,
    Share,
    Sizes,
    Stream,
    across,
    divide,
    load_keys,
    masked,
    read_rows,
    seen,
    unclean,
    used,
    zero_rows,
)
from pallas_kernels.hopper_product import read, tiled
from pallas_kernels.hopper_tiles import (
    FIRST_HALF,
    FLAGS,
    IDLE,
    OWN,
    SECOND_HALF,
    KeyPlan,
    QueryPlan,
)


def _zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _columns(ref) -> Array:
    """A value per column of a product."""
    return read(ref, plgpu.Layout.WGMMA.reduce(0))


def _down(x: Array, shape: tuple[int, int]) -> Array:
    """A value per column, repeated along the rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def _first(accumulator) -> Array:
    """The first of two products in flight, without waiting for the second where jax can tell."""
    peek = getattr(plgpu, "wgmma_accumulator_load", None)
    return accumulator[...] if peek is None else peek(accumulator, wait_n=1)


def backward_queries(
    sizes: Sizes,
    plan: QueryPlan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    stats: Float[Array, "B N 2 T"],
    bounds: Int[Array, "B 4 T"],
) -> Float[Array, "B T N H"]:
    """dQ, out of each query's log-sum-exp in base 2 and its delta; steps of 64 keys."""
    heads, width = q.shape[2:]
    group = heads // k.shape[2]
    scale = LOG2E / math.sqrt(sizes.width)
    shape = (ROWS, sizes.key)
    share = Share(heads, plan.columns.shape[0])

    def kernel(q_ref, k_ref, v_ref, d_out_ref, stats_ref, bounds_ref, plan_ref, *refs):
        used_ref, unclean_ref, d_q_ref, q_smem, d_out_smem, k_smem, v_smem, *refs = refs
        stats_smem, bounds_smem, plan_smem, q_here, q_free, k_here, v_here, k_free, v_free = refs
        group_id = lax.axis_index("wg")

        def leave(buffer):
            """dQ has left the place of the queries: the next but one may come."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[buffer])

        @pl.when(group_id < 2)
        def _():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")

            def add_up(number, before):
                buffer = lax.rem(number, jnp.int32(2))
                mine, d_mine = q_smem.at[buffer, group_id], d_out_smem.at[buffer, group_id]
                plgpu.barrier_wait(q_here.at[buffer])
                row, tile = plan_smem[buffer, 0], plan_smem[buffer, 1]
                runs, some_unclean = Runs.read(plan_smem, buffer), plan_smem[buffer, 10]
                halves = Halves.read(plan_smem, buffer, group_id)
                lse, delta = (read_rows(stats_smem.at[buffer, group_id, i]) for i in range(2))

                def add(slot, place, d_q):
                    """A step on a buffer; place: what `seen` takes, none without a mask."""

                    def scores(s_ref, d_p_ref):
                        plgpu.wgmma(s_ref, mine, k_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma(d_p_ref, d_mine, v_smem.at[slot].transpose((1, 0)))
                        p = jnp.exp2(_first(s_ref) * scale - across(lse, shape))
                        return p, d_p_ref[...]

                    accumulator = plgpu.ACC(shape, jnp.float32)
                    p, d_p = pl.run_scoped(scores, accumulator, accumulator)
                    plgpu.barrier_arrive(v_free.at[slot])
                    d_s = p * (d_p - across(delta, shape))
                    if place is not None:
                        d_s = masked(seen(bounds_smem.at[buffer, group_id], *place, shape), d_s)
                    d_s = d_s.astype(q.dtype)

                    def products(ref):
                        plgpu.wgmma(ref, d_s, k_smem.at[slot])

                    d_q = pl.run_state(products)(plgpu.ACC.init(d_q))
                    plgpu.barrier_arrive(k_free.at[slot])
                    return d_q

                def arrived(step):
                    slot = lax.rem(before + step, jnp.int32(sizes.stages))
                    plgpu.barrier_wait(k_here.at[slot])
                    plgpu.barrier_wait(v_here.at[slot])
                    return slot

                def masked_step(step, d_q):
                    slot = arrived(step)
                    number, part = divide(step, sizes.parts)
                    key_tile, own = runs.masked_tile(number)
                    first = key_tile * TILE + part * sizes.key
                    # A branch any later would keep a predicate for every score across itself.
                    zeros = partial(zero_rows, k_smem.at[slot], used(used_ref.at[row], first))
                    unclean(unclean_ref, some_unclean, row, key_tile, zeros)

                    def skip(d_q):
                        plgpu.barrier_arrive(v_free.at[slot])
                        plgpu.barrier_arrive(k_free.at[slot])
                        return d_q

                    both, only = halves.of(key_tile, own)
                    sees = both | (only == part)
                    return lax.cond(sees, partial(add, slot, (own, first)), skip, d_q)

                full, count = (sizes.parts * x for x in (runs.full, runs.count))
                d_q = lax.fori_loop(
                    0, full, lambda n, d_q: add(arrived(n), None, d_q), _zeros((ROWS, width))
                )
                # Late, when the copies of the last dQ have long been under way.
                pl.when(number > 0)(lambda: leave(1 - buffer))
                d_q = lax.fori_loop(full, count, masked_step, d_q)
                mine[...] = (d_q * (1 / math.sqrt(sizes.width))).astype(q.dtype)
                plgpu.commit_smem()
                at = pl.ds(tile * TILE + group_id * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(mine, d_q_ref.at[row, at, share.item(number)[0]])
                return before + count

            lax.fori_loop(0, share.rounds, add_up, jnp.int32(0))
            leave(lax.rem(share.rounds - 1, jnp.int32(2)))

        @pl.when(group_id == 2)
        def _():
            def load_queries(buffer, row, tile, head, place):
                here, columns = q_here.at[buffer], (buffer, pl.ds(0, plan.columns.shape[1]))
                plgpu.copy_gmem_to_smem(plan_ref.at[place], plan_smem.at[columns], here)
                for warpgroup in range(2):
                    at, mine = pl.ds(tile * TILE + warpgroup * ROWS, ROWS), (buffer, warpgroup)
                    for source, target in (
                        (q_ref.at[row, at, head], q_smem),
                        (d_out_ref.at[row, at, head], d_out_smem),
                        (stats_ref.at[row, head, :, at], stats_smem),
                        (bounds_ref.at[row, :, at], bounds_smem),
                    ):
                        plgpu.copy_gmem_to_smem(source, target.at[mine], here)

            load_keys(
                sizes,
                share,
                plan_ref,
                group,
                load_queries,
                q_free,
                Stream(k_ref, k_smem, k_here, k_free),
                Stream(v_ref, v_smem, v_here, v_free),
            )

    tile, per_stage = (sizes.stages, sizes.key, width), {"num_barriers": sizes.stages}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            *[tiled((2, 2, ROWS, width), q.dtype)] * 2,
            *[tiled(tile, q.dtype)] * 2,
            plgpu.SMEM((2, 2, 2, ROWS), jnp.float32),
            plgpu.SMEM((2, 2, 4, ROWS), jnp.int32),
            plgpu.SMEM((2, PLAN_ROOM), jnp.int32),
            plgpu.Barrier(num_arrivals=9, num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            *[plgpu.Barrier(**per_stage)] * 2,
            *[plgpu.Barrier(num_arrivals=2, **per_stage)] * 2,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(share.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        kernel_name="attention_d_queries",
    )(q, k, v, d_out, stats, bounds, *plan)


def backward_keys(
    sizes: Sizes,
    plan: KeyPlan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    stats: Float[Array, "B N 2 T"],
    bounds: Int[Array, "B 4 T"],
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """dK and dV, summed over the heads of a group; query tiles are of 64."""
    kv_heads, width = k.shape[2:]
    group = q.shape[2] // kv_heads
    scale = LOG2E / math.sqrt(sizes.width)
    shape = (ROWS, ROWS)
    share = Share(kv_heads, plan.columns.shape[0])

    def kernel(q_ref, k_ref, v_ref, d_out_ref, stats_ref, bounds_ref, plan_ref, list_ref, *refs):
        d_k_ref, d_v_ref, k_smem, v_smem, q_smem, d_out_smem, stats_smem, bounds_smem, *refs = refs
        plan_smem, k_here, k_free, q_here, d_out_here, q_free, d_out_free = refs
        group_id = lax.axis_index("wg")

        def leave(buffer):
            """dK and dV have left the place of the keys and values: the next but one may come."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(k_free.at[buffer])

        @pl.when(group_id < 2)
        def _():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")

            def add_up(number, before):
                buffer, (kv_head, place) = lax.rem(number, jnp.int32(2)), share.item(number)
                my_k, my_v = k_smem.at[buffer, group_id], v_smem.at[buffer, group_id]
                plgpu.barrier_wait(k_here.at[buffer])
                row, tile, full, count = (plan_smem[buffer, column] for column in range(4))
                first = tile * TILE + group_id * ROWS

                def step(number, carry, whole):
                    slot = lax.rem(before + number, jnp.int32(sizes.stages))
                    queries, d_outs = q_smem.at[slot], d_out_smem.at[slot]
                    if not whole:
                        entry = list_ref[place, lax.div(number, jnp.int32(group))]
                    plgpu.barrier_wait(q_here.at[slot])
                    plgpu.barrier_wait(d_out_here.at[slot])

                    def add(carry):
                        if not whole:
                            low, high = (_columns(bounds_smem.at[slot, i]) for i in range(2))
                            key = first + plgpu.broadcasted_iota(
                                jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA
                            )
                            keep = (key >= _down(low, shape)) & (key < _down(high, shape))

                            @pl.when(entry & IDLE != 0)
                            def _():
                                own = bounds_smem.at[slot]
                                for tile in (queries, d_outs):
                                    zero_rows(
                                        tile, lambda _: read_rows(own.at[1]) - read_rows(own.at[0])
                                    )

                        def products(s_ref, d_p_ref):
                            plgpu.wgmma(s_ref, my_k, queries.transpose((1, 0)))
                            plgpu.wgmma(d_p_ref, my_v, d_outs.transpose((1, 0)))
                            lse = _down(_columns(stats_smem.at[slot, 0]), shape)
                            p = jnp.exp2(_first(s_ref) * scale - lse)
                            if not whole:
                                p = jnp.where(keep, p, 0)
                            p16 = p.astype(q.dtype)

                            def sums(accumulators):
                                d_k, d_v = accumulators
                                # Under way while dS is computed.
                                plgpu.wgmma(d_v, p16, d_outs)
                                delta = _down(_columns(stats_smem.at[slot, 1]), shape)
                                d_s = p * (_first(d_p_ref) - delta)
                                if not whole:
                                    d_s = jnp.where(keep, d_s, 0)
                                plgpu.wgmma(d_k, d_s.astype(q.dtype), queries)

                            return pl.run_state(sums)(tuple(plgpu.ACC.init(x) for x in carry))

                        accumulator = plgpu.ACC(shape, jnp.float32)
                        return pl.run_scoped(products, accumulator, accumulator)

                    if not whole:
                        mine = jnp.where(group_id == 0, FIRST_HALF, SECOND_HALF)
                        carry = lax.cond(entry & mine != 0, add, lambda carry: carry, carry)
                    else:
                        carry = add(carry)
                    plgpu.barrier_arrive(q_free.at[slot])
                    plgpu.barrier_arrive(d_out_free.at[slot])
                    return carry

                carry = (_zeros((ROWS, width)),) * 2
                carry = lax.fori_loop(0, full * group, lambda n, c: step(n, c, True), carry)
                # Late, when the copies of the last sums have long been under way.
                pl.when(number > 0)(lambda: leave(1 - buffer))
                d_k, d_v = lax.fori_loop(
                    full * group, count * group, lambda n, c: step(n, c, False), carry
                )
                my_k[...] = (d_k * (1 / math.sqrt(sizes.width))).astype(q.dtype)
                my_v[...] = d_v.astype(q.dtype)
                plgpu.commit_smem()
                at = pl.ds(first, ROWS)
                plgpu.copy_smem_to_gmem(my_k, d_k_ref.at[row, at, kv_head])
                plgpu.copy_smem_to_gmem(my_v, d_v_ref.at[row, at, kv_head])
                return before + count * group

            lax.fori_loop(0, share.rounds, add_up, jnp.int32(0))
            leave(lax.rem(share.rounds - 1, jnp.int32(2)))

        @pl.when(group_id == 2)
        def _():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def load(number, before):
                buffer, (kv_head, place) = lax.rem(number, jnp.int32(2)), share.item(number)
                row, tile, count = plan_ref[place, 0], plan_ref[place, 1], plan_ref[place, 3]
                pl.when(number >= 2)(lambda: plgpu.barrier_wait(k_free.at[buffer]))
                here, columns = k_here.at[buffer], (buffer, pl.ds(0, plan.columns.shape[1]))
                plgpu.copy_gmem_to_smem(plan_ref.at[place], plan_smem.at[columns], here)
                for warpgroup in range(2):
                    at = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
                    for source, target in ((k_ref, k_smem), (v_ref, v_smem)):
                        plgpu.copy_gmem_to_smem(
                            source.at[row, at, kv_head], target.at[buffer, warpgroup], here
                        )

                @pl.loop(0, count * group)
                def _(step):
                    entry_number, head = divide(step, group)
                    # Before the wait for a buffer, which hides it.
                    entry, head = list_ref[place, entry_number], kv_head * group + head
                    slot = lax.rem(before + step, jnp.int32(sizes.stages))

                    @pl.when(before + step >= sizes.stages)
                    def _():
                        plgpu.barrier_wait(q_free.at[slot])
                        plgpu.barrier_wait(d_out_free.at[slot])

                    at = pl.ds((entry >> FLAGS) * ROWS, ROWS)
                    part, arrived = pl.ds((entry & OWN) * 2, 2), q_here.at[slot]
                    for source, target, here in (
                        (q_ref.at[row, at, head], q_smem, arrived),
                        (stats_ref.at[row, head, :, at], stats_smem, arrived),
                        (bounds_ref.at[row, part, at], bounds_smem, arrived),
                        (d_out_ref.at[row, at, head], d_out_smem, d_out_here.at[slot]),
                    ):
                        plgpu.copy_gmem_to_smem(source, target.at[slot], here)

                return before + count * group

            count = lax.fori_loop(0, share.rounds, load, jnp.int32(0))

            # Every buffer has been freed before the block ends.
            @pl.loop(count, count + sizes.stages)
            def _(step):
                slot = lax.rem(step, jnp.int32(sizes.stages))

                @pl.when(step >= sizes.stages)
                def _():
                    plgpu.barrier_wait(q_free.at[slot])
                    plgpu.barrier_wait(d_out_free.at[slot])

            @pl.loop(jnp.maximum(share.rounds - 2, 0), share.rounds)
            def _(number):
                plgpu.barrier_wait(k_free.at[lax.rem(number, jnp.int32(2))])

    tile, per_stage = (sizes.stages, ROWS, width), {"num_barriers": sizes.stages}
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
        scratch_types=(
            *[tiled((2, 2, ROWS, width), q.dtype)] * 2,
            *[tiled(tile, q.dtype)] * 2,
            plgpu.SMEM((sizes.stages, 2, ROWS), jnp.float32),
            plgpu.SMEM((sizes.stages, 2, ROWS), jnp.int32),
            plgpu.SMEM((2, PLAN_ROOM), jnp.int32),
            plgpu.Barrier(num_arrivals=5, num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=3, **per_stage),
            plgpu.Barrier(**per_stage),
            *[plgpu.Barrier(num_arrivals=2, **per_stage)] * 2,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(share.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        kernel_name="attention_d_keys",
    )(q, k, v, d_out, stats, bounds, plan.columns, plan.entries)
