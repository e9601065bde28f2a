"""Tiny GGUF files written by the `gguf` package from arrays with Hugging Face names."""

import functools
import json

import gguf
import numpy as np

WIDTH, HEADS, KV_HEADS, HEAD, MLP, LAYERS = 64, 4, 2, 16, 96, 2
TYPE = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


@functools.cache
def tokenizer(pre="smollm", text="", words=40):
    """A tokenizer.json trained on `text` with the words of `pre`, as a model's author would."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as parts

    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    start = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
    found = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        steps = [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    else:
        cut = parts.Split(Regex(start + digits[pre] + rest), "isolated")
        steps = [cut, parts.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pre == "qwen2":
        found.normalizer = normalizers.NFC()
    found.pre_tokenizer = parts.Sequence(steps)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259 + words,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=parts.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([text or "the cat sat on the mat, 12 times and 345 more"], trainer)
    return found.to_str()


def arrays(architecture, vocab_size, seed=0, tied=True):
    """Random float32 arrays with Hugging Face names and shapes."""
    draw = np.random.default_rng(seed)

    def matrix(rows, columns):
        return draw.normal(size=(rows, columns)).astype(np.float32) / np.float32(columns**0.5)

    def vector(size):
        return 1 + 0.1 * draw.normal(size=(size,)).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(vocab_size, WIDTH)}
    for layer in range(LAYERS):
        own = {
            "input_layernorm.weight": vector(WIDTH),
            "self_attn.q_proj.weight": matrix(HEADS * HEAD, WIDTH),
            "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, WIDTH),
            "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD, WIDTH),
            "self_attn.o_proj.weight": matrix(WIDTH, HEADS * HEAD),
            "post_attention_layernorm.weight": vector(WIDTH),
            "mlp.gate_proj.weight": matrix(MLP, WIDTH),
            "mlp.up_proj.weight": matrix(MLP, WIDTH),
            "mlp.down_proj.weight": matrix(WIDTH, MLP),
        }
        if architecture == "qwen2":
            sizes = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
            own |= {f"self_attn.{name}_proj.bias": vector(size) for name, size in sizes.items()}
        if architecture == "qwen3":
            own |= {f"self_attn.{name}_norm.weight": vector(HEAD) for name in "qk"}
        found |= {f"model.layers.{layer}.{name}": array for name, array in own.items()}
    found["model.norm.weight"] = vector(WIDTH)
    if not tied:
        found["lm_head.weight"] = matrix(vocab_size, WIDTH)
    return found


def stored_name(name):
    """The GGUF name of a Hugging Face name."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def interleave(rows):
    """Heads of HEAD rows with their halves interleaved, as llama.cpp stores Llama's q and k."""
    heads = rows.reshape(-1, 2, HEAD // 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def write(
    path,
    architecture="llama",
    found=None,
    *,
    kind=TYPE.F32,
    json_text=None,
    pre=None,
    metadata=None,
    extra=None,
):
    """Writes `found` (Hugging Face names) in the format `kind`; vectors stay float32.

    metadata: more keys, or other values of those there are; None leaves one out. extra: arrays, or
    (bytes of shape (rows, bytes of a row), format), under their own names.
    """
    vocabulary = json.loads(json_text or tokenizer(pre or PRE[architecture]))
    special = {token["id"]: token["content"] for token in vocabulary["added_tokens"]}
    by_id = {i: word for word, i in vocabulary["model"]["vocab"].items()} | special
    tokens = [by_id[i] for i in range(len(by_id))]
    found = arrays(architecture, len(tokens)) if found is None else found
    keys = {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": WIDTH,
        f"{architecture}.feed_forward_length": MLP,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.key_length": HEAD,
        f"{architecture}.attention.value_length": HEAD,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or PRE[architecture],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in vocabulary["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (keys | (metadata or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in found.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array)
        own = kind if array.ndim == 2 else TYPE.F32
        writer.add_tensor(stored_name(name), gguf.quantize(array, own), raw_dtype=own)
    for name, array in (extra or {}).items():
        raw, own = array if isinstance(array, tuple) else (array, None)
        writer.add_tensor(name, raw, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(array, kind):
    """What the format `kind` keeps of a matrix."""
    return array if array.ndim < 2 else gguf.dequantize(gguf.quantize(array, kind), kind)
