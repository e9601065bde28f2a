"""GGUF files read as Hugging Face models: what was written is read, and nothing else is."""

import math
import sys

import numpy as np
import pytest

from bdjax.gguf_file import open_gguf
from bdjax.gguf_header import read_header
from bdjax.pretrained import PretrainedError

gguf = pytest.importorskip("gguf", reason="needs the extra hf")
pytest.importorskip("tokenizers", reason="needs the extra hf")
files = pytest.importorskip("gguf_files")
TYPE = files.TYPE

ARCHITECTURES = ("llama", "qwen2", "qwen3")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A llama file in Q8_0, with everything that others change."""
    return files.write(tmp_path_factory.mktemp("gguf") / "llama.gguf", kind=TYPE.Q8_0)


def written(path, data):
    path.write_bytes(data)
    return path


def values_of(pretrained):
    """All tensors, whole."""
    tensors = pretrained.tensors
    return {name: tensors.read(name, ()) for name in tensors.shapes}


@pytest.mark.parametrize("kind", [TYPE.F32, TYPE.F16, TYPE.Q8_0, TYPE.Q4_1], ids=lambda k: k.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_written_is_read(tmp_path, architecture, kind):
    tied = kind is not TYPE.F16
    found = files.arrays(architecture, 282, tied=tied)
    path = files.write(tmp_path / "x.gguf", architecture, found, kind=kind)
    pretrained = open_gguf(path)
    assert pretrained.config["tie_word_embeddings"] is tied
    assert pretrained.tensors.shapes == {name: array.shape for name, array in found.items()}
    read = values_of(pretrained)
    for name, array in found.items():
        assert read[name].dtype == pretrained.tensors.dtypes[name] == "float32"
        np.testing.assert_array_equal(read[name], files.rounded(array, kind), err_msg=name)


@pytest.mark.parametrize("kind", ["BF16", "Q4_0", "Q5_0", "Q5_1", *K_QUANTS])
def test_every_format_is_read_as_the_package_does(tmp_path, kind):
    kind = TYPE[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = max(2, 64 // block)
    raw = np.random.default_rng(0).integers(0, 256, (5, blocks * size)).astype(np.uint8)
    path = files.write(tmp_path / "x.gguf", extra={"own": (raw, kind)})
    with np.errstate(all="ignore"):
        whole = gguf.dequantize(raw, kind)
        tensors = open_gguf(path).tensors
        np.testing.assert_array_equal(tensors.read("own", ()), whole)
        columns = slice(block // 2 + 1, block + 1)
        part = tensors.read("own", (slice(1, 4), columns))
    np.testing.assert_array_equal(part, whole[1:4, columns])


def test_slices_equal_the_whole(llama, tmp_path):
    # Biases of interleaved heads too, which only other models of the Llama architecture have.
    found = files.arrays("llama", 282)
    found["model.layers.0.self_attn.q_proj.bias"] = np.arange(64, dtype=np.float32)
    tensors = open_gguf(files.write(tmp_path / "x.gguf", found=found, kind=TYPE.Q4_1)).tensors
    draw = np.random.default_rng(1)
    for name, shape in tensors.shapes.items():
        whole = tensors.read(name, tuple(slice(0, size) for size in shape))
        np.testing.assert_array_equal(whole, files.rounded(found[name], TYPE.Q4_1))
        for _ in range(10):
            index = tuple(slice(*sorted(draw.integers(0, size + 1, 2))) for size in shape)
            np.testing.assert_array_equal(tensors.read(name, index), whole[index])
    assert tensors.read(Q, (slice(3, 3),)).shape == (0, 64)
    with pytest.raises(PretrainedError, match="step 1"):
        tensors.read(Q, (slice(0, 4, 2),))


def test_only_what_is_asked_for_is_dequantised(llama, monkeypatch):
    tensors = open_gguf(llama).tensors
    seen = []
    dequantize = gguf.dequantize

    def counted(raw, kind):
        found = dequantize(raw, kind)
        seen.append(found.size)
        return found

    monkeypatch.setattr(gguf, "dequantize", counted)
    tensors.read("model.layers.0.mlp.up_proj.weight", (slice(10, 14), slice(40, 60)))
    assert sum(seen) == 4 * 32
    seen.clear()
    # The rows of a head are needed together.
    tensors.read(Q, (slice(20, 24),))
    assert sum(seen) == files.HEAD * files.WIDTH


def test_many_rows_are_dequantised_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("bdjax.gguf_tensors._CHUNK", 3 * files.WIDTH)
    found = files.arrays("llama", 282)
    path = files.write(tmp_path / "x.gguf", found=found, kind=TYPE.Q8_0)
    for name, array in values_of(open_gguf(path)).items():
        np.testing.assert_array_equal(array, files.rounded(found[name], TYPE.Q8_0))


def test_config_and_generation_say_what_the_file_says(llama):
    pretrained = open_gguf(llama)
    assert pretrained.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 282,
        "hidden_size": files.WIDTH,
        "intermediate_size": files.MLP,
        "num_hidden_layers": files.LAYERS,
        "num_attention_heads": files.HEADS,
        "num_key_value_heads": files.KV_HEADS,
        "head_dim": files.HEAD,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert pretrained.generation == {"bos_token_id": 1, "eos_token_id": 2}
    assert pretrained.tokenizer_config["eos_token"] == "<|im_end|>"
    assert pretrained.chat_template == "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_every_end_of_a_turn_is_kept(tmp_path):
    ends = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2}
    pretrained = open_gguf(files.write(tmp_path / "x.gguf", metadata=ends))
    assert pretrained.generation["eos_token_id"] == [2, 0]


def divisors(factor, low=1.0, high=4.0):
    """rope_freqs.weight: what Llama 3.1 divides its frequencies by, from its wavelengths."""
    found = []
    for i in range(files.HEAD // 2):
        wavelength = 2 * math.pi * 10_000.0 ** (2 * i / files.HEAD)
        smooth = (8192 / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        found.append(1 / (smooth + (1 - smooth) / factor))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_frequencies_of_llama_3_are_honoured(tmp_path, factor):
    extra = {"rope_freqs.weight": divisors(factor)}
    pretrained = open_gguf(files.write(tmp_path / "x.gguf", extra=extra))
    assert "rope_freqs.weight" not in pretrained.tensors.shapes
    assert pretrained.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("extra", [divisors(8.0, high=3.0), divisors(8.0)[:-1], np.zeros(8, "f4")])
def test_other_frequencies_are_refused(tmp_path, extra):
    path = files.write(tmp_path / "x.gguf", extra={"rope_freqs.weight": extra})
    with pytest.raises(PretrainedError, match=r"rope_freqs\.weight"):
        open_gguf(path)


REFUSED = {
    "sliding window": ({"llama.attention.sliding_window": 4096}, "sliding_window=4096"),
    "experts": ({"llama.expert_count": 8}, "expert_count=8"),
    "partial RoPE": ({"llama.rope.dimension_count": 8}, "dimension_count=8"),
    "other scale": ({"llama.logit_scale": 2.0}, r"logit_scale=2\.0"),
    "no layers": ({"llama.block_count": None}, "llama.block_count"),
    "more layers": ({"llama.block_count": 2**31}, "2147483648"),
    "heads by layer": ({"llama.attention.head_count_kv": [2, 1]}, r"\[2, 1\]"),
    "no width": ({"llama.embedding_length": 0}, "token_embd"),
    "no heads": ({"llama.attention.head_count": 0}, "0 heads"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "nan"),
    "part of a model": ({"split.count": 3}, "llama-gguf-split --merge"),
    "adapter": ({"general.type": "adapter"}, "'adapter'"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
    "SentencePiece": ({"tokenizer.ggml.model": "llama"}, "'llama'"),
    "unknown words": ({"tokenizer.ggml.pre": "tekken"}, "'tekken'"),
    "no words": ({"tokenizer.ggml.pre": None}, "None"),
    "prefix space": ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix"),
    "types": ({"tokenizer.ggml.token_type": [1, 2]}, "token_type"),
    "merges": ({"tokenizer.ggml.merges": ["a b c"]}, "'a b c'"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges"),
    "eos": ({"tokenizer.ggml.eos_token_id": 282}, "expected 0 to 281"),
    "alignment": ({"general.alignment": 24}, "24"),
}


ANY_TYPE = ("general.architecture", "general.type", "split.count", "general.alignment")
ANY_TYPE += ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix")
ANY_TYPE += ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
ANY_TYPE += ("tokenizer.ggml.bos_token_id", "tokenizer.chat_template", "llama.rope.freq_base")
ANY_TYPE += ("llama.rope.scaling.type", "llama.block_count", "llama.vocab_size")


@pytest.mark.parametrize("value", [[1, 2], ["a", "b"], -1.5, 1e38], ids=str)
@pytest.mark.parametrize("key", ANY_TYPE)
def test_values_of_a_wrong_type_are_refused(tmp_path, key, value):
    path = files.write(tmp_path / "x.gguf", metadata={key: value})
    with pytest.raises(PretrainedError):
        open_gguf(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, name):
    metadata, message = REFUSED[name]
    path = files.write(tmp_path / "x.gguf", metadata=metadata)
    with pytest.raises(PretrainedError, match=message):
        open_gguf(path)


def test_other_architectures_are_refused_by_name(tmp_path):
    path = files.write(tmp_path / "x.gguf", "llama", metadata={"general.architecture": "gemma3"})
    with pytest.raises(PretrainedError, match="'gemma3', .*take a file of one of these: llama"):
        open_gguf(path)


def test_formats_without_numbers_are_refused(tmp_path):
    path = files.write(tmp_path / "x.gguf", extra={"own": np.zeros((2, 64), np.int32)})
    with pytest.raises(PretrainedError, match="type 26"):
        open_gguf(path)


def test_rows_that_are_no_heads_are_refused(tmp_path):
    found = files.arrays("llama", 282)
    del found[Q]
    extra = {"blk.0.attn_q.weight": np.zeros((56, 64), np.float32)}
    path = files.write(tmp_path / "x.gguf", found=found, extra=extra)
    with pytest.raises(PretrainedError, match="56 rows"):
        open_gguf(path)


@pytest.mark.parametrize(
    "start, message",
    [
        (b"", "no GGUF file"),
        (b"GGUF", "not whole"),
        (b"PK\x03\x04 and more", "no GGUF file"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "version 1"),
        (b"GGUF\x03\x00\x00\x00" + bytes(8), "not whole"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "18446744073709551615 tensors"),
        # No tensor, one key of 2^40 bytes.
        (b"GGUF\x03\x00\x00\x00" + bytes(8) + b"\x01" + bytes(12) + b"\x01" + bytes(7), "a key"),
    ],
)
def test_what_is_no_gguf_file_is_told_in_a_sentence(tmp_path, start, message):
    with pytest.raises(PretrainedError, match=message):
        open_gguf(written(tmp_path / "x.gguf", start))


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(OSError, match=path.name):
            open_gguf(path)


def test_a_file_cut_anywhere_or_with_more_behind_it_is_refused(llama, tmp_path):
    data = llama.read_bytes()
    header = read_header(llama)
    inside = np.linspace(0, header.start, 60).astype(int)
    behind = np.linspace(header.start, len(data) - 32, 20).astype(int)
    for size in {*inside.tolist(), *behind.tolist()}:
        with pytest.raises(PretrainedError):
            open_gguf(written(tmp_path / "x.gguf", data[:size]))
    with pytest.raises(PretrainedError, match="bytes follow its last tensor"):
        open_gguf(written(tmp_path / "x.gguf", data + bytes(64)))


def test_tensors_that_change_places_are_refused(llama, tmp_path):
    """Two of one shape: only their order tells that one would be read as the other."""
    data, places = bytearray(llama.read_bytes()), []
    for name in (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"):
        # Behind the name: the number of axes, two sizes and the type, then the offset.
        begin = data.find(name) + len(name) + 4 + 2 * 8 + 4
        places.append(slice(begin, begin + 8))
    one, other = places
    data[one], data[other] = data[other], data[one]
    with pytest.raises(PretrainedError, match=r"blk\.0\.attn_k\.weight' lies at byte"):
        open_gguf(written(tmp_path / "x.gguf", data))


def test_a_file_that_gets_shorter_is_told(llama, tmp_path):
    path = written(tmp_path / "x.gguf", llama.read_bytes())
    tensors = open_gguf(path).tensors
    written(path, llama.read_bytes()[: read_header(path).start])
    with pytest.raises(PretrainedError, match="got shorter"):
        tensors.read(Q, ())


def test_without_the_package_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PretrainedError, match=r"pip install 'bdjax\[hf\]'"):
        open_gguf(llama)
