"""The one step: every call of the network, in training and in sampling, is `block_step`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from bdjax.cache import Cache, KeyValues
from bdjax.layout import Places
from bdjax.lora import split
from bdjax.model import Decoder, DecoderConfig
from bdjax.parameters import Role, Table, initialise
from bdjax.sharding import per_shard
from pallas_kernels import Intervals, Meta, intervals

_META = Meta(*[("batch", "length")] * 4)
_INTERVALS = Intervals(*[("batch", "length")] * 4)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trunk between an embedding of events and a readout of hidden states; static, hashable.

    `embedding` and `readout` are the seam for other processes: each has `table()`, the embedding is
    called as (params, events) -> (B, T, D), the readout as `bdjax.readout` describes.
    """

    decoder: DecoderConfig
    embedding: Any
    readout: Any

    def table(self) -> Table:
        """All parameters: one flat dict of the three parts, layers stacked under "layers"."""
        return self.embedding.table() | self.decoder.table() | self.readout.table()

    def trained_table(self) -> Table:
        """The parameters that training moves: all of them, or the pairs of LoRA."""
        return split(self.table(), self.decoder.lora)[0]

    def narrow(self, params):
        """`params` with the layers' weights in the compute dtype, as the layers cast them.

        Cast before the scan over layers, masters are read once a step and gradients are summed up
        in the dtype that each layer's products round them to anyway. Unrolled layers do the same
        for themselves (`bdjax.unstacking`).
        """
        if self.decoder.unrolled:
            return params
        kinds, dtype = self.decoder.layer_table(), self.decoder.dtype
        layers = {
            name: x if kinds[name].role is Role.NORM else x.astype(dtype)
            for name, x in params["layers"].items()
        }
        return params | {"layers": layers}

    def init(self, key):
        """Float32 parameters, born sharded on the mesh in force."""
        return _initialise(self, key, False)

    def init_trained(self, key):
        """Those of `trained_table` alone."""
        return _initialise(self, key, True)


@partial(jax.jit, static_argnames=("model", "trained"))
def _initialise(model: Model, key, trained: bool):
    return initialise(model.trained_table() if trained else model.table(), key)


@partial(jax.jit, static_argnames="model")
def block_step(
    model: Model,
    params,
    tokens: Array,
    places: Places,
    cache: Cache | None = None,
    dropout: Key[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], KeyValues]:
    """One forward pass of the denoiser: final-norm hidden states and the window's keys and values.

    Training: tokens = [clean; noisy views]. Prefill: clean tokens only. Denoising: a canvas, with
    the committed prefix in `cache`. Fused commit: a finished block (clean) and the next canvas.
    The mask follows from `places` and the cache's slots alone. The cache is only read. `dropout`:
    one key per row, in training alone.
    """

    def mask(keys):
        find = per_shard(
            lambda q, k: intervals(q, k, model.decoder.clean), (_META, _META), _INTERVALS
        )
        return find(places.meta, keys)

    trunk = {name: params[name] for name in model.decoder.table()}
    return Decoder(model.decoder).apply(
        {"params": trunk},
        model.embedding(params, tokens),
        places.position,
        mask(places.meta),
        cache,
        None if cache is None else mask(cache.meta),
        dropout,
    )
