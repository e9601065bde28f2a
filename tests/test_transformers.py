"""Imported models against the library `transformers`: hidden states, logits, tokens, and back.

Remote families are their base architecture under another name, as their authors say: SDAR is Qwen3,
Fast-dLLM v2 and Dream are Qwen2, LLaDA is Llama with other names.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import BOS, EOS, MASK, TEXT, TYPES, config, network, tokenizer_json

import bdjax
from bdjax.corpus import Document
from bdjax.families import family_of
from bdjax.hf_folder import INDEX, read_folder
from bdjax.hf_tokenizer import HuggingFaceTokenizer
from bdjax.layout import clean_places
from bdjax.step import block_step
from bdjax.weights import check_tensors, load_parameters, stored
from pallas_kernels import CleanMode

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

ROWS, LENGTH = 288, 40
CLASSES = {
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "sdar": "Qwen3ForCausalLM",
    "Fast_dLLM_Qwen": "Qwen2ForCausalLM",
    "Dream": "Qwen2ForCausalLM",
    "llada": "LlamaForCausalLM",
}
every_type = pytest.mark.parametrize("model_type", TYPES)


def theirs(model_type: str):
    """A random model of the library with the sizes and settings of `pretrained.config`."""
    kind = getattr(transformers, CLASSES[model_type])
    family = family_of(model_type, "test")
    base = family_of(kind.config_class.model_type, "test")
    ours = {own: name for name, own in family.keys.items()}
    keys = {ours.get(key, key): value for key, value in config(model_type).items()}
    own = {key: keys[key] for key in keys if key not in ("model_type", "block_type")}
    torch.manual_seed(0)
    model = kind(kind.config_class(**own, pad_token_id=0)).eval().to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, base


def save(model, base, model_type: str, folder: Path, **options) -> Path:
    """Its folder, with the names and config of the family that it stands for."""
    model.save_pretrained(folder, **options)
    family = family_of(model_type, "test")
    if family is base:
        return folder
    if family.layer is not base.layer:
        renamed = {base.embed: family.embed, base.head: family.head}
        renamed[base.final_norm] = family.final_norm
        for layer in range(4):
            for name in family.layer:
                old = base.layers.format(layer) + base.layer[name]
                renamed[old] = family.layers.format(layer) + family.layer[name]
        state = {renamed[k]: v.contiguous() for k, v in model.state_dict().items()}
        import safetensors.torch

        safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(model_type)))
    return folder


def block_mask(block: int, batch: int):
    """Additive (B, 1, L, L): a token sees its own block and those before."""
    block_of = np.arange(LENGTH) // block
    seen = block_of[:, None] >= block_of[None, :]
    mask = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)
    return torch.tensor(np.broadcast_to(mask, (batch, 1, LENGTH, LENGTH)).copy())


def states(folder: Path, tokens, block: int | None):
    """Our hidden states and logits, token-causal or block-causal."""
    found = read_folder(folder)
    family, model = network(found)
    wanted = stored(family, model.table(), ROWS)
    check_tensors(found, family, wanted)
    params = load_parameters(found, wanted)
    mode = CleanMode.TOKEN if block is None else CleanMode.BLOCK
    model = replace(model, decoder=replace(model.decoder, clean=mode))
    at = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    places = clean_places(at * 0 + 1, at, block or 1)
    hidden, _ = block_step(model, params, jnp.asarray(tokens), places)
    return np.asarray(hidden), np.asarray(hidden @ model.readout.matrix(params, hidden.dtype).T)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, ROWS, (2, LENGTH))


@every_type
@pytest.mark.parametrize("block", [None, 4, LENGTH])
def test_hidden_states_and_logits_are_those_of_transformers(model_type, block, tokens, tmp_path):
    model, base = theirs(model_type)
    folder = save(model, base, model_type, tmp_path)
    mask = None if block is None else block_mask(block, len(tokens))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens), attention_mask=mask, output_hidden_states=True)
    hidden, logits = states(folder, tokens, block)
    np.testing.assert_allclose(hidden, wanted.hidden_states[-1].numpy(), atol=1e-4)
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-4)
    assert np.abs(logits).max() > 1


def test_the_two_masks_differ(tokens, tmp_path):
    model, base = theirs("qwen3")
    folder = save(model, base, "qwen3", tmp_path)
    causal, blocks = (states(folder, tokens, block)[1] for block in (None, 4))
    assert np.abs(causal - blocks).max() > 0.1


def test_shards_with_an_index_are_one_model(tokens, tmp_path):
    model, base = theirs("qwen2")
    one = save(model, base, "qwen2", tmp_path / "one")
    many = save(model, base, "qwen2", tmp_path / "many", max_shard_size="60KB")
    assert (many / INDEX).exists() and len(list(many.glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(states(one, tokens, None)[1], states(many, tokens, None)[1])


def test_the_config_of_transformers_4_means_the_same(tokens, tmp_path):
    """rope_theta and rope_scaling at the top, torch_dtype, and null where the class has a rule."""
    model, base = theirs("llama")
    folder = save(model, base, "llama", tmp_path)
    wanted = states(folder, tokens, None)[1]
    found = json.loads((folder / "config.json").read_text())
    rope = found.pop("rope_parameters")
    older = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    del found["dtype"], found["head_dim"]
    (folder / "config.json").write_text(json.dumps(found | older | {"num_key_value_heads": 2}))
    np.testing.assert_array_equal(states(folder, tokens, None)[1], wanted)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_json(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "qwen2", "qwen3", "sdar", "llada"])
def test_an_export_is_the_same_model_in_transformers(model_type, tokens, tokenizer, tmp_path):
    model, base = theirs(model_type)
    folder = save(model, base, model_type, tmp_path / "there")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    out = bdjax.export_model(bdjax.load(folder), tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(back).__name__ == CLASSES[model_type]
    for block in (None, 4):
        mask = None if block is None else block_mask(block, len(tokens))
        with torch.no_grad():
            wanted = model(torch.tensor(tokens), attention_mask=mask).logits
            got = back(torch.tensor(tokens), attention_mask=mask).logits
        np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=1e-4)
    assert back.generation_config.eos_token_id == EOS
    read = transformers.AutoTokenizer.from_pretrained(out)
    assert (
        read("the cat")["input_ids"] == bdjax.load(out).config.tokenizer.encode("the cat").tolist()
    )


def test_a_model_of_our_own_is_served_by_transformers(tokens, tmp_path):
    from test_exporting import model_of

    from bdjax.tokenizer import ByteTokenizer

    own = model_of(ByteTokenizer(), qk_norm=True, tied_head=True, head_dim=16)
    out = bdjax.export_model(own, tmp_path / "out", shard_bytes=20_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = tokens % ByteTokenizer.vocab_size
    at = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    hidden, _ = block_step(own.model, own.params, jnp.asarray(ids), clean_places(at * 0 + 1, at, 8))
    logits = np.asarray(hidden @ own.model.readout.matrix(own.params, hidden.dtype).T)
    with torch.no_grad():
        got = back(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(got, logits[..., : ByteTokenizer.vocab_size], atol=1e-4)
    read = transformers.AutoTokenizer.from_pretrained(out)
    text = "naïve 𝄞\n\tcode()  <|eos|>"
    bytes_ = [
        ByteTokenizer.bos_id,
        *ByteTokenizer().encode(text[:-7]).tolist(),
        ByteTokenizer.eos_id,
    ]
    assert read(text)["input_ids"] == bytes_
    assert read.decode(bytes_, skip_special_tokens=True) == text[:-7]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_greedy_text_is_that_of_generate(model_type, tokenizer, tmp_path):
    """Blocks of one token, token-causal, read from the clean token before: an AR model."""
    model, base = theirs(model_type)
    folder = save(model, base, model_type, tmp_path)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    loaded = bdjax.load(folder)
    prompts = [[5, 9, 200, 31, 7], [40, 41]]
    written = bdjax.generate(loaded, prompts, max_new_tokens=24, temperature=0.0)
    for prompt, got in zip(prompts, written, strict=True):
        with torch.no_grad():
            wanted = model.generate(
                torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=EOS
            )[0, len(prompt) :].numpy()
        assert got.tokens.tolist() == wanted.tolist()
        with torch.no_grad():
            whole = model(torch.tensor([[*prompt, *wanted.tolist()]])).logits[0]
        said = torch.log_softmax(whole, -1)[len(prompt) - 1 : -1]
        said = said.gather(-1, torch.tensor(wanted)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(got.logprob_raw, said, atol=1e-4)


def test_evaluation_is_the_likelihood_of_transformers(tokenizer, tmp_path):
    model, base = theirs("qwen2")
    folder = save(model, base, "qwen2", tmp_path)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    loaded = bdjax.load(folder)
    texts = ["the cat sat on the mat", "é and 𝄞", "the dog did not. the dog"]
    documents = [Document(str(n), text.encode()) for n, text in enumerate(texts)]
    found = bdjax.evaluate(loaded, documents)
    nats = tokens = 0
    for text in texts:
        ids = torch.tensor([[BOS, *loaded.config.tokenizer.encode(text).tolist(), EOS]])
        with torch.no_grad():
            said = torch.log_softmax(model(ids).logits[0, :-1], -1)
        nats -= said.gather(-1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    assert (found.tokens, found.bytes) == (tokens, sum(len(text.encode()) for text in texts))
    np.testing.assert_allclose(found.ar.nats_per_token, nats / tokens, rtol=1e-4)
    assert found.diffusion is None


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "The quick brown fox, 1234567 times; don't!",
    "El niño comió una manzana. Grüße aus Köln. Ça va?",
    "Съешь ещё этих мягких французских булок. 春眠不觉晓，处处闻啼鸟。こんにちは",
    "مرحبا بالعالم हिन्दी ไทย 한국어 עברית",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # 0x1F\r\n\r\n    pass\n",
    "e\u0301 \u1e9b\u0323 \u2126 👩‍👩‍👧‍👦 𝄞 \u00a0\u3000 ﬁ",
    "<|bos|>user\nhi<|eos|>\n<think>\n</think> <|mask|>",
    "",
    " ",
    "\n\n\n   \t x",
)


def real_tokenizers():
    """Tokenizers put together like those of the families, trained on the texts above."""
    tokenizers = pytest.importorskip("tokenizers")
    pre, rex = tokenizers.pre_tokenizers, tokenizers.Regex
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre.Sequence([pre.Split(rex(QWEN), "isolated"), level])
    digits = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)])
    made = {}
    for name, steps in (("qwen", split), ("llama", split), ("smol", digits)):
        one = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=name == "llama"))
        one.normalizer = tokenizers.normalizers.NFC() if name == "qwen" else None
        one.pre_tokenizer, one.decoder = steps, tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|bos|>", "<|eos|>", "<|mask|>"],
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        )
        one.train_from_iterator([*TEXTS, TEXT], trainer)
        one.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
        one.add_tokens([tokenizers.AddedToken("</think>", special=False, normalized=False)])
        if name == "llama":
            one.post_processor = tokenizers.processors.TemplateProcessing(
                single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
            )
        made[name] = one.to_str()
    return made


def test_token_ids_are_those_of_transformers(tmp_path):
    for name, text in real_tokenizers().items():
        path = tmp_path / f"{name}.json"
        path.write_text(text, encoding="utf-8")
        library = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path), clean_up_tokenization_spaces=False
        )
        ours = HuggingFaceTokenizer(path=str(path))
        assert ours.adds_bos() == (name == "llama") and ours.mask_id == MASK
        sizes = ours.token_bytes()
        for one in TEXTS:
            wanted = library(one, add_special_tokens=False)["input_ids"]
            assert ours.encode_with_specials(one).tolist() == wanted, (name, one)
            ids = ours.encode(one)
            normal = ours.normalised(one)
            if "<|" not in one:
                assert ids.tolist() == wanted
            assert sizes[ids].sum() == len(normal.encode()) and ours.decode(ids) == normal
            assert library.decode(wanted, skip_special_tokens=True) == ours.decode(wanted)
