"""Laws of byte-level BPE: text comes back, bytes are counted exactly, a run keeps its file."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bdjax
from bdjax import presets
from bdjax.cli import main
from bdjax.corpus import Document
from bdjax.hf_tokenizer import HuggingFaceTokenizer, train_tokenizer

TEXT = "the cat sat on the mat, é and 𝄞; the dog did not. " * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([Document("a", TEXT.encode())], 280, folder)


def changed(tokenizer, folder, **more):
    """The same file with other JSON at its top level."""
    path = folder / "changed.json"
    path.write_text(json.dumps(json.loads(Path(tokenizer.path).read_text()) | more))
    return str(path)


# Surrogates have no UTF-8; tokens that spell specials are plain text.
texts = st.lists(
    st.one_of(st.text(), st.sampled_from(["<|bos|>", "<|mask|>", "the cat", " 𝄞", "é"]))
).map("".join)


@settings(deadline=None)
@given(texts)
def test_text_comes_back_and_every_byte_is_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and not set(ids.tolist()) & {0, 1, 2, 3}
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode([0, *ids.tolist(), 1, 2, 3]) == text
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)


def test_many_texts_at_once_are_each_alone(tokenizer, monkeypatch):
    monkeypatch.setattr("bdjax.hf_tokenizer._AT_ONCE", 2)
    texts = ["the cat", "", "é𝄞 <|mask|>", b"sat on the mat", "\n"]
    for together, alone in zip(
        tokenizer.encode_all(texts), map(tokenizer.encode, texts), strict=True
    ):
        assert together.dtype == np.int32 and together.tolist() == alone.tolist()
    with pytest.raises(ValueError, match="not UTF-8"):
        tokenizer.encode_all(["a", "b", "\ud800"])


def test_bytes_of_a_character_count_where_they_are(tokenizer):
    ids = tokenizer.encode("\U00020021")
    assert ids.size == 4 and tokenizer.token_bytes()[ids].tolist() == [1, 1, 1, 1]
    (the,) = tokenizer.encode(" the").tolist()
    assert tokenizer.token_bytes()[the] == 4 and tokenizer.decode([the]) == " the"


def test_special_ids(tokenizer):
    t = tokenizer
    assert (t.bos_id, t.eos_id, t.mask_id, t.cut_id, t.vocab_size) == (0, 1, 2, 3, 280)
    assert replace(t, cut=None).cut_id == 0
    beyond = replace(t, mask=305)
    assert (beyond.mask_id, beyond.vocab_size, beyond.token_bytes().shape) == (305, 306, (306,))
    assert beyond.decode([305, *beyond.encode("cat").tolist()]) == "cat"
    with pytest.raises(ValueError, match=r"id 306 is not one .* 0\.\.305"):
        beyond.decode([306])
    with pytest.raises(ValueError, match=r"bos='<s>' is no token of .*\(<\|bos\|>, .*number 280"):
        replace(t, bos="<s>")
    with pytest.raises(ValueError, match=r"mask=0 is BOS, EOS or CUT too; type mask=280"):
        replace(t, mask=0)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer .NFKC. changes the text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "has no ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"model": {"type": "Unigram", "vocab": []}}, "its model is Unigram"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "96 bytes and 0 tokens do not fit"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "dropout": 0.1}}, "dropout is 0.1"),
    ],
)
def test_what_would_lose_text_is_refused(tokenizer, tmp_path, more, message):
    with pytest.raises(ValueError, match=rf"changed.json is no tokenizer.json .*{message}"):
        HuggingFaceTokenizer(path=changed(tokenizer, tmp_path, **more))


def test_other_faults_say_what_to_type(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="none.json cannot be read .*train one with bdjax tok"):
        HuggingFaceTokenizer(path=str(tmp_path / "none.json"))
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(ValueError, match=r"a.json is no tokenizer.json"):
        HuggingFaceTokenizer(path=str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="--vocab-size 100 has no room .*--vocab-size 260"):
        train_tokenizer([], 100, tmp_path)
    with pytest.raises(FileExistsError, match="tokenizer.json exists; type --out"):
        train_tokenizer([], 300, Path(tokenizer.path).parent)
    with pytest.raises(ValueError, match="cannot be encoded: it is not UTF-8"):
        tokenizer.encode("\ud800")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"type pip install 'bdjax\[hf\]'"):
        HuggingFaceTokenizer(path=tokenizer.path).encode("a")


@pytest.mark.slow
def test_from_the_command_line_to_a_model_that_writes(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "bpe"
    asked = [str(tmp_path / "a.txt"), "--vocab-size", "280", "--out", str(out)]
    assert main(["tokenizer", *asked]) == 0
    printed = capsys.readouterr().out
    assert "280 ids in" in printed and "bytes per token on" in printed
    path = str(out / "tokenizer.json")
    assert f"tokenizer=bdjax.HuggingFaceTokenizer(path={path!r}, cut='<|cut|>')" in printed
    made = HuggingFaceTokenizer(path=path, cut="<|cut|>")
    recipe = presets.default(mask_id=made.mask_id, block_size=4)
    paths = (str(tmp_path / "a.txt"),)
    config = bdjax.TrainConfig(
        name="bpe",
        steps=2,
        model=bdjax.DecoderConfig(
            num_layers=1,
            width=16,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            mlp_width=16,
            dtype="float32",
            clean=recipe.clean,
        ),
        objective=recipe.objective,
        data=bdjax.DataConfig(
            source=bdjax.TextFiles(paths=paths, last=0.9),
            held_out=bdjax.TextFiles(paths=paths, first=0.9),
            row_length=16,
            batch_size=2,
        ),
        evaluation=bdjax.EvaluationConfig(every=0),
        tokenizer=made,
    )
    run = tmp_path / "run"
    bdjax.train(config, run)
    # The run no longer needs the file it was trained with.
    (out / "tokenizer.json").unlink()
    for folder in (run, run / "checkpoints", run / "checkpoints" / "2"):
        loaded = bdjax.load(folder)
        assert loaded.config.tokenizer.path == str(run / "tokenizer.json")
        assert loaded.config.tokenizer.sha256 is not None
    capsys.readouterr()
    assert main(["sample", str(run), "--prompt", "the cat", "--tokens", "6", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert not set(written["tokens"]) & {0, 2, 3}
    assert main(["evaluate", str(run), "--json", "--batches", "2"]) == 0
    capsys.readouterr()
    file = run / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert main(["sample", str(run)]) == 1
    assert "is not the tokenizer that the config names: its sha256" in capsys.readouterr().err
