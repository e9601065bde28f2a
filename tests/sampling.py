"""A tiny model, requests of every prompt length, and all decoding rules in one compilation."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.embedding import TokenEmbedding
from bdjax.model import DecoderConfig, Remat
from bdjax.noise import Absorbing
from bdjax.objective import Alignment
from bdjax.policies import (
    Dynamic,
    EntropyBounded,
    EntropyForm,
    Policy,
    RandomOne,
    Sequential,
    Static,
    Threshold,
    policy,
)
from bdjax.readout import TokenReadout
from bdjax.sampler import UNLIMITED, Controls, Request, Sampler, advance, start
from bdjax.sharding import reshard
from bdjax.step import Model
from pallas_kernels import Blockwise, CleanMode, Dense

VOCAB, MASK, STOP, WIDTH, BLOCK = 20, 19, 17, 32, 4
ROWS, SLOTS, PREFILL = 16, 24, 12
KEY = 11
TILES = Blockwise(query_tile=8, key_tile=8)
DENSE = Dense()


def tiny(clean: CleanMode = CleanMode.TOKEN, attention=DENSE) -> Model:
    """Two layers, grouped heads. Ids VOCAB and above have embeddings only (see `oracle`)."""
    return Model(
        decoder=DecoderConfig(
            num_layers=2,
            width=WIDTH,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_width=48,
            dtype="float32",
            clean=clean,
            remat=Remat.NONE,
            attention=attention,
        ),
        embedding=TokenEmbedding(vocab_size=2 * VOCAB, width=WIDTH, dtype="float32"),
        readout=TokenReadout(
            vocab_size=VOCAB, width=WIDTH, banned=(MASK,), row_chunk=64, vocab_chunk=12
        ),
    )


@cache
def weights() -> dict:
    """Parameters of `tiny`, the same for all its variants, with a head that has opinions."""
    params = tiny().init(jax.random.key(0))
    return params | {"head": params["head"] * 2, "embed": params["embed"] * 20}


def oracle(sharpness: float) -> dict:
    """Parameters that pass ids through: id and id + VOCAB both become logits `sharpness` on id.

    With ids from VOCAB on as masks that hide nothing it knows the answer; 0 makes it uniform.
    """
    flat = jax.tree.map(jnp.zeros_like, weights()["layers"])
    eye = jnp.eye(VOCAB, WIDTH)
    return weights() | {
        "layers": flat,
        "embed": jnp.concatenate([eye, eye]),
        "head": sharpness * eye,
    }


@policy
class Zoo(Policy):
    """Every rule at once, one per row: rule r of `RULES` where kind == r."""

    kind: jax.Array
    steps: jax.Array
    threshold: jax.Array
    budget: jax.Array

    def select(self, stats, view):
        """What the row's own rule accepts."""
        sets = [
            Sequential(steps=self.steps),
            Static(steps=self.steps),
            Dynamic(threshold=self.threshold, steps=self.steps),
            Threshold(threshold=self.threshold),
            EntropyBounded(budget=self.budget),
            EntropyBounded(budget=self.budget, form=EntropyForm.SDAR),
            RandomOne(),
        ]
        sets = jnp.stack([rule.select(stats, view) for rule in sets])
        return jnp.take_along_axis(sets, self.kind[None], axis=0)[0]


RULES = ("sequential", "static", "dynamic", "threshold", "eb", "sdar", "random")


def zoo(kind=None, steps=2, threshold=0.3, budget=1.5, rows=ROWS) -> Zoo:
    """Rules by row (all of them in turn by default); every number a scalar or one per row."""
    kind = np.arange(rows) % len(RULES) if kind is None else kind

    def column(x, dtype):
        return reshard(jnp.asarray(np.broadcast_to(x, rows).astype(dtype)[:, None]), "batch", None)

    return Zoo(
        kind=column(kind, np.int32),
        steps=column(steps, np.int32),
        threshold=column(threshold, np.float32),
        budget=column(budget, np.float32),
    )


def controls(policy=None, temperature=1.0, top_k=None, top_p=None, stop=-1, rows=ROWS) -> Controls:
    """Controls of `rows` rows; scalars mean the same for all."""

    def each(x, dtype):
        filled = np.broadcast_to(np.asarray(x, dtype), rows)
        return None if x is None else reshard(jnp.asarray(filled), "batch")

    return Controls(
        policy=zoo(rows=rows) if policy is None else policy,
        temperature=each(temperature, np.float32),
        top_k=None if top_k is None else each(top_k, np.int32),
        top_p=None if top_p is None else each(top_p, np.float32),
        bias=None,
        stop=jnp.asarray([stop], jnp.int32),
    )


class Rows(NamedTuple):
    """A request on the host, so that tests can edit it."""

    events: np.ndarray
    given: np.ndarray
    prompt: np.ndarray
    limit: np.ndarray
    size: np.ndarray
    row: np.ndarray

    def request(self) -> Request:
        """On the mesh in force."""
        put = {2: ("batch", "length"), 1: ("batch",), 3: ("batch", "length", None)}
        return Request(*(reshard(jnp.asarray(x), *put[x.ndim]) for x in self))

    def take(self, index) -> "Rows":
        """Some of the rows, in any order."""
        return Rows(*(x[np.asarray(index)] for x in self))


def mixed_rows() -> Rows:
    """Prompts of 1 .. 2B + 1 at block size B, then smaller sizes; limits that are no multiples.

    Some prompts hold STOP.
    """
    prompt = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 5, 3, 6, 2, 7, 4])
    size = np.array([4] * 9 + [1, 1, 2, 2, 3, 3, 3])
    limit = np.array([24, 21, 24, 22, 23, 24, 17, 24, 19, 12, 13, 19, 24, 24, 20, 22])
    events = np.random.default_rng(1).integers(0, MASK, (ROWS, SLOTS))
    given = np.arange(SLOTS) < prompt[:, None]
    events[[2, 5, 6, 14], [1, 4, 5, 6]] = STOP  # in prompts' parts that stand in first canvases
    events = np.where(given, events, 0)
    return Rows(
        events, given, *(x.astype(np.int32) for x in (prompt, limit, size)), np.arange(ROWS)
    )


def sampler(
    clean=CleanMode.TOKEN, fused=True, alignment=Alignment.SAME_POSITION, attention=DENSE
) -> Sampler:
    """The tiny model's sampler with canvases of BLOCK slots."""
    return Sampler(
        model=tiny(clean, attention),
        process=Absorbing(mask_id=MASK),
        canvas=BLOCK,
        alignment=alignment,
        fused=fused,
    )


def begin(plan: Sampler, rows: Rows, control: Controls, params=None, prefill=PREFILL):
    """`start` with the tests' key. Requests and controls are made anew: `advance` donates."""
    params = weights() if params is None else params
    return start(plan, params, rows.request(), control, jax.random.key(KEY), prefill)


def finish(plan: Sampler, rows: Rows, control: Controls, params=None, prefill=PREFILL):
    """The state when all rows are done, on the host."""
    params = weights() if params is None else params
    state = begin(plan, rows, control, params, prefill)
    return host(advance(plan, params, state, UNLIMITED))


def host(state):
    """A copy in numpy that later donations cannot touch; keys as their data."""

    def copy(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.array(x)

    return jax.tree.map(copy, state)


def infilled_rows() -> Rows:
    """`mixed_rows` with given tokens scattered over canvases and over later blocks."""
    rows, random = mixed_rows(), np.random.default_rng(2)
    inside = np.arange(SLOTS) < rows.limit[:, None]
    extra = inside & ~rows.given & (random.uniform(size=rows.given.shape) < 0.3)
    extra[np.arange(ROWS), rows.prompt] = False  # the prompt ends where it says
    events = np.where(extra, random.integers(0, MASK, extra.shape), rows.events)
    return rows._replace(events=events, given=rows.given | extra)


TEMPERATURE = np.array([1.0, 0.7, 1.0, 0.0], np.float32)[np.arange(ROWS) % 4]


@cache
def sampled(
    clean=CleanMode.TOKEN,
    fused=True,
    alignment=Alignment.SAME_POSITION,
    attention=DENSE,
    infilled=False,
):
    """Rows written by all rules at temperatures 1, 0.7 and 0; shared by the tests."""
    rows = infilled_rows() if infilled else mixed_rows()
    plan = sampler(clean, fused, alignment, attention)
    return finish(plan, rows, controls(temperature=TEMPERATURE))
