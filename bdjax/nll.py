"""-log p of scored entries: chunks of rows by chunks of ids forward and backward, with its own VJP.

Scored entries are sorted to the front on each device and work follows their number, which is data.
Backward the vocabulary is the outer loop: a chunk of the head's gradient is written once, and what
is added to again and again is the rows' gradient, the smaller of the two.
"""

import functools
import logging
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bdjax.sharding import device_kind, is_hopper, mesh_axes, per_shard, psum
from pallas_kernels import hopper_head

ROWS = ("batch", "length")
HIDDEN = (*ROWS, "embed")
HEAD = ("vocab", "embed")
BIAS = ("vocab",)
BANNED = -1e30

# Chunks of ids end at multiples of this where they are long.
_LANES = 128
# Hidden rows whose gradients are put together at a time.
_FOLD = 4096


class Chunks(NamedTuple):
    """Ids that are never drawn, and at most how many rows and ids have logits at one time."""

    banned: tuple[int, ...]
    rows: int
    ids: int


def first_id(local: int) -> Int[Array, ""] | int:
    """First vocabulary id of this device's share of the head, `local` ids long."""
    axes = mesh_axes("vocab")
    return lax.axis_index(axes) * local if axes else 0


def over_ids(chunks: Chunks, head: Float[Array, "v D"], bias: Float[Array, "v"] | None = None):
    """Number of vocabulary chunks and a reader of them: index -> start, weight, ids, bias, fresh.

    Chunks are alike in length; the last one is shifted left to end with the share, and ids seen
    before are not `fresh`: their additive bias, like that of banned ids, is `BANNED`.
    """
    local = head.shape[0]
    size = -(-local // -(-local // chunks.ids))
    size = min(local, size if size <= _LANES else size + -size % _LANES)

    def read(index):
        start = jnp.minimum(index * size, local - size)
        column = start + jnp.arange(size)
        ids = column + first_id(local)
        fresh = column >= index * size
        allowed = fresh
        for banned in chunks.banned:
            allowed &= ids != banned
        extra = jnp.where(allowed, 0.0, BANNED)
        if bias is not None:
            extra += lax.dynamic_slice_in_dim(bias, start, size)
        return start, lax.dynamic_slice_in_dim(head, start, size), ids, extra, fresh

    return -(-local // size), read


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def logits_of(
    x: Float[Array, "r D"], weight: Float[Array, "v D"], extra: Float[Array, "v"]
) -> Float[Array, "r v"]:
    """x @ weight^T + extra, in float32 or wider."""
    return jnp.einsum("rd,vd->rv", x, weight, preferred_element_type=_wide(x)) + extra


class Queue(NamedTuple):
    """Entries on one device, the scored ones first and by rising hidden row; filled up to chunks.

    order: the entry; row: its hidden row, the number of hidden rows if it is not scored.
    """

    order: Int[Array, "n"]
    row: Int[Array, "n"]
    count: Int[Array, ""]


def queue_of(rows: Int[Array, "B R"], scored: Bool[Array, "B R"], length: int, chunk: int) -> Queue:
    """The entries of B sequences of `length` hidden rows, filled up to a multiple of `chunk`."""
    nowhere = rows.shape[0] * length
    row = (jnp.arange(rows.shape[0])[:, None] * length + rows).reshape(-1)
    row = jnp.where(scored.reshape(-1), row, nowhere)
    order = jnp.argsort(row, stable=True)
    fill = (0, -rows.size % chunk)
    return Queue(
        jnp.pad(order, fill, constant_values=rows.size),
        jnp.pad(row[order], fill, constant_values=nowhere),
        scored.sum(),
    )


def _in_order(queue: Queue, entries, fill=0):
    """(B, R) values in the queue's order, `fill` for entries that are not scored."""
    values = entries.reshape(-1).at[queue.order].get(mode="fill", fill_value=fill)
    return jnp.where(jnp.arange(values.size) < queue.count, values, fill)


def _in_place(queue: Queue, values, shape):
    """The inverse: values in the queue's order as (B, R), 0 for entries that are not scored."""
    live = jnp.arange(values.size) < queue.count
    empty = jnp.zeros((shape[0] * shape[1],), values.dtype)
    return empty.at[queue.order].set(jnp.where(live, values, 0), mode="drop").reshape(shape)


def _gather(queue: Queue, hidden):
    """Hidden rows in the queue's order, zeros for entries that are not scored: 0 * inf is NaN."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat.at[queue.row].get(mode="fill", fill_value=0)


def _row_slices(chunk: int, index, *arrays):
    return tuple(lax.dynamic_slice_in_dim(x, index * chunk, chunk) for x in arrays)


def _statistics(chunks: Chunks, x, head, bias, target, count):
    """Largest logit, sum exp(logit - largest) and the target's logit, (n,) each."""
    chunk = min(chunks.rows, x.shape[0])
    number, read = over_ids(chunks, head, bias)
    wide = _wide(x)

    def visit(index, results):
        rows, wanted = _row_slices(chunk, index, x, target)

        def over_vocabulary(j, state):
            top, total, picked = state
            _, weight, ids, extra, fresh = read(j)
            logits = logits_of(rows, weight, extra)
            new_top = jnp.maximum(top, logits.max(axis=1))
            total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=1)
            hit = (ids == wanted[:, None]) & fresh
            return new_top, total, picked + jnp.where(hit, logits, 0.0).sum(axis=1)

        zeros = jnp.zeros((chunk,), wide)
        start = (jnp.full((chunk,), BANNED, wide), zeros, zeros)
        state = lax.fori_loop(0, number, over_vocabulary, start)
        return tuple(
            lax.dynamic_update_slice_in_dim(r, s, index * chunk, axis=0)
            for r, s in zip(results, state, strict=True)
        )

    empty = tuple(jnp.zeros(x.shape[:1], wide) for _ in range(3))
    return lax.fori_loop(0, -(-count // chunk), visit, empty)


def _gradients(chunks: Chunks, x, head, bias, target, log_total, scale, count, dtype):
    """d logits = scale (softmax - onehot): gradients of rows, wide, of the head in `dtype`, and of
    the bias, None without one."""
    chunk = min(chunks.rows, x.shape[0])
    number, read = over_ids(chunks, head, bias)
    wide = _wide(x)

    def over_vocabulary(j, grads):
        d_x, d_head, d_bias = grads
        start, weight, ids, extra, fresh = read(j)

        def visit(index, grads):
            d_x, d_weight, d_extra = grads
            arrays = _row_slices(chunk, index, x, target, log_total, scale, d_x)
            rows, wanted, log_sum, g, d_rows = arrays
            share = jnp.exp(logits_of(rows, weight, extra) - log_sum[:, None])
            hit = (ids == wanted[:, None]) & fresh
            d_wide = g[:, None] * (share - hit)
            d_logits = d_wide.astype(x.dtype)
            d_extra = None if bias is None else d_extra + d_wide.sum(axis=0)
            d_rows += jnp.einsum("rv,vd->rd", d_logits, weight, preferred_element_type=wide)
            d_weight += jnp.einsum("rv,rd->vd", d_logits, rows, preferred_element_type=wide)
            d_x = lax.dynamic_update_slice_in_dim(d_x, d_rows, index * chunk, axis=0)
            return d_x, d_weight, d_extra

        nothing = jnp.zeros(weight.shape, wide)
        none = None if bias is None else jnp.zeros(weight.shape[:1], wide)
        grads = lax.fori_loop(0, -(-count // chunk), visit, (d_x, nothing, none))
        d_x, d_weight, d_extra = grads
        old = lax.dynamic_slice_in_dim(d_head, start, weight.shape[0])
        new = jnp.where(fresh[:, None], d_weight.astype(dtype), old)
        d_head = lax.dynamic_update_slice_in_dim(d_head, new, start, axis=0)
        if bias is not None:
            old = lax.dynamic_slice_in_dim(d_bias, start, weight.shape[0])
            new = jnp.where(fresh, d_extra, old)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, new, start, axis=0)
        return d_x, d_head, d_bias

    none = None if bias is None else jnp.zeros(bias.shape, wide)
    zeros = jnp.zeros(x.shape, wide), jnp.zeros(head.shape, dtype), none
    return lax.fori_loop(0, number, over_vocabulary, zeros)


def _fold(queue: Queue, d_x, rows: int, dtype):
    """Gradients of `rows` hidden rows: those of a row's entries, which lie together, added up.

    As many rounds as the row with most entries has; each row sums in the queue's order.
    """
    bounds = jnp.searchsorted(queue.row, jnp.arange(rows + 1))
    size = min(_FOLD, rows)
    most = (bounds[1:] - bounds[:-1]).max()

    def chunk(index, d_hidden):
        start = jnp.minimum(index * size, rows - size)
        first = lax.dynamic_slice_in_dim(bounds, start, size)
        end = lax.dynamic_slice_in_dim(bounds, start + 1, size)

        def add(i, total):
            part = d_x.at[first + i].get(mode="clip")
            return total + jnp.where((first + i < end)[:, None], part, 0)

        total = lax.fori_loop(0, most, add, jnp.zeros((size, d_x.shape[1]), d_x.dtype))
        return lax.dynamic_update_slice_in_dim(d_hidden, total.astype(dtype), start, axis=0)

    empty = jnp.zeros((rows, d_x.shape[1]), dtype)
    return lax.fori_loop(0, -(-rows // size), chunk, empty)


def by_kernel(hidden: Float[Array, "*n D"], bias: Float[Array, "v"] | None = None) -> bool:
    """Whether the chip has kernels for a head over these hidden rows; if not, the log says why.

    bias: of the logits, where the kernel that is asked for would have to add it.
    """
    if not is_hopper(device_kind()):
        return False
    try:
        hopper_head.check(hidden.shape[-1], hidden.dtype)
        if bias is not None:
            raise NotImplementedError("the logits have a bias, which it does not add")
    except NotImplementedError as reason:
        _say(f"head over rows of {hidden.shape[-1]}: the Hopper kernel cannot serve: {reason}")
        return False
    return True


@functools.cache
def _say(text: str) -> None:
    logging.getLogger("bdjax.nll").info(text)


def _banned_here(chunks: Chunks, head):
    return tuple(banned - first_id(head.shape[0]) for banned in chunks.banned)


def _queue(chunks: Chunks, hidden, bias, rows, scored) -> Queue:
    """Kernels want rows filled up to their tiles, loops to chunks."""
    chunk = hopper_head.ROWS if by_kernel(hidden, bias) else min(chunks.rows, rows.size)
    return queue_of(rows, scored, hidden.shape[1], chunk)


def _forward(chunks: Chunks, hidden, head, rows, labels, scored, bias):
    queue = _queue(chunks, hidden, bias, rows, scored)
    x, target = _gather(queue, hidden), _in_order(queue, labels, -1)
    if by_kernel(hidden, bias):
        here = target - first_id(head.shape[0])
        state = hopper_head.statistics(x, head, here, queue.count, _banned_here(chunks, head))
    else:
        state = _statistics(chunks, x, head, bias, target, queue.count)
    top, total, picked = state
    axes = mesh_axes("vocab")
    if axes:
        highest = lax.pmax(top, axes)
        total = lax.psum(total * jnp.exp(top - highest), axes)
        top, picked = highest, lax.psum(picked, axes)
    log_total = top + jnp.log(total)
    return tuple(_in_place(queue, v, rows.shape) for v in (log_total - picked, log_total))


def _backward(chunks: Chunks, hidden, head, rows, labels, scored, bias, log_total, d_nll):
    """Sums over devices come after the loops; the head's is one of float32."""
    queue = _queue(chunks, hidden, bias, rows, scored)
    x, target = _gather(queue, hidden), _in_order(queue, labels, -1)
    values = [_in_order(queue, v) for v in (log_total, d_nll)]
    dtype = _wide(head) if mesh_axes("batch") else head.dtype
    if by_kernel(hidden, bias):
        here, banned = target - first_id(head.shape[0]), _banned_here(chunks, head)
        grads = hopper_head.gradients(x, head, here, *values, queue.count, banned, dtype=dtype)
        grads = (*grads, None)
    else:
        grads = _gradients(chunks, x, head, bias, target, *values, queue.count, dtype)
    d_x, d_head = psum(grads[0], ("vocab",)), psum(grads[1], ("batch",))
    d_hidden = _fold(queue, d_x, hidden.shape[0] * hidden.shape[1], hidden.dtype)
    d_bias = None if bias is None else psum(grads[2], ("batch",)).astype(bias.dtype)
    return d_hidden.reshape(hidden.shape), d_head.astype(head.dtype), d_bias


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored_nll(
    chunks: Chunks,
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    rows: Int[Array, "B R"],
    labels: Int[Array, "B R"],
    scored: Bool[Array, "B R"],
    bias: Float[Array, "V"] | None = None,
) -> Float[Array, "B R"]:
    """-log p(labels[b, r] | hidden[b, rows[b, r]]) in nats, 0 where not `scored`.

    bias: added to the logits.
    """
    return _scored_nll_fwd(chunks, hidden, head, rows, labels, scored, bias)[0]


def _scored_nll_fwd(chunks, hidden, head, rows, labels, scored, bias):
    specs = (HIDDEN, HEAD, ROWS, ROWS, ROWS, None if bias is None else BIAS)
    run = per_shard(partial(_forward, chunks), specs, (ROWS, ROWS))
    nll, log_total = run(hidden, head, rows, labels, scored, bias)
    return nll, (hidden, head, rows, labels, scored, bias, log_total)


def _scored_nll_bwd(chunks, residuals, d_nll):
    added = None if residuals[5] is None else BIAS
    specs = (HIDDEN, HEAD, ROWS, ROWS, ROWS, added, ROWS, ROWS)
    run = per_shard(partial(_backward, chunks), specs, (HIDDEN, HEAD, added))
    d_hidden, d_head, d_bias = run(*residuals, d_nll)
    return d_hidden, d_head, None, None, None, d_bias


scored_nll.defvjp(_scored_nll_fwd, _scored_nll_bwd)
