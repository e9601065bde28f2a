"""What the compiled programs hold: nothing of size T x S, nothing of size rows x V."""

import re

import jax
import jax.numpy as jnp
import pytest

from bdjax import presets
from bdjax.embedding import TokenEmbedding
from bdjax.model import DecoderConfig
from bdjax.objective import Batch
from bdjax.optim import OptimConfig, make_optimiser
from bdjax.readout import TokenReadout
from bdjax.step import Model
from bdjax.train_step import TrainState, train_step
from pallas_kernels import Blockwise, Dense

ROWS, LENGTH, VOCABULARY = 2, 1024, 6007


def train_step_text(attention) -> str:
    """The train step of two rows of 1024 tokens, compiled but never run."""
    recipe = presets.default(mask_id=VOCABULARY - 1, block_size=4)
    config = DecoderConfig(
        num_layers=2,
        width=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_width=48,
        clean=recipe.clean,
        dtype="float32",
        attention=attention,
    )
    model = Model(
        decoder=config,
        embedding=TokenEmbedding(vocab_size=VOCABULARY, width=32, dtype="float32"),
        readout=TokenReadout(vocab_size=VOCABULARY, width=32, row_chunk=256, vocab_chunk=1024),
    )
    optimiser = make_optimiser(OptimConfig(), model.table(), 10)

    def state(key):
        params = model.init(key)
        return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32))

    abstract = jax.eval_shape(state, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = Batch(tokens, tokens, tokens, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_))
    lowered = train_step.lower(
        recipe.objective, model, optimiser, abstract, batch, jax.random.key(0)
    )
    return lowered.compile().as_text()


def buffers(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays in a compiled program's text."""
    found = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return {tuple(int(n) for n in shape.split(",")) for shape in found}


def squares(shapes) -> list[tuple[int, ...]]:
    """Arrays that hold a whole row of queries by a whole row of keys."""
    return [s for s in shapes if sum(n >= 2 * LENGTH for n in s) >= 2]


def logits(shapes) -> list[tuple[int, ...]]:
    """Arrays that hold the whole vocabulary for more rows than one chunk."""
    wide = [s for s in shapes if any(n >= VOCABULARY for n in s)]
    return [s for s in wide if any(n > 256 and n < VOCABULARY for n in s)]


@pytest.fixture(scope="module")
def text():
    return train_step_text(Blockwise())


@pytest.fixture(scope="module")
def blockwise(text):
    return buffers(text)


@pytest.mark.parametrize("scope", ["embedding", "attention", "mlp", "optimiser"])
def test_profiles_can_be_read_by_part(text, scope):
    assert re.search(rf'op_name="[^"]*/{scope}/', text)


def test_the_train_step_holds_no_square_of_scores(blockwise):
    assert squares(blockwise) == []


def test_the_train_step_holds_no_logits_of_all_rows(blockwise):
    """Only the two (V, D) matrices and their optimiser state may be as long as the vocabulary."""
    assert logits(blockwise) == []
    assert any(VOCABULARY in shape for shape in blockwise)


def test_the_search_would_find_them():
    """The same search sees the scores of dense attention, and logits where a head makes them."""
    assert squares(buffers(train_step_text(Dense())))

    def dense_head(hidden, head):
        return jax.nn.logsumexp(jnp.sin(hidden @ head.T), axis=-1)

    shapes = (
        jax.ShapeDtypeStruct((2 * LENGTH, 32), jnp.float32),
        jax.ShapeDtypeStruct((VOCABULARY, 32), jnp.float32),
    )
    text = jax.jit(jax.grad(lambda h, w: dense_head(h, w).sum())).lower(*shapes).compile().as_text()
    assert logits(buffers(text))
