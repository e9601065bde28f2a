"""The tokenizer in a GGUF file: its ids are the author's and those of an independent BPE."""

import json

import bpe_reference
import pytest

from bdjax.gguf_file import open_gguf
from bdjax.gguf_header import read_header
from bdjax.pretrained import PretrainedError

pytest.importorskip("gguf", reason="needs the extra hf")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
files = pytest.importorskip("gguf_files")

TEXTS = (
    "The cat's 3 mats cost 1234567 and $5.60; they'll WE'LL don't.",
    "  two  spaces,\ttabs\t\tand\n\n\nlines \r\n  at the end   ",
    "Größe, café, cafe\u0301, naïve; Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا नमस्ते",
    "🙂🙂🏽 👩‍👩‍👧 ½ Ⅷ ٣٤٥ x²",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # 0x1F\n\n\tif a>=b&&c!=d { a[i++]="\\n"; }',
    "'S 'T don'T \u00a0\u2003wide\u3000spaces\u2028",
    "",
    " ",
    "\n",
)
TRAINED = " ".join(TEXTS) * 3 + " the cat sat on the mats and the hats " * 5
WHOLE = "two xylophones"
CHAT = "<|im_start|>user\nHow many <|im_end|> in 12 cats?<|im_end|>\n<|im_start|>assistant\n"
PRES = {"smollm": "llama", "llama-bpe": "llama", "qwen2": "qwen2"}


@pytest.fixture(scope="module", params=PRES)
def read(request, tmp_path_factory):
    """Name of the rules, the author's tokenizer, metadata of the file, what was read of it."""
    pre = request.param
    # A token that no merges lead to: Llama 3 takes it for the whole word, the others never.
    author = json.loads(files.tokenizer(pre, TRAINED, 300))
    size = len(author["model"]["vocab"]) + 1
    author["model"]["vocab"]["Ġxylophones"] = size - 1
    text = json.dumps(author)
    path = tmp_path_factory.mktemp(pre) / "x.gguf"
    found = files.arrays(PRES[pre], size)
    files.write(path, PRES[pre], found, json_text=text, pre=pre)
    return pre, text, read_header(path).metadata, open_gguf(path).tokenizer_json


@pytest.mark.parametrize("text", [*TEXTS, TRAINED, CHAT, WHOLE], ids=range(len(TEXTS) + 3))
def test_ids_are_those_of_the_author_and_of_an_independent_bpe(read, text):
    pre, author, metadata, found = read
    ids = tokenizers.Tokenizer.from_str(found).encode(text, add_special_tokens=False).ids
    tokens, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
    assert ids == bpe_reference.encode(text, pre, tokens, merges, tokens[:3])
    assert ids == tokenizers.Tokenizer.from_str(author).encode(text).ids


def test_the_rules_differ_on_these_texts(read):
    # Otherwise the test above would not tell one name from another.
    pre, _, metadata, _ = read
    tokens, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
    for other in PRES:
        same = [
            bpe_reference.encode(text, pre, tokens, merges, tokens[:3])
            == bpe_reference.encode(text, other, tokens, merges, tokens[:3])
            for text in (*TEXTS, TRAINED)
        ]
        assert all(same) == (other == pre)


def test_ids_decode_to_the_text(read):
    pre, _, _, found = read
    tokenizer = tokenizers.Tokenizer.from_str(found)
    for text in TEXTS:
        shown = tokenizer.decode(tokenizer.encode(text).ids)
        assert shown == ("".join(bpe_reference.words(text, pre)) if pre == "qwen2" else text)


def test_types_of_tokens_are_kept(tmp_path):
    vocabulary = json.loads(files.tokenizer())
    size = len(vocabulary["model"]["vocab"])
    kinds = [3, 3, 3, *[1] * (size - 3)]
    tokens = [word for word, _ in sorted(vocabulary["model"]["vocab"].items(), key=lambda x: x[1])]
    # A tag that authors added as plain text, and two rows that fill the embedding up.
    tokens += ["<tool>", "[PAD283]", "[PAD284]"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*kinds, 4, 5, 5],
    }
    found = files.arrays("llama", len(tokens))
    pretrained = open_gguf(files.write(tmp_path / "x.gguf", found=found, metadata=metadata))
    read = json.loads(pretrained.tokenizer_json)
    added = {token["content"]: (token["id"], token["special"]) for token in read["added_tokens"]}
    assert added == {
        "<|end|>": (0, True),
        "<|im_start|>": (1, True),
        "<|im_end|>": (2, True),
        "<tool>": (size, False),
    }
    tokenizer = tokenizers.Tokenizer.from_str(pretrained.tokenizer_json)
    assert tokenizer.get_vocab_size() == size + 1
    assert size in tokenizer.encode("use a <tool> now").ids
    assert "<tool>" in tokenizer.decode(tokenizer.encode("use a <tool> now").ids)


@pytest.mark.parametrize("adds", [True, False])
def test_bos_heads_a_text_where_the_file_says_so(tmp_path, adds):
    metadata = {"tokenizer.ggml.add_bos_token": adds}
    pretrained = open_gguf(files.write(tmp_path / "x.gguf", metadata=metadata))
    tokenizer = tokenizers.Tokenizer.from_str(pretrained.tokenizer_json)
    plain = tokenizer.encode("a cat", add_special_tokens=False).ids
    assert tokenizer.encode("a cat").ids == [1] * adds + plain
    pair = tokenizer.encode("a cat", "a cat").ids
    assert pair == 2 * ([1] * adds + plain)
    assert pretrained.tokenizer_config["add_bos_token"] is adds


@pytest.mark.parametrize("pre", PRES)
def test_bos_heads_a_text_of_llama_3_where_the_file_is_silent(tmp_path, pre):
    """As llama.cpp has it: the first files of Llama 3 were written without the key."""
    path = files.write(
        tmp_path / "x.gguf", PRES[pre], metadata={"tokenizer.ggml.add_bos_token": None}, pre=pre
    )
    found = open_gguf(path)
    ids = tokenizers.Tokenizer.from_str(found.tokenizer_json).encode("a cat").ids
    assert (ids[0] == 1) is found.tokenizer_config["add_bos_token"] is (pre == "llama-bpe")


def test_a_token_that_is_there_twice_is_refused(tmp_path):
    tokens = [f"{i}" for i in range(281)] + ["7"]
    path = files.write(tmp_path / "x.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(PretrainedError, match="token twice"):
        open_gguf(path)
