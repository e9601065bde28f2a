"""Attention of a short window over one layer of a stacked cache on a Hopper GPU (Pallas, Mosaic).

Reading the cache is what a window costs. The query heads of a KV head stand side by side as rows of
one product, so each key is read once, and the keys that a row of the batch sees are cut into
chunks, so that few rows fill the chip too. A chunk's own warpgroup keeps `stages` tiles of keys and
values in flight by TMA; others compute (Dao 2023, "Flash-Decoding"). Chunks leave normalised
outputs and log-sum-exps, merged by XLA.

A chunk is data: a row of a table made from the intervals, so short rows take few chunks and a chunk
reads only tiles that some query sees. Its tiles that all queries see in whole come first, without a
mask; in the others, values that nobody sees become zeros in shared memory, since a weight of zero
does not silence a NaN.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu_chunks import Chunks, chunk_counts, cut
from pallas_kernels.hopper_product import tiled
from pallas_kernels.intervals import Intervals
from pallas_kernels.merge import EMPTY
from pallas_kernels.padding import pad
from pallas_kernels.quiet import nothing

_QUERIES = 256
# Queries and heads of a KV head that a warpgroup takes: the rows of a wgmma.
_ROWS = 64
_LOG2E = math.log2(math.e)

# Registers of a thread, by how many warpgroups compute: what a block starts with (240, 168 and 128
# a thread) and the copying warpgroup gives up. Four would get 112, too few for their products.
_REGISTERS = {1: 240, 2: 240, 3: 160}
_COPY_REGISTERS = 24

# Of a thread block, less what bounds, barriers and reductions take.
_SHARED_BYTES = 232448 - 8192


@dataclass(frozen=True, kw_only=True)
class WindowSizes:
    """key_tile: slots a copy; None: 128, or 64 where heads of 256 leave no room for two stages.
    stages: copies of keys, and of values, in flight; None: what fits.

    warpgroups: that compute, 64 rows each, at most. blocks: thread blocks that fill the chip once
    (an H100 has 132 multiprocessors).
    """

    key_tile: int | None = None
    stages: int | None = None
    warpgroups: int = 2
    blocks: int = 132

    def __post_init__(self):
        if self.key_tile is not None and (self.key_tile < 64 or self.key_tile % 64):
            raise ValueError(f"key_tile={self.key_tile} must be a multiple of 64; type key_tile=64")
        if not 1 <= self.warpgroups <= len(_REGISTERS):
            raise ValueError(f"warpgroups={self.warpgroups} must be 1 to 3; type warpgroups=2")
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"stages={self.stages} must be at least 1; type stages=2")
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be at least 1; type blocks=132")


def window_attention(
    q: Float[Array, "B T N H"],
    cache_k: Float[Array, "L B K S H"],
    cache_v: Float[Array, "L B K S H"],
    layer: Int[Array, ""],
    intervals: Intervals,
    *,
    sizes: WindowSizes | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`Dense.prefix_attention` for a window of up to 256 queries, forward only.

    No layer of the cache is ever copied. Raises NotImplementedError for more queries, other types
    than bfloat16 and float16 or two of them, other head_dims than 64, 128 and 256, and a number of
    slots that is no multiple of eight.
    """
    batch, length, heads, width = q.shape
    layers, _, kv_heads, slots, _ = cache_k.shape
    if 0 in q.shape or slots == 0:
        return nothing(q)
    _refuse(q, cache_k, cache_v)
    group = heads // kv_heads
    sizes = sizes or WindowSizes()
    plan = _Plan.of(sizes, group * length, width, q.dtype.itemsize)
    # Rows are (query, head of the group), padded to whole tiles with queries that see nothing.
    folded = q.reshape(batch, length, kv_heads, group * width).swapaxes(1, 2)
    folded = pad(folded.reshape(batch, kv_heads, length * group, width), 2, plan.block)
    bounds = pad(jnp.repeat(jnp.stack(intervals, axis=1), group, axis=2), 2, plan.block)
    key_tiles = -(-slots // plan.key_tile)
    total, most = chunk_counts(
        batch, kv_heads * (folded.shape[2] // plan.block), key_tiles, sizes.blocks
    )
    chunks = cut(intervals, plan.key_tile, total, most, key_tiles)
    head = (layer.astype(jnp.int32) * batch + chunks.row) * kv_heads
    table = jnp.stack([head, *chunks[:8]], axis=1).astype(jnp.int32)
    flat = (layers * batch * kv_heads, slots, width)
    parts, logs = _call(
        plan, group, table, bounds.astype(jnp.int32), folded,
        cache_k.reshape(flat), cache_v.reshape(flat),
    )  # fmt: skip
    out, lse = _merged(parts, logs, chunks, most)
    out, lse = out[:, :, : length * group].astype(q.dtype), lse[:, :, : length * group]

    def unfold(x):
        x = x.reshape(batch, kv_heads, length, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(batch, length, heads, *x.shape[4:])

    return unfold(out), unfold(lse)


def _refuse(q, cache_k, cache_v) -> None:
    length, width, slots = q.shape[1], q.shape[3], cache_k.shape[3]
    reason = None
    if q.dtype not in (jnp.bfloat16, jnp.float16) or {cache_k.dtype, cache_v.dtype} != {q.dtype}:
        reason = (
            "takes queries and cache of one type, bfloat16 or float16, not "
            f"{q.dtype}, {cache_k.dtype} and {cache_v.dtype}"
        )
    elif width not in (64, 128, 256):
        reason = f"serves head_dim 64, 128 and 256, not {width}"
    elif length > _QUERIES:
        reason = f"holds all queries at once: up to {_QUERIES}, not {length}"
    elif slots % 8:
        reason = f"copies slots in eights, not {slots}; give a cache slots in eights"
    if reason:
        raise NotImplementedError(f"the GPU window kernel {reason}; use Blockwise(key_tile=4096)")


def _merged(parts, logs, chunks: Chunks, most: int):
    """Outputs (B, K, R, H) and log-sum-exps (B, K, R) of all chunks of a row, in their order."""
    batch = chunks.start.shape[0]
    total = parts.shape[0]
    if total == batch == 1:
        return parts, logs
    parts, logs = parts[None], logs[None]
    if batch > 1:
        nth = jnp.arange(most)
        at = jnp.minimum(chunks.start[:, None] + nth, total - 1)
        there = (nth < chunks.chunks[:, None])[:, :, None, None]
        parts, logs = parts[0][at], jnp.where(there, logs[0][at], EMPTY)
        # A chunk of another row may hold a NaN.
        parts = jnp.where(there[..., None], parts, 0)
    top = logs.max(axis=1, keepdims=True)
    weights = jnp.exp(logs - top)
    sums = weights.sum(axis=1)
    out = (parts * (weights / sums[:, None])[..., None]).sum(axis=1)
    top = top[:, 0]
    return out, jnp.where(top > EMPTY / 2, top + jnp.log(sums), EMPTY)


class _Plan(NamedTuple):
    """Static sizes of one kernel: warpgroups that compute, key tile and stages."""

    warpgroups: int
    key_tile: int
    stages: int

    @property
    def block(self) -> int:
        """Rows of a thread block."""
        return self.warpgroups * _ROWS

    @classmethod
    def of(cls, sizes: WindowSizes, rows: int, width: int, itemsize: int) -> "_Plan":
        """For `rows` queries and heads of a KV head: no more warpgroups than they fill, nor more
        than leave room for two stages.
        """
        tile = sizes.key_tile or (128 if width <= 128 else 64)
        for warpgroups in range(min(sizes.warpgroups, -(-rows // _ROWS)), 0, -1):
            left = _SHARED_BYTES - warpgroups * _ROWS * width * itemsize
            fit = left // (2 * tile * width * itemsize)
            if fit >= 2:
                return cls(warpgroups, tile, min(sizes.stages or fit, fit))
        raise NotImplementedError(
            f"two stages of {tile} keys of {width} exceed shared memory beside {_ROWS} "
            "rows of queries; use a smaller key_tile"
        )


def _call(plan: _Plan, group: int, table, bounds, q, cache_k, cache_v):
    """Per chunk: outputs (C, K, R, H) and log-sum-exps (C, K, R) in float32."""
    _, kv_heads, padded, width = q.shape
    total = table.shape[0]

    def entry(*refs):
        pl.run_scoped(
            partial(_kernel, plan, group, *refs),
            tiled((plan.warpgroups, _ROWS, width), q.dtype),
            tiled((plan.stages, plan.key_tile, width), q.dtype),
            tiled((plan.stages, plan.key_tile, width), q.dtype),
            plgpu.SMEM((plan.warpgroups, 4, _ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=plan.warpgroups),
            (plgpu.Barrier(num_barriers=plan.stages),) * 2,
            (plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),) * 2,
            (plgpu.Barrier(num_arrivals=plan.warpgroups),) * 2,
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct((total, kv_heads, padded, width), jnp.float32),
            jax.ShapeDtypeStruct((total, kv_heads, padded), jnp.float32),
        ],
        grid=(total, kv_heads, padded // plan.block),
        grid_names=("chunk", "kv_head", "row_tile"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="attention_window",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(table, bounds, q, cache_k, cache_v)


class _Chunk(NamedTuple):
    """A row of the table, as scalars."""

    head: Int[Array, ""]
    row: Int[Array, ""]
    begin: Int[Array, ""]
    count: Int[Array, ""]
    full: Int[Array, ""]
    full_count: Int[Array, ""]
    some_low: Int[Array, ""]
    some_high: Int[Array, ""]
    others: Int[Array, ""]

    def tile(self, step):
        """Full tiles first, then those before and behind them."""
        other = self.begin + step - self.full_count
        other = other + jnp.where(other >= self.full, self.full_count, 0)
        return jnp.where(step < self.full_count, self.full + step, other)


def _kernel(
    plan, group, table, bounds, q, cache_k, cache_v, out, lse,
    q_own, k_tiles, v_tiles, own_bounds, own_ready, ready, used, meet,
):  # fmt: skip
    """One chunk of one KV head under one tile of rows."""
    at, head = lax.axis_index("chunk"), lax.axis_index("kv_head")
    warpgroup = lax.axis_index("warpgroup")
    chunk = _Chunk(*(table[at, field] for field in range(len(_Chunk._fields))))

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        _copy(plan, chunk, chunk.head + head, (cache_k, cache_v), (k_tiles, v_tiles), ready, used)

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(_REGISTERS[plan.warpgroups], action="increase")
        first = lax.axis_index("row_tile") * plan.block + warpgroup * _ROWS
        own = (head, pl.ds(first, _ROWS))
        there = own_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[chunk.row, *own], q_own.at[warpgroup], there)
        plgpu.copy_gmem_to_smem(
            bounds.at[chunk.row, :, pl.ds(first, _ROWS)], own_bounds.at[warpgroup], there
        )
        plgpu.barrier_wait(there)
        seen = _Seen(chunk, bounds.at[chunk.row], own_bounds.at[warpgroup], group)
        total, top, sums = _attend(
            plan, chunk, seen, q_own.at[warpgroup], k_tiles, v_tiles, ready, used, meet
        )
        none = (sums == 0) | seen.nothing()
        safe = jnp.where(none, 1.0, sums)
        share = total * lax.broadcast_in_dim(1 / safe, total.shape, [0])
        empty = lax.broadcast_in_dim(none, total.shape, [0])
        out[at, *own] = jnp.where(empty, jnp.zeros_like(share), share)
        lse[at, *own] = jnp.where(none, EMPTY, top / _LOG2E + jnp.log(safe))


def _copy(plan: _Plan, chunk: _Chunk, head, caches, tiles, ready, used) -> None:
    """Keeps tiles of keys and values on their way; ends when all were used."""

    def step(i, wait: bool, issue: bool):
        stage = lax.rem(i, plan.stages)
        at = (head, pl.ds(chunk.tile(i) * plan.key_tile, plan.key_tile))
        for cache, tile, there, free in zip(caches, tiles, ready, used, strict=True):
            if wait:
                plgpu.barrier_wait(free.at[stage])
            if issue:
                plgpu.copy_gmem_to_smem(cache.at[at], tile.at[stage], there.at[stage])

    def loop(low, high, **what):
        lax.fori_loop(low, high, lambda i, _: step(i, **what), None)

    some = jnp.minimum(chunk.count, plan.stages)
    loop(0, some, wait=False, issue=True)
    loop(some, chunk.count, wait=True, issue=True)
    loop(chunk.count - some, chunk.count, wait=True, issue=False)


class _Seen(NamedTuple):
    """Which keys the rows of a warpgroup see: bounds (4, R) of all, own (4, rows)."""

    chunk: _Chunk
    bounds: object
    own: object
    group: int

    def ends(self, field):
        """a0, a1, b0 or b1 of each row of the warpgroup."""
        return plgpu.layout_cast(self.own[field], plgpu.Layout.WGMMA.reduce(1))

    def nothing(self):
        """Which rows see no key."""
        return (self.ends(1) <= self.ends(0)) & (self.ends(3) <= self.ends(2))

    def scores(self, scores, begin):
        """Scores under the mask: what is not seen is far below the running maximum of no keys."""
        key = begin + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)

        def bound(field):
            return lax.broadcast_in_dim(self.ends(field), scores.shape, [0])

        clean = (key >= bound(0)) & (key < bound(1))
        noisy = (key >= bound(2)) & (key < bound(3))
        return jnp.where(clean | noisy, scores, _UNSEEN)

    def some_unseen(self, begin, size):
        """Whether the tile may hold keys that nobody sees."""
        return (begin < self.chunk.some_low) | (begin + size > self.chunk.some_high)

    def silence(self, values, begin) -> None:
        """Zeros, in a tile of values, what no query of any warpgroup sees."""
        for part in range(0, values.shape[0], 64):
            key = (
                begin
                + part
                + plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
            )

            def look(i, seen, key=key):
                a0, a1, b0, b1 = (self.bounds[field, i * self.group] for field in range(4))
                now = ((key >= a0) & (key < a1)) | ((key >= b0) & (key < b1))
                return jnp.maximum(seen, now.astype(jnp.int32))

            seen = (key >= self.chunk.some_low) & (key < self.chunk.some_high)
            seen = lax.fori_loop(0, self.chunk.others, look, seen.astype(jnp.int32))
            some = pl.ds(part, 64)
            held = plgpu.layout_cast(values[some], plgpu.Layout.WGMMA)
            seen = lax.broadcast_in_dim(seen, held.shape, [0])
            values[some] = jnp.where(seen > 0, held, jnp.zeros_like(held))


# Times the smallest scale, log2(e) / 16, still a weight of zero beside the running maximum of no
# keys.
_UNSEEN = 100 * EMPTY


def _silence(plan: _Plan, seen: _Seen, values, begin, zeroed) -> None:
    """`_Seen.silence` where needed, by one warpgroup for all."""

    @pl.when(seen.some_unseen(begin, plan.key_tile))
    def _():
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            seen.silence(values, begin)
            plgpu.commit_smem()

        if plan.warpgroups > 1:
            plgpu.barrier_arrive(zeroed)
            plgpu.barrier_wait(zeroed)


def _attend(plan: _Plan, chunk: _Chunk, seen: _Seen, q, k_tiles, v_tiles, ready, used, meet):
    """Unnormalised output, running maximum (times log2 e) and sum of weights of a chunk's rows.

    Over full tiles two warpgroups take turns: one's products run while the other weighs scores
    (Shah et al. 2024, FlashAttention-3, section 3.1).
    """
    width = q.shape[1]
    zeroed, turn = meet
    pair, warpgroup = plan.warpgroups == 2, lax.axis_index("warpgroup")

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    scale = width**-0.5 * _LOG2E
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def step(i, carry, masked: bool):
        total, top, sums = carry
        stage = lax.rem(i, plan.stages)
        begin = chunk.tile(i) * plan.key_tile
        if masked:
            plgpu.barrier_wait(ready[1].at[stage])
            _silence(plan, seen, v_tiles.at[stage], begin, zeroed)
        plgpu.barrier_wait(ready[0].at[stage])

        def product(accumulator):
            plgpu.wgmma(accumulator, q, k_tiles.at[stage].transpose((1, 0)))
            if pair and not masked:
                take_turns()
            return accumulator[...]

        scores = pl.run_scoped(product, plgpu.ACC((_ROWS, plan.key_tile), jnp.float32))
        plgpu.barrier_arrive(used[0].at[stage])
        if masked:
            scores = seen.scores(scores, begin)
        now = jnp.maximum(top, scores.max(axis=1) * scale)
        shrink = jnp.exp2(top - now)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(now, scores.shape, [0]))
        total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
        sums = sums * shrink + weights.sum(axis=1)
        weights = weights.astype(q.dtype)
        if not masked:
            if pair:
                total, sums, now, weights = lax.optimization_barrier((total, sums, now, weights))
                plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(ready[1].at[stage])
            if pair:
                plgpu.barrier_wait(turn)

        def add(accumulator):
            plgpu.wgmma(accumulator, weights, v_tiles.at[stage])

        total = pl.run_state(add)(plgpu.ACC.init(total))
        plgpu.barrier_arrive(used[1].at[stage])
        return total, now, sums

    def constant(x, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)

    carry = (
        constant(0, (_ROWS, width), plgpu.Layout.WGMMA),
        constant(EMPTY, (_ROWS,), by_row),
        constant(0, (_ROWS,), by_row),
    )
    if pair:
        pl.when(warpgroup == 1)(take_turns)
    carry = lax.fori_loop(0, chunk.full_count, partial(step, masked=False), carry)
    if pair:
        pl.when(warpgroup == 0)(take_turns)
    return lax.fori_loop(chunk.full_count, chunk.count, partial(step, masked=True), carry)
