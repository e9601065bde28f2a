"""From hidden rows to numbers: per-token NLL for training, `Stats` for sampling.

Logits exist for a chunk of rows by a chunk of the vocabulary at a time, never as rows x V.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax import stats
from bdjax.parameters import Parameter, Role, Table
from bdjax.sharding import mesh_axes, per_shard, psum, reshard

_ROWS = ("batch", "length")
_HIDDEN = (*_ROWS, "embed")
_HEAD = ("vocab", "embed")
_BANNED = -1e30


class Shaping(NamedTuple):
    """How the distribution that tokens are drawn from differs from the model's.

    temperature: per slot; 0 draws the most probable token (its statistics are those of 1).
    top_k, top_p: per row, None when not asked for; they act after the temperature, top_k first,
    and the token that crosses p is kept. bias: added to the logits before everything else.
    """

    temperature: Float[Array, "N W"]
    top_k: Int[Array, "N"] | None = None
    top_p: Float[Array, "N"] | None = None
    bias: Float[Array, "V"] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenReadout:
    """A linear head over the vocabulary, tied to the embedding or its own (V, D) matrix.

    `banned` ids get probability zero in training and in sampling: the mask token is never a label
    (SUBS parameterisation, Sahoo et al. 2024). Chunks are in rows and in ids.
    """

    vocab_size: int
    width: int
    tied: bool = False
    banned: tuple[int, ...] = ()
    row_chunk: int = 1024
    vocab_chunk: int = 8192

    def table(self) -> Table:
        """The head's matrix, nothing if tied."""
        if self.tied:
            return {}
        init = jax.nn.initializers.normal(self.width**-0.5)
        shape, axes = (self.vocab_size, self.width), ("vocab", "embed_in")
        head = Parameter(shape=shape, axes=axes, init=init, role=Role.HEAD, contracted=(1,))
        return {"head": head}

    def matrix(self, params, dtype) -> Float[Array, "V D"]:
        """The head in the dtype of the hidden rows, gathered over fsdp."""
        return reshard(params["embed" if self.tied else "head"].astype(dtype), *_HEAD)

    def nll(
        self,
        params,
        hidden: Float[Array, "B T D"],
        rows: Int[Array, "B R"],
        labels: Int[Array, "B R"],
        scored: Bool[Array, "B R"],
    ) -> Float[Array, "B R"]:
        """-log p(labels[b, r] | hidden[b, rows[b, r]]) in nats, 0 where not `scored`.

        Work follows the number of scored entries: they are sorted to the front on each device and a
        loop with a traced trip count visits ceil(count / row_chunk) chunks, forward and backward.
        """
        return readout_nll(self, hidden, self.matrix(params, hidden.dtype), rows, labels, scored)

    def stats(
        self, params, hidden: Float[Array, "N W D"], shaping: Shaping, keys: Key[Array, "N W"]
    ) -> stats.Stats:
        """One token drawn per slot with its statistics; noise is a function of (key, id) alone."""
        return readout_stats(self, hidden, self.matrix(params, hidden.dtype), shaping, keys)


def _offset(local: int):
    """First vocabulary id of this device's share of the head."""
    axes = mesh_axes("vocab")
    return lax.axis_index(axes) * local if axes else 0


def _chunks(readout: TokenReadout, head: Float[Array, "v D"], bias=None):
    """Number of vocabulary chunks and a reader of them: index -> rows, ids, their additive bias.

    The last chunk is shifted left to end with the share; ids seen before get bias _BANNED.
    """
    local = head.shape[0]
    size = min(readout.vocab_chunk, local)

    def read(index):
        start = jnp.minimum(index * size, local - size)
        column = start + jnp.arange(size)
        ids = column + _offset(local)
        fresh = column >= index * size
        allowed = fresh
        for banned in readout.banned:
            allowed &= ids != banned
        extra = jnp.where(allowed, 0.0, _BANNED)
        if bias is not None:
            extra += lax.dynamic_slice_in_dim(bias, start, size)
        return start, lax.dynamic_slice_in_dim(head, start, size), ids, extra, fresh

    return -(-local // size), read


def _logits(x, weight, extra):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("rd,vd->rv", x, weight, preferred_element_type=wide) + extra


class _Queue(NamedTuple):
    """Scored entries first: `order` lists entries, `row` says where each one's hidden row is."""

    order: Int[Array, "n"]
    row: Int[Array, "m"]
    trips: Int[Array, ""]


def _queue(readout: TokenReadout, rows, scored, length: int) -> _Queue:
    entries = rows.size
    chunk = min(readout.row_chunk, entries)
    row = (jnp.arange(rows.shape[0])[:, None] * length + rows).reshape(-1)
    order = jnp.argsort(~scored.reshape(-1), stable=True)
    order = jnp.pad(order, (0, -entries % chunk), constant_values=entries)
    return _Queue(order, row, -(-scored.sum() // chunk))


def _take(queue: _Queue, chunk: int, index, *flat):
    ids = lax.dynamic_slice_in_dim(queue.order, index * chunk, chunk)
    return ids, *(x.at[ids].get(mode="fill", fill_value=0) for x in flat)


def _nll_forward(readout: TokenReadout, hidden, head, rows, labels, scored):
    batch, length, width = hidden.shape
    flat, label = hidden.reshape(-1, width), labels.reshape(-1)
    queue = _queue(readout, rows, scored, length)
    chunk = min(readout.row_chunk, rows.size)
    count, read = _chunks(readout, head)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def visit(index, results):
        ids, row, target = _take(queue, chunk, index, queue.row, label)
        x = flat[row]

        def over_vocabulary(j, state):
            top, total, picked = state
            _, weight, columns, extra, fresh = read(j)
            logits = _logits(x, weight, extra)
            new_top = jnp.maximum(top, logits.max(axis=1))
            total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=1)
            hit = (columns == target[:, None]) & fresh
            return new_top, total, picked + jnp.where(hit, logits, 0.0).sum(axis=1)

        start = (
            jnp.full((chunk,), _BANNED, wide),
            jnp.zeros((chunk,), wide),
            jnp.zeros((chunk,), wide),
        )
        state = lax.fori_loop(0, count, over_vocabulary, start)
        return tuple(r.at[ids].set(s, mode="drop") for r, s in zip(results, state, strict=True))

    empty = tuple(jnp.zeros((rows.size,), wide) for _ in range(3))
    top, total, picked = lax.fori_loop(0, queue.trips, visit, empty)
    axes = mesh_axes("vocab")
    if axes:
        highest = lax.pmax(top, axes)
        total = lax.psum(total * jnp.exp(top - highest), axes)
        top, picked = highest, lax.psum(picked, axes)
    done = scored.reshape(-1)
    lse = jnp.where(done, top + jnp.log(jnp.where(done, total, 1.0)), 0.0)
    nll = jnp.where(done, lse - picked, 0.0)
    return nll.reshape(rows.shape), lse.reshape(rows.shape)


def _nll_backward(readout: TokenReadout, hidden, head, rows, labels, scored, lse, d_nll):
    """d logits = d_nll (softmax - onehot), chunk by chunk; sums over devices after the loop."""
    batch, length, width = hidden.shape
    flat = hidden.reshape(-1, width)
    queue = _queue(readout, rows, scored, length)
    chunk = min(readout.row_chunk, rows.size)
    count, read = _chunks(readout, head)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    grad, done = jnp.where(scored, d_nll, 0.0).reshape(-1), scored.reshape(-1)

    def visit(index, grads):
        d_hidden, d_head = grads
        taken = _take(queue, chunk, index, queue.row, labels.reshape(-1), lse.reshape(-1), grad)
        ids, row, target, log_total, g = taken
        # The last chunk is filled with entries that are not scored: 0 * inf would be NaN.
        live = done.at[ids].get(mode="fill", fill_value=False)[:, None]
        x = jnp.where(live, flat[row], 0)

        def over_vocabulary(j, state):
            d_x, d_head = state
            start, weight, columns, extra, fresh = read(j)
            share = jnp.exp(_logits(x, weight, extra) - log_total[:, None])
            hit = (columns == target[:, None]) & fresh
            d_logits = (g[:, None] * (share - hit)).astype(x.dtype)
            d_x += jnp.einsum("rv,vd->rd", d_logits, weight, preferred_element_type=wide)
            part = jnp.einsum("rv,rd->vd", d_logits, x, preferred_element_type=wide)
            old = lax.dynamic_slice_in_dim(d_head, start, part.shape[0])
            return d_x, lax.dynamic_update_slice_in_dim(d_head, old + part, start, axis=0)

        d_x, d_head = lax.fori_loop(0, count, over_vocabulary, (jnp.zeros(x.shape, wide), d_head))
        return d_hidden.at[row].add(jnp.where(live, d_x, 0.0)), d_head

    zeros = jnp.zeros(flat.shape, wide), jnp.zeros(head.shape, wide)
    d_hidden, d_head = lax.fori_loop(0, queue.trips, visit, zeros)
    d_hidden = psum(d_hidden.reshape(hidden.shape), ("vocab",))
    return d_hidden.astype(hidden.dtype), psum(d_head, ("batch",)).astype(head.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored_nll(readout, hidden, head, rows, labels, scored):
    return _scored_nll_fwd(readout, hidden, head, rows, labels, scored)[0]


def _scored_nll_fwd(readout, hidden, head, rows, labels, scored):
    run = per_shard(
        partial(_nll_forward, readout), (_HIDDEN, _HEAD, _ROWS, _ROWS, _ROWS), (_ROWS, _ROWS)
    )
    nll, lse = run(hidden, head, rows, labels, scored)
    return nll, (hidden, head, rows, labels, scored, lse)


def _scored_nll_bwd(readout, residuals, d_nll):
    specs = (_HIDDEN, _HEAD, _ROWS, _ROWS, _ROWS, _ROWS, _ROWS)
    run = per_shard(partial(_nll_backward, readout), specs, (_HIDDEN, _HEAD))
    return (*run(*residuals, d_nll), None, None, None)


_scored_nll.defvjp(_scored_nll_fwd, _scored_nll_bwd)


@partial(jax.jit, static_argnames="readout")
def readout_nll(readout, hidden, head, rows, labels, scored):
    """`TokenReadout.nll` as one named call in every program that scores tokens."""
    return _scored_nll(readout, hidden, head, rows, labels, scored)


@partial(jax.jit, static_argnames="readout")
def readout_stats(readout, hidden, head, shaping: Shaping, keys) -> stats.Stats:
    """`TokenReadout.stats` as one named call in every program that draws tokens."""
    filtered = shaping.top_k is not None or shaping.top_p is not None

    def run(hidden, head, shaping, keys):
        x = hidden.reshape(-1, hidden.shape[-1])
        slots = hidden.shape[1]
        temperature = shaping.temperature.reshape(-1)
        scale = jnp.where(temperature > 0, temperature, 1.0)
        count, read = _chunks(readout, head, shaping.bias)

        def chunk(index):
            _, weight, ids, extra, _ = read(index)
            return ids, _logits(x, weight, extra)

        vocabulary = stats.Vocabulary(
            count=count,
            chunk=chunk,
            axes=mesh_axes("vocab"),
            temperature=scale,
            keys=keys.reshape(-1),
        )
        drawn = stats.scan(vocabulary, filtered, readout.vocab_size)
        keep = None
        if filtered:
            top_k, top_p = (None if x is None else x.repeat(slots) for x in shaping[1:3])
            keep = stats.nucleus(vocabulary, drawn, top_k, top_p)
        result = stats.summarise(drawn, keep, temperature)
        return jax.tree.map(lambda x: x.reshape(hidden.shape[:2]), result)

    slot, row = ("batch", "length"), ("batch",)
    shapes = Shaping(
        slot,
        None if shaping.top_k is None else row,
        None if shaping.top_p is None else row,
        None if shaping.bias is None else ("vocab",),
    )
    each = stats.Stats(*[slot] * len(stats.Stats._fields))
    return per_shard(run, (_HIDDEN, _HEAD, shapes, slot), each)(hidden, head, shaping, keys)
