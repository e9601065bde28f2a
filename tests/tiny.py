"""A model small enough that compiling it is the whole cost, for tests of everything around it."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.embedding import TokenEmbedding
from bdjax.layout import Places
from bdjax.model import DecoderConfig, Remat
from bdjax.objective import Batch
from bdjax.readout import TokenReadout
from bdjax.step import Model
from pallas_kernels import CleanMode

VOCAB = 20
MASK = 19
WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """An embedding whose events are vectors already: for derivatives with respect to them."""

    def table(self):
        """No parameters."""
        return {}

    def __call__(self, params, events):
        """The events themselves."""
        return events


def model(clean: CleanMode = CleanMode.TOKEN, embedding=None) -> Model:
    """Two layers, four query heads over two KV heads, float32, mask id banned from the head."""
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
        ),
        embedding=embedding or TokenEmbedding(vocab_size=VOCAB, width=WIDTH, dtype="float32"),
        readout=TokenReadout(
            vocab_size=VOCAB, width=WIDTH, banned=(MASK,), row_chunk=16, vocab_chunk=7
        ),
    )


def batch(*rows: list[list[int]], length: int, prompt: int = 1, tokens=None) -> Batch:
    """Rows of packed documents given by their tokens; the first `prompt` of each are untrainable.

    A document None is one token of padding.
    """
    fields = {
        "tokens": np.zeros((len(rows), length), np.int32),
        "segment": np.zeros((len(rows), length), np.int32),
        "position": np.zeros((len(rows), length), np.int32),
        "trainable": np.zeros((len(rows), length), bool),
    }
    for number, documents in enumerate(rows):
        at, segment = 0, 0
        for document in documents:
            if document is None:
                at += 1
                continue
            segment += 1
            inside = number, slice(at, at + len(document))
            fields["tokens"][inside] = document
            fields["segment"][inside] = segment
            fields["position"][inside] = np.arange(len(document))
            fields["trainable"][inside] = np.arange(len(document)) >= prompt
            at += len(document)
        assert at <= length, "the documents are longer than the row"
    return Batch(**{name: jnp.asarray(x) for name, x in fields.items()})


def random_batch(rows: int, length: int, seed: int = 0) -> Batch:
    """Rows of random documents with short prompts and some padding at the end."""
    rng = np.random.default_rng(seed)
    packed = []
    for _ in range(rows):
        documents, left = [], length - int(rng.integers(0, 3))
        while left > 0:
            size = min(left, int(rng.integers(2, length)))
            documents.append(rng.integers(0, MASK, size).tolist())
            left -= size
        packed.append(documents)
    return batch(*packed, length=length)


def index(places: Places, row: int) -> Places:
    """One row of a batch of places."""
    return Places(*(field[row] for field in places))
