"""An AR model made the start of a block-diffusion one: what it was, and a mask token."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from pretrained import IDS, ROWS, pretrained, tokenizer_json, write_folder

import bdjax
from bdjax.cli import main
from bdjax.corpus import Document
from pallas_kernels import CleanMode

HELD_OUT = [Document("held out", b"the dog sat on the mat; the cat did not. " * 3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return tokenizer_json(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request, tokenizer, tmp_path_factory):
    """A tied and an untied one, with rows that the tokenizer does not name."""
    path, found = tmp_path_factory.mktemp("model") / request.param, pretrained(request.param)
    # A mean that is not zero: a row of zeros is then far from it.
    arrays = found.tensors.arrays
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"] + np.float32(0.3)
    return write_folder(path, found, tokenizer)


def as_ar(loaded: bdjax.LanguageModel) -> bdjax.LanguageModel:
    """The same weights, asked as an AR model: no tail is filled up to a block."""
    objective = bdjax.presets.ar(mask_id=loaded.config.tokenizer.mask_id).objective
    return replace(loaded, config=replace(loaded.config, objective=objective))


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
    run = tmp_path_factory.mktemp("start") / "run"
    assert main(["convert", str(model), "--run", str(run), "--block-size", "4"]) == 0
    return bdjax.load(run)


def test_the_weights_are_those_of_the_model_and_the_mask_has_a_row_of_its_own(model, start):
    before = bdjax.load(model, dtype="float32")
    assert start.config.tokenizer.mask_id == IDS and start.config.vocab_size == ROWS
    assert start.config.model.clean is CleanMode.TOKEN and start.config.objective.views == 1
    rest = dict(start.params)
    embed = np.asarray(rest.pop("embed"))
    old = np.asarray(before.params["embed"])
    others = np.arange(ROWS) != IDS
    assert np.array_equal(embed[others], old[:ROWS][others])
    text = old[:IDS]
    off = (embed[IDS] - text.mean(axis=0)) / text.std(axis=0)
    assert 0 < np.abs(off).max() < 0.5
    for name, value in rest.items():
        want = before.params[name]
        want = want[:ROWS] if name == "head" else want
        assert jax.tree.all(jax.tree.map(np.array_equal, value, want))


def test_the_clean_stream_is_the_model_that_it_was(model, start):
    """But for what the mask's row took of the probability, which no model gives to a mask."""
    old = bdjax.evaluate(bdjax.load(model, dtype="float32"), HELD_OUT).ar
    new = bdjax.evaluate(as_ar(start), HELD_OUT).ar
    assert new.nats_per_token < old.nats_per_token
    assert new.nats_per_token == pytest.approx(old.nats_per_token, abs=0.1)


def test_in_blocks_of_one_it_is_that_model(start):
    """Before training: every token is read from the clean one before it, as the AR model does."""
    found = bdjax.evaluate(start, HELD_OUT, block_size=1)
    assert found.diffusion.nats_per_token == pytest.approx(found.ar.nats_per_token, rel=1e-6)


def test_a_model_that_never_saw_a_mask_writes_no_blocks(model, start):
    own = bdjax.load(model)
    assert own.config.block_size() == own.config.block_size(1) == 1
    with pytest.raises(ValueError, match="block_size=4: .* type --block-size 1, or bdjax convert"):
        bdjax.generate(own, ["the"], block_size=4)
    assert start.config.block_size(4) == 4


def test_a_model_without_a_free_row_gets_one(tokenizer, tmp_path):
    """Then not even that changes: equal to rounding."""
    folder = write_folder(
        tmp_path / "full", pretrained("llama", rows=IDS, vocab_size=IDS), tokenizer
    )
    config = bdjax.convert_model(folder, tmp_path / "run", block_size=2)
    assert config.tokenizer.mask_id == IDS and config.vocab_size == ROWS
    old = bdjax.evaluate(bdjax.load(folder, dtype="float32"), HELD_OUT).ar
    new = bdjax.evaluate(as_ar(bdjax.load(tmp_path / "run")), HELD_OUT).ar
    assert new.nats_per_token == pytest.approx(old.nats_per_token, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "nbdiff", "sdar", "fast_dllm_v2"])
def test_every_recipe_trains_from_it(model, recipe, tmp_path, capsys):
    run, converted = tmp_path / "start", tmp_path / "converted"
    assert main(["convert", str(model), "--run", str(run)]) == 0
    for side, animal in (("train", "cat"), ("heldout", "dog")):
        text = f"the {animal} sat on the mat; the dog did not. " * 99
        (tmp_path / f"{side}.jsonl").write_text(json.dumps({"text": text}))
    words = ["train", f"configs/convert_{recipe}.py", "--start", str(run), "--run", str(converted)]
    words += ["steps=2", "data.batch_size=2", "data.row_length=32", "data.source=JsonLines"]
    words += [f"data.source.paths={tmp_path}/train.jsonl", "data.held_out=JsonLines"]
    words += [f"data.held_out.paths={tmp_path}/heldout.jsonl", "evaluation.every=0"]
    assert main(words) == 0, capsys.readouterr().err
    config = bdjax.load(converted).config
    sizes = {"default": (2, 4, 8), "nbdiff": (1, 2, 4, 8, 16, 32), "sdar": (4,)}
    assert config.start_from == str(run)
    assert config.objective.block_size.sizes == sizes.get(recipe, (32,))
    assert config.documents()[1][0].data.startswith(b"the dog")


def test_what_cannot_be_converted_says_why(model, start, tmp_path, capsys):
    for words, said in (
        (["--mask-id", "5"], f"ids from {IDS} to {ROWS}"),
        (["--mask-id", str(ROWS + 1)], f"--mask-id {IDS}"),
        (["--block-size", "0"], "type --block-size 1"),
        (["--block-size", "24"], "type --block-size 16"),
        (["--block-size", "9999"], "does not divide the rows of "),
    ):
        run = tmp_path / "run"
        assert main(["convert", str(model), "--run", str(run), *words]) == 2
        assert said in capsys.readouterr().err and not run.exists()
    assert main(["convert", str(model), "--run", str(run), "--seed", "-1"]) == 1
    assert "seed=-1 must be from 0" in capsys.readouterr().err and not run.exists()
    assert (
        main(["convert", start.config.tokenizer.path[: -len("/tokenizer.json")], "--run", "x"]) == 2
    )
    assert "--start" in capsys.readouterr().err
    assert main(["train", "configs/convert_default.py"]) == 1
    assert "--start" in capsys.readouterr().err
