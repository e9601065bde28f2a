"""SmolLM2-135M-Instruct (Q4_1, dequantised) through bdjax against numpy, on the real file.

The package that holds it is 93 MB: without it, everything here is skipped.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.chat import Chat, open_template
from bdjax.generation import generate, load
from bdjax.layout import clean_places
from bdjax.policies import Sequential
from bdjax.step import block_step

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
smollm2 = pytest.importorskip("smollm2")
pytest.importorskip("gguf", reason="needs the extra hf")
pytest.importorskip("tokenizers", reason="needs the extra hf")
bpe_reference = pytest.importorskip("bpe_reference")
smollm2_reference = pytest.importorskip("smollm2_reference")
pytestmark = pytest.mark.slow

PARAGRAPH = (
    "The river rises in the hills north of the town and flows south for eighty kilometres before "
    "it meets the sea. In spring, when the snow melts, it floods the meadows on both banks, and "
    "for a few weeks the road to the old mill can only be used by boat. The people who live there "
    "have learned to keep their cellars empty and their hay on the upper floor."
)
CHAT = "<|im_start|>user\nWrite one sentence about the moon.<|im_end|>\n<|im_start|>assistant\n"
# Bits per byte of four windows of 512 tokens that start at 1/5, 2/5, 3/5 and 4/5 of the text, by
# `Reference`. Other windows give others: four of them scatter by 0.05 (standard deviation).
BITS = {"tinyshakespeare": 1.607, "wikitext2-test": 1.158}


@pytest.fixture(scope="module")
def path():
    try:
        found = smollm2.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    smollm2.check(found)
    return found


@pytest.fixture(scope="module")
def model(path):
    return load(path, dtype="float32")


@pytest.fixture(scope="module")
def reference(path):
    return smollm2_reference.Reference(path)


def nll(model, ids):
    """-log p of ids[:, 1:] in nats, (B, T - 1), by one forward of the clean stream."""
    ids = jnp.asarray(ids, jnp.int32)
    at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    rows, labels = at[:, :-1], ids[:, 1:]
    with jax.set_mesh(model.config.mesh.build()):
        hidden, _ = block_step(model.model, model.params, ids, clean_places(at * 0 + 1, at, 1))
        found = model.model.readout.nll(model.params, hidden, rows, labels, labels >= 0)
    return np.asarray(found, np.float64)


def test_a_paragraph_costs_what_numpy_says(model, reference):
    ids = model.config.tokenizer.encode(PARAGRAPH)
    ours, theirs = nll(model, ids[None])[0], reference.nll(ids)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_64_greedy_tokens_are_those_of_numpy(model, reference):
    """As block size 1 out of the cache: every token read from the clean one before it."""
    prompts = [
        model.config.tokenizer.encode(PARAGRAPH),
        model.config.tokenizer.encode_with_specials(CHAT),
    ]
    written = generate(
        model,
        [ids.tolist() for ids in prompts],
        max_new_tokens=64,
        block_size=1,
        policy=Sequential(steps=1),
        temperature=0.0,
        stop=(),
    )
    for ids, ours in zip(prompts, written, strict=True):
        theirs, lead = reference.greedy(ids, 64)
        assert lead > 1e-3, "a tie: rounding decides; take another prompt"
        assert ours.tokens.tolist() == theirs


def test_the_answer_is_about_the_moon(model):
    ids = model.config.tokenizer.encode_with_specials(CHAT)
    answer = generate(model, [ids.tolist()], max_new_tokens=48, temperature=0.0)[0]
    assert answer.finish == "stop" and "moon" in answer.text


def test_a_chat_is_asked_with_every_token_of_its_template(model):
    """The first of them is BOS, which nothing brings along."""
    tokenizer, talk = model.config.tokenizer, [{"role": "user", "content": "What is the moon?"}]
    with open_template(model.config.chat_template, tokenizer, None) as renderer:
        ids = Chat(tokenizer, renderer).prompt(talk)
        text = renderer.render(talk, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system") and not tokenizer.starts_with_bos
    assert ids.tolist() == tokenizer.encode_with_specials(text).tolist()


def test_ids_are_those_of_an_independent_bpe(path, model):
    from bdjax.gguf_header import read_header

    metadata = read_header(path).metadata
    tokens, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
    code = Path(smollm2.__file__).read_text()
    world = (
        "Größe café 123 ½ Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا नमस्ते 🙂\n\n\t x²"
    )
    for text in (PARAGRAPH, CHAT, code, world, "it's WE'LL 3.14159   \n  end "):
        ids = model.config.tokenizer.encode_with_specials(text).tolist()
        assert ids == bpe_reference.encode(text, "smollm", tokens, merges, tokens[:17])
        plain = model.config.tokenizer.encode(text)
        assert model.config.tokenizer.decode(plain) == text


@pytest.mark.parametrize("name", BITS)
def test_bits_per_byte(model, name):
    places = [folder / "shared" / "data" / f"{name}.txt" for folder in ROOT.parents]
    file = next((place for place in places if place.exists()), None)
    if file is None:
        pytest.skip(f"shared/data/{name}.txt is not beside the repository")
    tokenizer = model.config.tokenizer
    ids = tokenizer.encode(file.read_bytes())
    windows = np.stack([ids[n * len(ids) // 5 :][:512] for n in range(1, 5)])
    size = tokenizer.token_bytes()[windows[:, 1:]].sum()
    bits = nll(model, windows).sum() / np.log(2) / size
    print(f"{name}: {bits:.4f} bits/byte, {size / windows[:, 1:].size:.3f} bytes/token")
    assert bits == pytest.approx(BITS[name], rel=1e-3)
