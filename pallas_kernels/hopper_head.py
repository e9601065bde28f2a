"""The language-model head on Hopper: row statistics and logit gradients, logits never written.

A head of V = 151,936 by D = 2048 makes 2.5 G logits of 16k rows: written and read in float32 they
would cost a chip more time than half a product. Here a tile of logits is reduced where it is made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper_product as product
from pallas_kernels.hopper_product import HALF, TILE_COLUMNS, Operand

BANNED = -1e30
# Rows are filled up to a multiple of this.
ROWS = product.tall()
_SPLITS = 33
_ROW = plgpu.Layout.WGMMA.reduce(1)


class Columns(NamedTuple):
    """Which columns of a tile may be drawn: ids below `limit` that are not banned."""

    limit: Int[Array, ""]
    banned: tuple[Int[Array, ""], ...]


def _spread(x, width: int = TILE_COLUMNS):
    return lax.broadcast_in_dim(x, (HALF, width), (0,))


def _ids(first):
    shape = (HALF, TILE_COLUMNS)
    return first + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def _allowed(logits, ids, columns: Columns):
    keep = ids < columns.limit
    for banned in columns.banned:
        keep &= ids != banned
    return jnp.where(keep, logits, BANNED)


def _load(ref, first):
    return product.load(ref, first, HALF, _ROW)


def check(width: int, dtype) -> None:
    """Raises NotImplementedError for what the kernels cannot serve."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the head's kernels multiply 16-bit numbers, not {dtype}")
    if width % 64 or 3 * _fill(width) > width:
        raise NotImplementedError(
            "the head's kernels need a width in steps of 64 that a third of it or less fills up to "
            f"steps of {TILE_COLUMNS}, not {width}"
        )


def _fill(width: int) -> int:
    """Columns of zeros that make whole tiles of gradients."""
    return -width % TILE_COLUMNS


def _integers(count, limit, banned):
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (count, limit, *banned)])


def statistics(
    x: Float[Array, "n D"],
    head: Float[Array, "V D"],
    target: Int[Array, "n"],
    count: Int[Array, ""],
    banned: tuple[Int[Array, ""] | int, ...] = (),
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Largest logit, sum exp(logit - largest) and the target's logit of the first `count` rows.

    n is a multiple of `ROWS`; rows from `count` on hold anything. A target that is no id picks 0.
    """
    check(x.shape[1], x.dtype)
    rows, width = x.shape
    tiles = -(-head.shape[0] // TILE_COLUMNS)
    splits = min(_SPLITS, tiles)
    each = -(-tiles // splits)
    steps = width // 64

    def body(x_ref, head_ref, target_ref, integers, top_ref, total_ref, picked_ref):
        row_tiles = _tiles(integers[0], product.tall())
        columns = Columns(integers[1], tuple(integers[2 + i] for i in range(len(banned))))
        items = product.own_share(row_tiles * splits)

        def item_of(index):
            return product.grouped(product.item_number(index), row_tiles, splits)

        def place(index):
            row, split = item_of(index // each)
            return row * product.tall(), (split * each + lax.rem(index, each)) * TILE_COLUMNS

        def compute(half, offset, multiply, out):
            def item(index, _):
                row, split = item_of(index)
                first_row = row * product.tall() + offset
                target = _load(target_ref, first_row)

                def tile(j, state):
                    first = (split * each + j) * TILE_COLUMNS

                    def finish(logits):
                        top, total, picked = state
                        ids = _ids(first)
                        logits = _allowed(logits, ids, columns)
                        new = jnp.maximum(top, logits.max(axis=1))
                        share = jnp.exp(logits - _spread(new))
                        hit = jnp.where(ids == _spread(target), logits, 0.0)
                        total = total * jnp.exp(top - new) + share.sum(axis=1)
                        return new, total, picked + hit.sum(axis=1)

                    return multiply(index * each + j, finish)

                def column(value):
                    return plgpu.layout_cast(jnp.full((HALF,), value, jnp.float32), _ROW)

                state = lax.fori_loop(0, each, tile, (column(BANNED), column(0.0), column(0.0)))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i, value in enumerate(state):
                    out[half, i] = value
                plgpu.commit_smem()
                for i, ref in enumerate((top_ref, total_ref, picked_ref)):
                    plgpu.copy_smem_to_gmem(out.at[half, i], ref.at[split, pl.ds(first_row, HALF)])

            lax.fori_loop(0, items, item, None)
            plgpu.wait_smem_to_gmem(0)

        product.run(
            Operand(x_ref, 1),
            Operand(head_ref, 1),
            tiles=items * each,
            steps=steps,
            place=place,
            compute=compute,
            scratch=(plgpu.SMEM((2, 3, HALF), jnp.float32),),
        )

    part = jax.ShapeDtypeStruct((splits, rows), jnp.float32)
    integers = _integers(count, head.shape[0], banned)
    run = product.kernel(body, [part] * 3, "head_statistics")
    top, total, picked = run(x, head, target, integers)
    highest = top.max(axis=0)
    return highest, (total * jnp.exp(top - highest)).sum(axis=0), picked.sum(axis=0)


def _share(row_tiles, column_tiles, start=0):
    """How many tiles this block takes, and their cluster's (first row, first column)."""

    def place(index):
        row, column = product.grouped(product.item_number(index), row_tiles, column_tiles)
        return row * product.tall(), start + column * TILE_COLUMNS

    return product.own_share(row_tiles * column_tiles), place


def _each(items, place, step):
    """Computes one tile after the other: `step(index, first row of this half, first column)`."""

    def compute(half, offset, multiply, *scratch):
        def item(index, _):
            row, column = place(index)
            step(half, multiply, index, row + offset, column, *scratch)

        lax.fori_loop(0, items, item, None)
        plgpu.wait_smem_to_gmem(0)

    return compute


def _tiles(size, tile: int):
    return (size + tile - 1) // tile


def logit_gradients(
    x: Float[Array, "n D"],
    head: Float[Array, "V D"],
    target: Int[Array, "n"],
    log_total: Float[Array, "n"],
    scale: Float[Array, "n"],
    count: Int[Array, ""],
    first: Int[Array, ""],
    size: int,
    banned: tuple[Int[Array, ""] | int, ...] = (),
) -> Float[Array, "n size"]:
    """scale (exp(logit - log_total) - [id = target]) of ids first ... first + size - 1.

    In the dtype of x. Only tiles of `ROWS` by 256 ids that hold some of the first `count` rows and
    some id are written; `first` and `size` are multiples of 256.
    """
    rows, width = x.shape

    def body(x_ref, head_ref, target_ref, log_ref, scale_ref, integers, out_ref):
        columns = Columns(integers[1], tuple(integers[3 + i] for i in range(len(banned))))
        start = integers[2]
        ids = jnp.minimum(columns.limit - start, size)
        row_tiles = _tiles(integers[0], product.tall())
        items, place = _share(row_tiles, _tiles(ids, TILE_COLUMNS), start)

        def step(half, multiply, index, row, column, box):
            target, log_total, scale = (_load(ref, row) for ref in (target_ref, log_ref, scale_ref))

            def finish(logits):
                ids = _ids(column)
                share = jnp.exp(_allowed(logits, ids, columns) - _spread(log_total))
                share -= jnp.where(ids == _spread(target), 1.0, 0.0)
                return (share * _spread(scale)).astype(x.dtype)

            product.write(multiply(index, finish), box, half, out_ref, row, column - start)

        product.run(
            Operand(x_ref, 1),
            Operand(head_ref, 1),
            tiles=items,
            steps=width // 64,
            place=place,
            compute=_each(items, place, step),
            scratch=(product.outbox(x.dtype),),
        )

    integers = _integers(count, head.shape[0], (first, *banned))
    out = jax.ShapeDtypeStruct((rows, size), x.dtype)
    run = product.kernel(body, out, "head_logit_gradients")
    return run(x, head, target, log_total, scale, integers)


def add_row_gradients(d_logits: Float[Array, "n size"], head, d_x, count, first) -> None:
    """d_x[:count] += d_logits @ head[first : first + size]; `d_x` is a float32 Ref of (n, D).

    Each number is added to once: equal inputs give equal bits.
    """
    size, width = d_logits.shape[1], head.shape[1]

    def body(d_logits_ref, head_ref, integers, d_x_ref):
        steps = _tiles(jnp.minimum(integers[1] - integers[2], size), TILE_COLUMNS)
        items, place = _share(_tiles(integers[0], product.tall()), width // TILE_COLUMNS)

        def step(half, multiply, index, row, column, box):
            part = multiply(index, lambda acc: acc)
            product.write(part, box, half, d_x_ref, row, column, "add")

        product.run(
            Operand(d_logits_ref, 1),
            Operand(head_ref, 0, integers[2]),
            tiles=items,
            steps=steps * (TILE_COLUMNS // 64),
            place=place,
            compute=_each(items, place, step),
            scratch=(product.outbox(jnp.float32),),
        )

    integers = _integers(count, head.shape[0], (first,))
    product.kernel(body, (), "head_row_gradients")(d_logits, head, integers, d_x)


def set_head_gradients(d_logits: Float[Array, "n size"], x, d_head, count, first) -> None:
    """d_head[first : first + size] = d_logits[:count]^T @ x[:count], summed in float32.

    `d_head` is a Ref of (V, D) in any float type. From `count` to the next multiple of 64, rows
    are read: `x` is finite there and d_logits zero.
    """
    size, width = d_logits.shape[1], x.shape[1]
    dtype = d_head.dtype

    def body(d_logits_ref, x_ref, integers, d_head_ref):
        ids = jnp.minimum(integers[1] - integers[2], size)
        items, place = _share(_tiles(ids, product.tall()), width // TILE_COLUMNS)

        def step(half, multiply, index, row, column, box):
            part = multiply(index, lambda acc: acc.astype(dtype))
            product.write(part, box, half, d_head_ref, integers[2] + row, column)

        product.run(
            Operand(d_logits_ref, 0),
            Operand(x_ref, 0),
            tiles=items,
            steps=_tiles(integers[0], 64),
            place=place,
            compute=_each(items, place, step),
            scratch=(product.outbox(dtype),),
        )

    integers = _integers(count, d_head.shape[0], (first,))
    product.kernel(body, (), "head_weight_gradients")(d_logits, x, integers, d_head)


def gradients(
    x: Float[Array, "n D"],
    head: Float[Array, "V D"],
    target: Int[Array, "n"],
    log_total: Float[Array, "n"],
    scale: Float[Array, "n"],
    count: Int[Array, ""],
    banned: tuple[Int[Array, ""] | int, ...] = (),
    *,
    dtype,
    chunk: int = 4096,
) -> tuple[Float[Array, "n D"], Float[Array, "V D"]]:
    """The gradients of sum(scale * nll) in rows (float32) and in the head (`dtype`).

    log_total: the log-sum-exp of each row's logits. From `count` on `scale` is zero and `x` finite.
    n is a multiple of `ROWS`; `chunk` ids at a time, a multiple of 256 (else ValueError), have
    logit gradients in memory.
    """
    check(x.shape[1], x.dtype)
    if chunk < TILE_COLUMNS or chunk % TILE_COLUMNS:
        raise ValueError(f"chunk={chunk} must be a multiple of {TILE_COLUMNS}; type chunk=4096")
    width, columns = x.shape[1], ((0, 0), (0, _fill(x.shape[1])))
    x, head = jnp.pad(x, columns), jnp.pad(head, columns)
    # Of no rows at all the gradients are those of one row whose scale is zero.
    count = jnp.maximum(count, 1)
    d_x = jax.new_ref(jnp.zeros(x.shape, jnp.float32))
    d_head = jax.new_ref(jnp.zeros(head.shape, dtype))

    def visit(index, _):
        first = index * chunk
        d_logits = logit_gradients(x, head, target, log_total, scale, count, first, chunk, banned)
        add_row_gradients(d_logits, head, d_x, count, first)
        set_head_gradients(d_logits, x, d_head, count, first)

    lax.fori_loop(0, -(-head.shape[0] // chunk), visit, None)
    return jax.freeze(d_x)[:, :width], jax.freeze(d_head)[:, :width]
