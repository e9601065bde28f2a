"""Model FLOPs of one train step: what the mathematics of the two-stream row needs, nothing else.

Counted (one multiply-add is 2; a product costs 2 forward and 4 backward per weight or pair):

    body       6 per parameter of the layers' matrices, per real token of every stream
    attention  12 per visible pair, head and head dimension
    head       6 per weight of the (V, D) matrix, per scored entry

Visible pairs follow the mask exactly: one document of L tokens in blocks of B with one noisy view
has L^2 + L B of them if the clean stream is block-causal and L^2 + L (B + 1) / 2 if token-causal.
The clean stream's last layer is computed, its queries and MLP too, and is counted. Not counted:
padding, masked-out pairs that a kernel computes all the same, entries without a label, norms,
RoPE, softmax, embedding look-ups, the optimiser, and whatever is computed twice (`recomputed`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from bdjax.layout import clean_places
from bdjax.model import DecoderConfig, Remat
from bdjax.noise import Complement, ExactCount
from bdjax.objective import Objective
from bdjax.parameters import Role, count, is_parameter
from bdjax.step import Model
from pallas_kernels import CleanMode, Dense


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one step over the whole batch, forward and backward.

    recomputed: forward products run a second time (remat, the head's logits, flash attention's
    scores); part of `hardware` alone. MFU is total / (seconds * peak), HFU hardware / the same.
    """

    body: float
    attention: float
    head: float
    recomputed: float

    @property
    def total(self) -> float:
        """What the mathematics needs."""
        return self.body + self.attention + self.head

    @property
    def hardware(self) -> float:
        """`total` and what is computed twice."""
        return self.total + self.recomputed


def visible_pairs(
    objective: Objective, clean: CleanMode, documents: Sequence[int], block_size: int
) -> int:
    """Query-key pairs that the mask lets through in rows with these documents, by their lengths."""
    pairs = 0
    for length in documents:
        starts = np.arange(0, length, block_size)
        widths = np.minimum(length - starts, block_size)
        if objective.clean_stream:
            ends = starts + widths
            token = length * (length + 1) // 2
            pairs += token if clean is CleanMode.TOKEN else int((widths * ends).sum())
            pairs += objective.views * int((widths * starts).sum())
        pairs += objective.views * int((widths * widths).sum())
    return pairs


def scored_share(objective: Objective, block_size: int) -> float:
    """Expected share of a view's trainable tokens that is scored.

    (B + 1) / (2 B) for exact counts, 1 / 2 for complementary pairs; for other draws the mean over
    256 rows drawn on this host at step 0.
    """
    draw = getattr(objective.process, "draw", None)
    if draw is None:
        return 1.0
    if type(draw) is ExactCount:
        return (block_size + 1) / (2 * block_size)
    if isinstance(draw, Complement):
        return 0.5
    rows, length = 256, block_size * max(1, 256 // block_size)
    ones = jnp.ones((1, length), jnp.int32)
    places = jax.tree.map(lambda x: x[0], clean_places(ones, jnp.arange(length)[None], block_size))
    trainable = jnp.ones((length,), bool)
    keys = jax.random.split(jax.random.key(0), rows)
    strata = (jnp.arange(rows) + 0.5) / rows
    masked = jax.jit(jax.vmap(lambda k, s: draw.masks(k, s, places, trainable, 0, ones[0]).masked))
    return float(masked(keys, strata).mean())


def documents_of(segment: Int[np.ndarray, "B L"], objective: Objective) -> list[int]:
    """Lengths of a batch's documents as the objective sees them, without padding."""
    if not objective.documents:
        return [n for n in (segment != 0).sum(axis=1).tolist() if n]
    most = int(segment.max()) + 1
    ids = segment + most * np.arange(segment.shape[0])[:, None]
    lengths = np.bincount(ids.reshape(-1), minlength=most * segment.shape[0]).reshape(-1, most)
    return lengths[:, 1:][lengths[:, 1:] > 0].tolist()


def step_flops(
    model: Model,
    objective: Objective,
    documents: Sequence[int],
    *,
    block_size: int,
    share: float,
    labels: int | None = None,
) -> Flops:
    """Model FLOPs of one update on rows with these documents (token counts, BOS included).

    share: `scored_share` of the draw. labels: how many tokens are trainable, all but BOS by
    default. A chat's prompt has none, which spares the head; its layers run all the same, backwards
    too, since answers see its keys and values.
    """
    c = model.decoder
    tokens = sum(documents)
    labels = tokens - len(documents) if labels is None else labels
    streams = objective.views + objective.clean_stream
    matrices = layer_matrices(c)
    # Of a frozen matrix no gradient is computed: a third of its FLOPs.
    frozen = 0 if c.lora is None else matrices - layer_matrices(c, Role.ADAPTER)
    head = 6.0 if c.lora is None else 4.0
    pairs = visible_pairs(objective, c.clean, documents, block_size)
    per_pair = c.num_heads * c.head_dim * c.num_layers
    entries = share * objective.views * labels + (labels if objective.scores_ar else 0)
    vocabulary = model.readout.vocab_size * model.readout.width

    again = {
        Remat.NONE: 0.0,
        # A kernel's results are kept; dense attention has none.
        Remat.DOTS: 4.0 * pairs * per_pair if isinstance(c.attention, Dense) else 0.0,
        Remat.FULL: 2.0 * matrices * tokens * streams + 4.0 * pairs * per_pair,
    }[c.remat]
    if not isinstance(c.attention, Dense):
        again += 2.0 * pairs * per_pair
    return Flops(
        body=(6.0 * matrices - 2.0 * frozen) * tokens * streams,
        attention=12.0 * pairs * per_pair,
        head=head * vocabulary * entries,
        recomputed=again + 2.0 * vocabulary * entries,
    )


def layer_matrices(decoder: DecoderConfig, *roles: Role) -> int:
    """Parameters of the layers that multiply tokens, all or of some roles: no norms, no biases."""
    leaves = jax.tree.leaves(decoder.table()["layers"], is_leaf=is_parameter)
    asked = roles or (Role.MATRIX, Role.ADAPTER)
    return count({str(i): p for i, p in enumerate(leaves) if p.role in asked})
