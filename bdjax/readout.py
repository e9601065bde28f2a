"""From hidden rows to numbers: per-token NLL for training, `Stats` for sampling.

Logits exist for a chunk of rows by a chunk of the vocabulary at a time, never as rows x V.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdjax import nll, stats
from bdjax.parameters import Parameter, Role, Table
from bdjax.sharding import mesh_axes, per_shard, reshard
from pallas_kernels import hopper_stats

# Up to here the kernel reads the head once for all rows, or nearly so.
_KERNEL_ROWS = 512


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

    bias: a number per id is added to the logits, the parameter "head_bias".

    `banned` ids get probability zero in training and in sampling: the mask token is never a label
    (SUBS parameterisation, Sahoo et al. 2024). Chunks are in rows and in ids.
    """

    vocab_size: int
    width: int
    tied: bool = False
    bias: bool = False
    banned: tuple[int, ...] = ()
    row_chunk: int = 1024
    vocab_chunk: int = 8192

    @property
    def chunks(self) -> nll.Chunks:
        """What `bdjax.nll` needs to know."""
        return nll.Chunks(self.banned, self.row_chunk, self.vocab_chunk)

    def table(self) -> Table:
        """The head's matrix, nothing if tied, and its bias if it has one."""
        table: Table = {}
        if not self.tied:
            init = jax.nn.initializers.normal(self.width**-0.5)
            shape, axes = (self.vocab_size, self.width), ("vocab", "embed_in")
            head = Parameter(shape=shape, axes=axes, init=init, role=Role.HEAD, contracted=(1,))
            table["head"] = head
        if self.bias:
            init = jax.nn.initializers.zeros
            shape, axes = (self.vocab_size,), nll.BIAS
            bias = Parameter(shape=shape, axes=axes, init=init, role=Role.BIAS)
            table["head_bias"] = bias
        return table

    def matrix(self, params, dtype) -> Float[Array, "V D"]:
        """The head in the dtype of the hidden rows, gathered over fsdp."""
        return reshard(params["embed" if self.tied else "head"].astype(dtype), *nll.HEAD)

    def added(self, params) -> Float[Array, "V"] | None:
        """What is added to the logits, in float32 or wider; None for nothing."""
        if not self.bias:
            return None
        own = params["head_bias"]
        return reshard(own.astype(jnp.promote_types(own.dtype, jnp.float32)), *nll.BIAS)

    def nll(
        self,
        params,
        hidden: Float[Array, "B T D"],
        rows: Int[Array, "B R"],
        labels: Int[Array, "B R"],
        scored: Bool[Array, "B R"],
    ) -> Float[Array, "B R"]:
        """-log p(labels[b, r] | hidden[b, rows[b, r]]) in nats, 0 where not `scored`.

        Work follows the number of scored entries: they are sorted to the front on each device and
        loops with traced trip counts visit ceil(count / row_chunk) chunks, forward and backward.
        """
        head, bias = self.matrix(params, hidden.dtype), self.added(params)
        return readout_nll(self, hidden, head, rows, labels, scored, bias)

    def stats(
        self, params, hidden: Float[Array, "N W D"], shaping: Shaping, keys: Key[Array, "N W"]
    ) -> stats.Stats:
        """One token drawn per slot with its statistics; noise is a function of (key, id) alone."""
        if (own := self.added(params)) is not None:
            asked = shaping.bias
            bias = own if asked is None else own + reshard(asked, *nll.BIAS)
            shaping = shaping._replace(bias=bias)
        return readout_stats(self, hidden, self.matrix(params, hidden.dtype), shaping, keys)


@partial(jax.jit, static_argnames="readout")
def readout_nll(readout, hidden, head, rows, labels, scored, bias):
    """`TokenReadout.nll` as one named call in every program that scores tokens."""
    return nll.scored_nll(readout.chunks, hidden, head, rows, labels, scored, bias)


def _by_kernel(x, keys) -> bool:
    """Whether the chip's kernel may draw: for few rows, with the keys whose hash it knows."""
    few = x.shape[0] <= _KERNEL_ROWS and jax.random.key_data(keys).shape[-1] == 2
    return few and jax.random.key_impl(keys) == "threefry2x32" and nll.by_kernel(x)


def _parts(readout: TokenReadout, x, head, scale, keys, bias) -> hopper_stats.Parts:
    """Statistics of the tiles of this device's share of the head."""
    rows = x.shape[0]
    fill = (0, -rows % hopper_stats.ROWS)
    parts = hopper_stats.statistics(
        jnp.pad(x, (fill, (0, 0))),
        head,
        jnp.pad(scale, fill, constant_values=1.0),
        jnp.pad(jax.random.key_data(keys), (fill, (0, 0))),
        nll.first_id(head.shape[0]),
        readout.banned,
        bias,
    )
    return jax.tree.map(lambda value: value[:, :rows], parts)


@partial(jax.jit, static_argnames="readout")
def readout_stats(readout, hidden, head, shaping: Shaping, keys) -> stats.Stats:
    """`TokenReadout.stats` as one named call in every program that draws tokens."""
    filtered = shaping.top_k is not None or shaping.top_p is not None

    def run(hidden, head, shaping, keys):
        x = hidden.reshape(-1, hidden.shape[-1])
        slots = hidden.shape[1]
        temperature = shaping.temperature.reshape(-1)
        scale = jnp.where(temperature > 0, temperature, 1.0)
        count, read = nll.over_ids(readout.chunks, head, shaping.bias)

        def chunk(index):
            _, weight, ids, extra, _ = read(index)
            return ids, nll.logits_of(x, weight, extra)

        vocabulary = stats.Vocabulary(
            count=count,
            chunk=chunk,
            axes=mesh_axes("vocab"),
            temperature=scale,
            keys=keys.reshape(-1),
        )
        if not filtered and _by_kernel(x, keys):
            parts = _parts(readout, x, head, scale, keys.reshape(-1), shaping.bias)
            here = stats.joined(parts, scale, nll.first_id(head.shape[0]))
            drawn = stats.over_devices(vocabulary, here)
        else:
            drawn = stats.scan(vocabulary, filtered, readout.vocab_size)
        keep = None
        if filtered:
            top_k, top_p = (None if x is None else x.repeat(slots) for x in shaping[1:3])
            keep = stats.nucleus(vocabulary, drawn, top_k, top_p)
        result = stats.summarise(drawn, keep, temperature)
        return jax.tree.map(lambda x: x.reshape(hidden.shape[:2]), result)

    slot, row = nll.ROWS, ("batch",)
    shapes = Shaping(
        slot,
        None if shaping.top_k is None else row,
        None if shaping.top_p is None else row,
        None if shaping.bias is None else nll.BIAS,
    )
    each = stats.Stats(*[slot] * len(stats.Stats._fields))
    return per_shard(run, (nll.HIDDEN, nll.HEAD, shapes, slot), each)(hidden, head, shaping, keys)
