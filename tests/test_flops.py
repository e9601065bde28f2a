"""FLOPs are the mask's pairs, the table's parameters and XLA's own count of the same program."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bdjax import presets
from bdjax.chips import CHIPS, chip_of
from bdjax.embedding import TokenEmbedding
from bdjax.flops import documents_of, layer_matrices, scored_share, step_flops, visible_pairs
from bdjax.layout import clean_places, join_places, noisy_places
from bdjax.loss import losses, total
from bdjax.model import DecoderConfig, Remat
from bdjax.noise import Bernoulli, Scope
from bdjax.objective import Batch, BlockSize, Objective
from bdjax.parameters import count
from bdjax.readout import TokenReadout
from bdjax.step import Model
from pallas_kernels import CleanMode, Dense
from pallas_kernels.mask import dense_mask

PROCESS = presets.default(mask_id=tiny.MASK, block_size=4).objective.process


def objective(**fields) -> Objective:
    return Objective(**({"process": PROCESS, "block_size": BlockSize(first=4)} | fields))


@pytest.mark.parametrize("clean", CleanMode)
@pytest.mark.parametrize("views", [0, 1, 3])
@pytest.mark.parametrize("clean_stream", [True, False])
@pytest.mark.parametrize("size", [1, 3, 4, 17])
def test_pairs_are_those_of_the_predicate(clean, views, clean_stream, size):
    if views == 0 and not clean_stream:
        return
    documents = [9, 4, 1]
    segment = np.repeat([1, 2, 3, 0], [*documents, 2])[None]
    position = np.concatenate([np.arange(n) for n in [*documents, 2]])[None]
    stream = clean_places(jnp.asarray(segment), jnp.asarray(position), size)
    places = stream
    if views:
        noisy = noisy_places(stream, views)
        places = join_places(stream, noisy) if clean_stream else noisy
    seen = np.asarray(dense_mask(places.meta, places.meta, clean)).sum()
    wanted = objective(views=views, clean_stream=clean_stream, ar_weight=0.0 if views else 1.0)
    assert visible_pairs(wanted, clean, documents, size) == seen
    assert documents_of(segment, wanted) == documents


def test_documents_without_borders_are_rows():
    segment = np.array([[1, 1, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert documents_of(segment, objective()) == [2, 1, 4]
    assert documents_of(segment, objective(documents=False)) == [3, 4]


def test_the_formula_of_the_docstring():
    length, size = 64, 8
    block = visible_pairs(objective(), CleanMode.BLOCK, [length], size)
    token = visible_pairs(objective(), CleanMode.TOKEN, [length], size)
    assert block == length**2 + length * size
    assert token == length**2 + length * (size + 1) // 2


def qwen3_1_7b() -> Model:
    return Model(
        decoder=DecoderConfig(
            num_layers=28,
            width=2048,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            mlp_width=6144,
            qk_norm=True,
            tied_head=True,
            clean=CleanMode.BLOCK,
        ),
        embedding=TokenEmbedding(vocab_size=151_936, width=2048),
        readout=TokenReadout(vocab_size=151_936, width=2048, tied=True),
    )


def test_qwen3_1_7b_costs_20_7_gigaflops_per_data_token():
    """Two-stream row of 4096 tokens in blocks of 4, half of the noisy tokens masked."""
    model, length = qwen3_1_7b(), 4096
    assert count(model.table()) == pytest.approx(1.72e9, rel=0.01)
    found = step_flops(model, objective(), [length], block_size=4, share=0.5)
    assert found.total / length == pytest.approx(20.7e9, rel=0.01)
    assert found.body / length == pytest.approx(16.9e9, rel=0.01)
    assert found.attention / length == pytest.approx(2.8e9, rel=0.01)
    assert found.head / length == pytest.approx(0.93e9, rel=0.01)
    # Full remat runs the body's and attention's forward products again.
    assert found.recomputed > (found.body + found.attention) / 3


def test_norms_and_biases_multiply_nothing():
    c = tiny.model().decoder
    assert layer_matrices(replace(c, qkv_bias=True, qk_norm=True)) == layer_matrices(c)
    assert layer_matrices(c) == 2 * (2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 3 * 32 * 48)


def test_the_share_of_scored_tokens():
    assert scored_share(objective(), 4) == 5 / 8
    for scope in Scope:
        draw = Bernoulli(scope=scope, low=0.3, high=0.8)
        banded = objective(process=replace(PROCESS, draw=draw))
        assert scored_share(banded, 16) == pytest.approx(0.55, abs=0.01)


def test_the_drawn_share_is_the_closed_form():
    """The path of unknown draws, taken by a draw whose share is known."""

    class Same(type(PROCESS.draw)):
        """The exact counts under another name."""

    drawn = scored_share(objective(process=replace(PROCESS, draw=Same())), 4)
    assert drawn == pytest.approx(5 / 8, abs=0.01)


@pytest.mark.slow
def test_xla_counts_the_same_products():
    """One layer, dense attention, no remat: XLA's FLOPs of loss and gradient on CPU.

    The program multiplies all pairs instead of the visible ones, reads all entries instead of the
    scored ones, and computes the logits twice; elementwise work adds a few per cent.
    """
    length, width, vocab, views = 64, 256, 512, 2
    model = Model(
        decoder=DecoderConfig(
            num_layers=1,
            width=width,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            mlp_width=768,
            dtype="float32",
            remat=Remat.NONE,
            attention=Dense(),
        ),
        embedding=TokenEmbedding(vocab_size=vocab, width=width, dtype="float32"),
        readout=TokenReadout(vocab_size=vocab, width=width, row_chunk=4096),
    )
    wanted = objective(views=views, ar_weight=0.5)
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    batch = Batch(tokens, tokens, tokens, jax.ShapeDtypeStruct((2, length), jnp.bool_))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(params, batch):
        return total(wanted, losses(wanted, model, params, batch, 4, jax.random.key(0)))

    found = jax.jit(jax.grad(loss)).lower(params, batch).compile().cost_analysis()["flops"]
    ours = step_flops(model, wanted, [length, length], block_size=4, share=1.0)
    pairs = visible_pairs(wanted, CleanMode.TOKEN, [length, length], 4)
    dense = ours.attention * 2 * ((1 + views) * length) ** 2 / pairs
    expected = ours.body + dense + ours.head * 8 / 6
    assert 0.98 < found / expected < 1.06


def test_chips_are_found_by_the_kind_of_their_devices():
    names = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    names |= {"TPU7x": "7x", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
    for kind, name in names.items():
        assert chip_of(kind).name == name
    assert chip_of("cpu") is None
    assert chip_of("NVIDIA H100 PCIe") is None
    seven = next(chip for chip in CHIPS if chip.name == "7x")
    assert chip_of("TPU7x").flops == seven.flops / 2
