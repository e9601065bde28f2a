"""Laws of exporting: what was imported is written again bitwise and is the same model again."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from pretrained import IDS, ROWS, TYPES, pretrained, random_params, tokenizer_json, write_folder

import bdjax
from bdjax import presets
from bdjax.cli import main
from bdjax.hf_folder import INDEX, read_folder
from bdjax.hf_tokenizer import HuggingFaceTokenizer
from bdjax.pretrained import PretrainedError
from bdjax.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    return tokenizer_json(tmp_path_factory.mktemp("tokenizer"))


def contents(folder) -> dict[str, bytes]:
    tensors = read_folder(folder).tensors
    return {
        name: tensors.read(name, tuple(slice(0, n) for n in shape)).tobytes()
        for name, shape in tensors.shapes.items()
    }


def equal_bitwise(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_is_written_as_it_was_read(model_type, tokenizer, tmp_path):
    found = pretrained(model_type, dtype="bfloat16" if model_type == "sdar" else "float32")
    generation = {"eos_token_id": [1, 3]}
    there = write_folder(tmp_path / "there", found, tokenizer, generation_config=generation)
    template = "{% for m in messages %}{{ m.role }}: é{{ m.content }}{% endfor %}"
    (there / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    loaded = bdjax.load(there)
    back = bdjax.export_model(loaded, tmp_path / "back", model_type=model_type)
    assert contents(back) == contents(there)
    again = bdjax.load(back)
    equal_bitwise(again.params, loaded.params)
    assert again.model == loaded.model and again.config.tokenizer == loaded.config.tokenizer
    assert again.config.objective == loaded.config.objective
    assert again.config.chat_template.text == loaded.config.chat_template.text == template
    assert not list(tmp_path.glob("*.part"))
    if model_type == "llada":
        said = json.loads((back / "config.json").read_text())
        assert said["rope"] is True and said["include_bias"] is said["include_qkv_bias"] is False
    # As the base architecture, which transformers knows, it is the same model too.
    base = bdjax.export_model(loaded, tmp_path / "base", dtype="float32")
    known = {"llama", "smollm3", "qwen2", "qwen3"}
    assert json.loads((base / "config.json").read_text())["model_type"] in known
    known = bdjax.load(base, dtype=loaded.model.decoder.dtype)
    equal_bitwise(known.params, loaded.params)
    assert known.model == loaded.model
    assert known.config.objective == loaded.config.objective
    assert known.config.block_size() == loaded.config.block_size()


def model_of(tokenizer, **decoder) -> bdjax.LanguageModel:
    """A model of ours that was never imported."""
    recipe = presets.default(mask_id=tokenizer.mask_id, block_size=8)
    config = bdjax.TrainConfig(
        name="own",
        steps=1,
        model=bdjax.DecoderConfig(
            **dict(
                num_layers=2,
                width=32,
                num_heads=4,
                num_kv_heads=2,
                head_dim=8,
                mlp_width=48,
                dtype="float32",
                clean=recipe.clean,
            )
            | decoder
        ),
        objective=recipe.objective,
        data=bdjax.DataConfig(row_length=64, batch_size=1),
        evaluation=bdjax.EvaluationConfig(every=0),
        tokenizer=tokenizer,
    )
    model = config.build_model()
    return bdjax.LanguageModel(config=config, model=model, params=random_params(model))


def test_a_model_of_our_own_is_itself_again(tmp_path):
    """Bytes as tokens, block diffusion, BOS before a prompt: all of it comes back."""
    own = model_of(ByteTokenizer())
    out = bdjax.export_model(own, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((out / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert all(p.stat().st_size < 40_000 for p in out.glob("*.safetensors"))
    again = bdjax.load(out)
    used = ByteTokenizer.vocab_size
    for name in ("embed", "head"):
        kept = np.asarray(again.params[name])
        np.testing.assert_array_equal(kept[:used], np.asarray(own.params[name])[:used])
        assert not kept[used:].any()
    equal_bitwise(again.params["layers"], own.params["layers"])
    c, d = again.config, own.config
    assert c.model == d.model and c.block_size() == 8
    assert c.objective.alignment is d.objective.alignment
    assert c.tokenizer.starts_with_bos and c.tokenizer.mask_id == ByteTokenizer.mask_id
    text = "naïve 𝄞\n\ttext  with\x00bytes <|eos|>"
    np.testing.assert_array_equal(c.tokenizer.encode(text), d.tokenizer.encode(text))
    assert c.tokenizer.decode(c.tokenizer.encode(text)) == text


def test_the_mask_of_an_ar_model_is_not_written(tokenizer, tmp_path):
    """Its id is beyond the embedding, which grows by rows of zeros that nothing reads."""
    found = pretrained("llama", vocab_size=IDS, rows=IDS)
    there = write_folder(tmp_path / "there", found, tokenizer)
    loaded = bdjax.load(there)
    assert loaded.config.tokenizer.mask_id == IDS and loaded.config.vocab_size == ROWS
    assert loaded.params["embed"].shape == (ROWS, 32)
    assert not np.asarray(loaded.params["embed"][IDS:]).any()
    assert set(loaded.model.readout.banned) == set(range(IDS, ROWS))
    back = bdjax.export_model(loaded, tmp_path / "back")
    assert contents(back) == contents(there)


def test_a_folder_is_for_texts_as_long_as_asked(tokenizer, tmp_path, capsys):
    """An import's rows are short, whatever its model can read: servers go by the folder's word."""
    found = pretrained("llama", max_position_embeddings=131_072)
    there = write_folder(tmp_path / "there", found, tokenizer)
    words = ["export", str(there), "--max-length"]
    assert main([*words, "131072", "--out", str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(there)
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    told = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert said["max_position_embeddings"] == told["model_max_length"] == 131_072
    assert main([*words, "0", "--out", str(tmp_path / "none")]) == 1
    assert "max_length=0 must be at least 1" in capsys.readouterr().err


def test_what_no_family_has_is_refused(tokenizer, tmp_path, capsys):
    made = HuggingFaceTokenizer(path="memory", text=tokenizer)
    with pytest.raises(PretrainedError, match="qkv_bias=True with qk_norm=True is a network that"):
        bdjax.export_model(model_of(made, qkv_bias=True, qk_norm=True), tmp_path / "a")
    with pytest.raises(PretrainedError, match="a qwen3 model cannot have qk_norm=False"):
        bdjax.export_model(model_of(made), tmp_path / "a", model_type="qwen3")
    with pytest.raises(PretrainedError, match="num_heads=6, which does not divide it"):
        bdjax.export_model(model_of(made, num_heads=6), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    out = bdjax.export_model(model_of(made), tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists; type --out"):
        bdjax.export_model(model_of(made), out)
    assert main(["export", str(out), "--out", str(tmp_path / "b"), "--as", "gpt2"]) == 2
    assert "model_type 'gpt2'" in capsys.readouterr().err
    assert main(["export", str(out), "--out", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "b") == contents(out)
    # Read back it would write in blocks that it was never trained for.
    ar = write_folder(tmp_path / "ar", pretrained("qwen3"), tokenizer)
    assert main(["export", str(ar), "--out", str(tmp_path / "c"), "--as", "sdar"]) == 2
    assert "writes token by token, and a sdar model does not" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_nothing_half_written_is_left(tokenizer, tmp_path):
    own = model_of(HuggingFaceTokenizer(path="memory", text=tokenizer))
    broken = replace(own, params={**own.params, "head": None})
    with pytest.raises(AttributeError):
        bdjax.export_model(broken, tmp_path / "out", shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PretrainedError, match=r"file/out cannot be made \(.*type --out"):
        bdjax.export_model(own, tmp_path / "file" / "out")
    # Nor is anything taken away that was there.
    (tmp_path / "out.part").mkdir()
    bdjax.export_model(own, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out", "out.part"}
