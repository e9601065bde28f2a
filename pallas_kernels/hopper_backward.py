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
    ROWS,
    TILE,
    Halves,
    Runs,
    Sizes,
    Stream,
    across,
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


def _product(tile) -> Array:
    """A tile in shared memory in the registers of a product, float32."""
    return read(tile, plgpu.Layout.WGMMA).astype(jnp.float32)


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
    out: Float[Array, "B T N H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_lse: Float[Array, "B N T"],
    bounds: Int[Array, "B 4 T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N 2 T"]]:
    """dQ, and what dK and dV need of each query: its log-sum-exp in base 2, and delta.

    Blocks start with the most work first: a long one that starts late would leave the chip waiting.
    """
    columns = plan.columns[plan.order]
    heads, width = q.shape[2:]
    group = heads // k.shape[2]
    scale = LOG2E / math.sqrt(sizes.width)

    def kernel(q_ref, k_ref, v_ref, out_ref, d_out_ref, lse_ref, d_lse_ref, bounds_ref, *refs):
        plan_ref, used_ref, unclean_ref, d_q_ref, stats_ref, *refs = refs
        q_smem, d_out_smem, k_smem, v_smem, stats_smem, bounds_smem, *barriers = refs
        out_here, q_here, k_here, v_here, k_free, v_free = barriers
        head, place, group_id = (lax.axis_index(name) for name in ("heads", "tiles", "wg"))
        row, tile = plan_ref[place, 0], plan_ref[place, 1]
        runs, some_unclean = Runs.read(plan_ref, place), plan_ref[place, 10]

        @pl.when(group_id < 2)
        def _():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            halves = Halves.read(plan_ref, place, group_id)
            mine, d_mine = q_smem.at[group_id], d_out_smem.at[group_id]
            at = pl.ds(tile * TILE + group_id * ROWS, ROWS)
            stats, here = stats_smem.at[group_id], out_here.at[group_id]
            # The output first takes the place of the queries: delta is all that is needed of it.
            plgpu.copy_gmem_to_smem(out_ref.at[row, at, head], mine, here)
            plgpu.copy_gmem_to_smem(d_out_ref.at[row, at, head], d_mine, here)
            plgpu.copy_gmem_to_smem(lse_ref.at[row, head, at], stats.at[0], here)
            plgpu.copy_gmem_to_smem(d_lse_ref.at[row, head, at], stats.at[1], here)
            plgpu.copy_gmem_to_smem(bounds_ref.at[row, :, at], bounds_smem.at[group_id], here)
            plgpu.barrier_wait(here)
            product = _product(mine) * _product(d_mine)
            lse = read_rows(stats.at[0]) * LOG2E
            delta = product.sum(axis=1) - read_rows(stats.at[1])
            stats[0] = lse
            stats[1] = delta
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stats, stats_ref.at[row, head, :, at])
            plgpu.copy_gmem_to_smem(q_ref.at[row, at, head], mine, q_here.at[group_id])
            plgpu.barrier_wait(q_here.at[group_id])

            def add(slot, keys, place, d_q):
                """A step on the `keys` of a buffer; place: what `seen` takes, none without mask."""
                here = (ROWS, keys.size)
                my_k, my_v = k_smem.at[slot, keys], v_smem.at[slot, keys]

                def scores(s_ref, d_p_ref):
                    plgpu.wgmma(s_ref, mine, my_k.transpose((1, 0)))
                    plgpu.wgmma(d_p_ref, d_mine, my_v.transpose((1, 0)))
                    p = jnp.exp2(_first(s_ref) * scale - across(lse, here))
                    return p, d_p_ref[...]

                accumulator = plgpu.ACC(here, jnp.float32)
                p, d_p = pl.run_scoped(scores, accumulator, accumulator)
                plgpu.barrier_arrive(v_free.at[slot])
                d_s = p * (d_p - across(delta, here))
                if place is not None:
                    d_s = masked(seen(bounds_smem.at[group_id], *place, here), d_s)
                d_s = d_s.astype(q.dtype)

                def products(ref):
                    plgpu.wgmma(ref, d_s, my_k)

                d_q = pl.run_state(products)(plgpu.ACC.init(d_q))
                plgpu.barrier_arrive(k_free.at[slot])
                return d_q

            def arrived(number):
                slot = lax.rem(number, jnp.int32(sizes.stages))
                plgpu.barrier_wait(k_here.at[slot])
                plgpu.barrier_wait(v_here.at[slot])
                return slot

            def step(number, d_q):
                return add(arrived(number), pl.ds(0, TILE), None, d_q)

            def masked_step(number, d_q):
                slot = arrived(number)
                key_tile, own = runs.masked_tile(number)
                both, part = halves.of(key_tile, own)
                # A branch any later would keep a predicate for every score across itself.
                keys = used(used_ref.at[row], key_tile * TILE)
                clean = partial(zero_rows, k_smem.at[slot], keys)
                unclean(unclean_ref, some_unclean, row, key_tile, clean)

                def on(first, size, d_q):
                    place = own, key_tile * TILE + first
                    return add(slot, pl.ds(first, size), place, d_q)

                return lax.cond(both, partial(on, 0, TILE), partial(on, part * ROWS, ROWS), d_q)

            d_q = lax.fori_loop(0, runs.full, step, _zeros((ROWS, width)))
            d_q = lax.fori_loop(runs.full, runs.count, masked_step, d_q)
            mine[...] = (d_q * (1 / math.sqrt(sizes.width))).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, d_q_ref.at[row, at, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(group_id == 2)
        def _():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            streams = Stream(k_ref, k_smem, k_here, k_free), Stream(v_ref, v_smem, v_here, v_free)

            # The last `stages` steps load nothing: they see every buffer freed.
            @pl.loop(0, runs.count + sizes.stages)
            def _(step):
                key = row, pl.ds(runs.tile(step) * TILE, TILE), lax.div(head, jnp.int32(group))
                for stream in streams:
                    slot = stream.await_free(step, sizes.stages)
                    pl.when(step < runs.count)(partial(stream.load, slot, key))

    tile, per_stage = (sizes.stages, TILE, width), {"num_barriers": sizes.stages}
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*lse.shape[:2], 2, lse.shape[2]), jnp.float32),
        ),
        scratch_types=(
            *[tiled((2, ROWS, width), q.dtype)] * 2,
            *[tiled(tile, q.dtype)] * 2,
            plgpu.SMEM((2, 2, ROWS), jnp.float32),
            plgpu.SMEM((2, 4, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=5, num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            *[plgpu.Barrier(**per_stage)] * 2,
            *[plgpu.Barrier(num_arrivals=2, **per_stage)] * 2,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(heads, columns.shape[0]),
        grid_names=("heads", "tiles"),
        num_threads=3,
        thread_name="wg",
        kernel_name="attention_d_queries",
    )(q, k, v, out, d_out, lse, d_lse, bounds, columns, plan.used, plan.unclean)


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

    def kernel(*refs):
        (q_ref, k_ref, v_ref, d_out_ref, stats_ref, bounds_ref, plan_ref, list_ref), refs = (
            refs[:8],
            refs[8:],
        )
        d_k_ref, d_v_ref, k_smem, v_smem, q_smem, d_out_smem, stats_smem, bounds_smem, *refs = refs
        k_here, q_here, d_out_here, q_free, d_out_free = refs
        kv_head, place, group_id = (lax.axis_index(name) for name in ("heads", "tiles", "wg"))
        row, tile, full, count = (plan_ref[place, column] for column in range(4))

        @pl.when(group_id < 2)
        def _():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            my_k, my_v = k_smem.at[group_id], v_smem.at[group_id]
            first = tile * TILE + group_id * ROWS
            at = pl.ds(first, ROWS)
            here = k_here.at[group_id]
            plgpu.copy_gmem_to_smem(k_ref.at[row, at, kv_head], my_k, here)
            plgpu.copy_gmem_to_smem(v_ref.at[row, at, kv_head], my_v, here)
            plgpu.barrier_wait(here)

            def step(number, carry, whole):
                slot = lax.rem(number, jnp.int32(sizes.stages))
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
            carry = lax.fori_loop(
                full * group, count * group, lambda n, c: step(n, c, False), carry
            )
            d_k, d_v = carry
            my_k[...] = (d_k * (1 / math.sqrt(sizes.width))).astype(q.dtype)
            my_v[...] = d_v.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(my_k, d_k_ref.at[row, at, kv_head])
            plgpu.copy_smem_to_gmem(my_v, d_v_ref.at[row, at, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(group_id == 2)
        def _():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            @pl.loop(0, count * group + sizes.stages)
            def _(number):
                slot = lax.rem(number, jnp.int32(sizes.stages))
                # Before the wait for a buffer, which hides it.
                last = jnp.maximum(count * group - 1, 0)
                entry = list_ref[place, lax.div(jnp.minimum(number, last), jnp.int32(group))]

                @pl.when(number >= sizes.stages)
                def _():
                    plgpu.barrier_wait(q_free.at[slot])
                    plgpu.barrier_wait(d_out_free.at[slot])

                @pl.when(number < count * group)
                def _():
                    head = kv_head * group + lax.rem(number, jnp.int32(group))
                    at = pl.ds((entry >> FLAGS) * ROWS, ROWS)
                    part = pl.ds((entry & OWN) * 2, 2)
                    arrived = q_here.at[slot]
                    plgpu.copy_gmem_to_smem(q_ref.at[row, at, head], q_smem.at[slot], arrived)
                    plgpu.copy_gmem_to_smem(
                        stats_ref.at[row, head, :, at], stats_smem.at[slot], arrived
                    )
                    plgpu.copy_gmem_to_smem(
                        bounds_ref.at[row, part, at], bounds_smem.at[slot], arrived
                    )
                    plgpu.copy_gmem_to_smem(
                        d_out_ref.at[row, at, head], d_out_smem.at[slot], d_out_here.at[slot]
                    )

    tile, per_stage = (sizes.stages, ROWS, width), {"num_barriers": sizes.stages}
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
        scratch_types=(
            *[tiled((2, ROWS, width), q.dtype)] * 2,
            *[tiled(tile, q.dtype)] * 2,
            plgpu.SMEM((sizes.stages, 2, ROWS), jnp.float32),
            plgpu.SMEM((sizes.stages, 2, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=3, **per_stage),
            plgpu.Barrier(**per_stage),
            *[plgpu.Barrier(num_arrivals=2, **per_stage)] * 2,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(kv_heads, plan.columns.shape[0]),
        grid_names=("heads", "tiles"),
        num_threads=3,
        thread_name="wg",
        kernel_name="attention_d_keys",
    )(q, k, v, d_out, stats, bounds, plan.columns, plan.entries)
