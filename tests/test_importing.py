"""From a model folder to a run and to text: the command line, special tokens, bad folders."""

import json
import os
import re
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from pretrained import BOS, EOS, IDS, MASK, ROWS, pretrained, tokenizer_json, write_folder

import bdjax
from bdjax.checkpoint import CheckpointError, Checkpoints
from bdjax.cli import main
from bdjax.hf_tokenizer import HuggingFaceTokenizer
from bdjax.importing import config_of, import_model
from bdjax.tokenizer import BYTE_OF


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    return tokenizer_json(tmp_path_factory.mktemp("tokenizer"))


DEFAULT_TEMPLATE = {"name": "default", "template": "{{ messages[0].content }}"}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """An SDAR model in bfloat16."""
    path = tmp_path_factory.mktemp("model") / "sdar"
    template = {"chat_template": [{"name": "tool", "template": "x"}, DEFAULT_TEMPLATE]}
    found = pretrained("sdar", dtype="bfloat16")
    return write_folder(path, found, tokenizer, tokenizer_config=template)


def equal_bitwise(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_run_is_the_folder_it_was_imported_from(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["import", str(folder), "--run", str(run)]) == 0
    assert f"4 layers of width 32, {ROWS} ids, blocks of 4, mask {MASK}" in capsys.readouterr().out
    direct, kept = bdjax.load(folder), bdjax.load(run)
    equal_bitwise(direct.params, kept.params)
    assert direct.params["embed"].dtype == "bfloat16" and kept.model == direct.model
    own = {name: getattr(kept.config, name) for name in ("tokenizer", "chat_template")}
    assert kept.config == replace(direct.config, **own)
    for tokenizer in (direct.config.tokenizer, kept.config.tokenizer):
        assert (
            tokenizer.encode("the cat").tolist()
            == direct.config.tokenizer.encode("the cat").tolist()
        )
        assert tokenizer.stop_ids == (EOS,) and tokenizer.vocab_size == ROWS
    assert kept.config.tokenizer.path == str(run / "tokenizer.json")
    assert kept.config.tokenizer.text is None
    template = DEFAULT_TEMPLATE["template"]
    inner = bdjax.load(run / "checkpoints" / "0")
    for loaded in (direct, kept, inner):
        assert loaded.config.chat_template.text == template
    assert inner.config.chat_template.path == str(run / "chat_template.jinja")
    wide = bdjax.load(run, dtype="float32")
    assert wide.params["embed"].dtype == "float32" and wide.model.decoder.dtype == "float32"
    equal_bitwise(wide.params, bdjax.load(folder, dtype="float32").params)
    split = bdjax.load(folder, mesh=bdjax.MeshConfig(fsdp=4))
    assert len(split.params["embed"].sharding.device_set) == 4
    equal_bitwise(jax.tree.map(np.asarray, split.params), jax.tree.map(np.asarray, kept.params))
    assert main(["import", str(folder), "--run", str(run)]) == 1
    assert "has checkpoints already; type another folder" in capsys.readouterr().err


def damage(folder, name, change):
    path = folder / name
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def wrong_dtype(folder):
    """Claims that a float32 tensor holds integers."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; type a folder"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "is no JSON object"),
    "other family": (
        lambda f: damage(f, "config.json", lambda c: c.update(model_type="bert")),
        "is of model_type 'bert', which bdjax cannot read; it reads llama",
    ),
    "cut off": (cut, "model.safetensors is no whole safetensors file: its header tells of"),
    "wrong dtype": (wrong_dtype, r"in I32 \(.*quantised weights cannot be read"),
    "pickle": (pickles, "pytorch_model.bin, a pickle, which can run any code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json; write it"),
    "other tokenizer": (
        lambda f: damage(f, "config.json", lambda c: c.update(vocab_size=1000)),
        f"tokenizer.json of {IDS} ids and an embedding of 1000 rows",
    ),
    "small embedding": (
        lambda f: damage(f, "config.json", lambda c: c.update(vocab_size=270)),
        f"tokenizer.json of {IDS} ids and an embedding of 270 rows",
    ),
    "other mask": (
        lambda f: damage(f, "config.json", lambda c: c.update(mask_token_id=ROWS)),
        f"mask token {ROWS} and an embedding of {ROWS} rows",
    ),
    "no end": (
        lambda f: damage(f, "config.json", lambda c: c.pop("eos_token_id")),
        "names no end-of-sequence token; type eos_token_id",
    ),
    "end outside": (
        lambda f: damage(f, "config.json", lambda c: c.update(eos_token_id=ROWS)),
        f"eos_token_id={ROWS}; expected ids from 0 to {ROWS - 1}",
    ),
    "more layers": (
        lambda f: damage(f, "config.json", lambda c: c.update(num_hidden_layers=5)),
        r"11 missing \(model.layers.4.input_layernorm.weight",
    ),
    "block": (
        lambda f: damage(f, "config.json", lambda c: c.update(block_size=4096)),
        "block_size=4096; bdjax reads sdar models with blocks of at most 64",
    ),
    "odd blocks": (
        lambda f: damage(f, "config.json", lambda c: c.update(block_size=[4])),
        r"block_size=\[4\]; bdjax reads sdar models with a positive integer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_one_sentence_and_exit_code_2(fault, tokenizer, tmp_path, capsys):
    change, message = FAULTS[fault]
    bad = write_folder(tmp_path / "bad", pretrained("sdar"), tokenizer)
    change(bad)
    assert main(["import", str(bad), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("bdjax: ") and len(said.err.strip().splitlines()) == 1
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err and not (tmp_path / "run").exists()


def test_weights_without_a_config_are_a_model_folder_that_lacks_it(tokenizer, tmp_path, capsys):
    bad = write_folder(tmp_path / "bad", pretrained("sdar"), tokenizer)
    (bad / "config.json").unlink()
    assert main(["sample", str(bad)]) == 2
    assert "has no config.json; type a folder of the Hugging Face hub" in capsys.readouterr().err


def test_nothing_that_looks_like_a_path_in_an_index_is_followed(tokenizer, tmp_path, capsys):
    bad = write_folder(tmp_path / "bad", pretrained("sdar"), tokenizer)
    (bad / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["import", str(bad), "--run", str(tmp_path / "run")]) == 2
    assert (
        "names '../outside.safetensors', no safetensors file beside it" in capsys.readouterr().err
    )


def test_ids_of_the_end_come_from_both_configs_and_their_text_from_neither(tokenizer):
    found = replace(pretrained("llama"), tokenizer_json=tokenizer)
    several = replace(found, generation={"eos_token_id": [2, EOS, 3]})
    assert config_of(several).tokenizer.stop_ids == (EOS, 2, 3)
    silent = {key: value for key, value in found.config.items() if "token_id" not in key}
    spelled = {"eos_token": {"content": "<|eos|>"}, "bos_token": "<|bos|>"}
    read = config_of(replace(found, config=silent, tokenizer_config=spelled)).tokenizer
    assert (read.bos_id, read.eos_id, read.stop_ids) == (BOS, EOS, (EOS,))


def test_a_prompt_begins_with_bos_where_the_tokenizer_says_so(tokenizer):
    found = replace(pretrained("llama"), tokenizer_json=tokenizer)
    assert not config_of(found).tokenizer.starts_with_bos
    leads = json.loads(tokenizer) | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [BOS], "tokens": ["<|bos|>"]}},
        }
    }
    made = config_of(replace(found, tokenizer_json=json.dumps(leads))).tokenizer
    assert made.starts_with_bos and made.encode("the cat")[0] != BOS


def test_text_is_normalised_as_the_file_says(tokenizer):
    composed, spelled = "é", "e\u0301"
    text = json.dumps(json.loads(tokenizer) | {"normalizer": {"type": "NFC"}})
    made = HuggingFaceTokenizer(path="memory", text=text)
    plain = HuggingFaceTokenizer(path="memory", text=tokenizer)
    assert made.encode(spelled).tolist() == made.encode(composed).tolist()
    assert made.normalised(spelled) == composed and plain.normalised(spelled) == spelled
    # Counted are the bytes of what is encoded.
    assert made.token_bytes()[made.encode(spelled)].sum() == len(composed.encode())
    assert plain.token_bytes()[plain.encode(spelled)].sum() == len(spelled.encode())


def test_special_tokens_in_a_text_are_text_and_in_a_template_tokens(tokenizer):
    made = HuggingFaceTokenizer(path="memory", text=tokenizer)
    assert EOS not in made.encode("a<|eos|>")
    assert made.encode_with_specials("a<|eos|>").tolist() == [*made.encode("a").tolist(), EOS]


def test_bytes_without_a_token_are_refused_not_lost(tokenizer):
    found = json.loads(tokenizer)
    lost = next(c for c, b in BYTE_OF.items() if b == 4)
    number = found["model"]["vocab"].pop(lost)
    last = max(found["model"]["vocab"], key=found["model"]["vocab"].get)
    assert number < found["model"]["vocab"][last]
    made = HuggingFaceTokenizer(path="memory", text=json.dumps(found))
    assert made.encode("the cat").size
    with pytest.raises(ValueError, match="memory has no token for the byte 0x04"):
        made.encode("the\x04cat")
    assert made.file_size == IDS


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "sdar", "Fast_dLLM_Qwen", "Dream", "llada"])
def test_a_folder_writes_text(model_type, tokenizer, tmp_path, capsys):
    folder = write_folder(tmp_path / model_type, pretrained(model_type), tokenizer)
    asked = ["--prompt", "the cat", "--tokens", "21", "--json"]
    assert main(["sample", str(folder), *asked]) == 0
    direct = json.loads(capsys.readouterr().out)
    assert len(direct["tokens"]) == 21 or direct["finish"] == "stop"
    assert MASK not in direct["tokens"]
    assert main(["import", str(folder), "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), *asked]) == 0
    assert json.loads(capsys.readouterr().out) == direct


def test_an_import_that_fails_leaves_an_old_folder_as_it_was(tokenizer, tmp_path, monkeypatch):
    """A full disk, say: what the user had there stays, and the next import finds it free."""
    source = write_folder(tmp_path / "model", pretrained("sdar"), tokenizer)
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")

    def full(self, *state):
        (self._run / "checkpoints" / "0").mkdir(parents=True)
        raise CheckpointError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", full)
        with pytest.raises(CheckpointError, match="no room"):
            import_model(source, run)
        with pytest.raises(CheckpointError, match="no room"):
            import_model(source, tmp_path / "new")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new").exists()


def test_a_run_that_cannot_be_written_is_told_before_a_model_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for command in ("import", "convert"):
        for place in ("file", "file/run"):
            assert main([command, "no model", "--run", str(tmp_path / place)]) == 1
            assert "file is no folder; type --run with another" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        assert main(["import", "no model", "--run", str(tmp_path / "run")]) == 1
    assert f"{tmp_path} cannot be written to; type --run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_while_an_import_is_written_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    """Writers go on for a while, and would make anew what was taken away before they ended."""
    source = write_folder(tmp_path / "model", pretrained("sdar"), tokenizer)
    run, ended = tmp_path / "run", []
    wait, finish = Checkpoints.wait, Checkpoints._finish

    def interrupted(self):
        if self._thread is not None:
            signal.raise_signal(signal.SIGINT)
        wait(self)

    def slow(self, path, *rest):
        time.sleep(0.3)
        path.mkdir(parents=True, exist_ok=True)
        finish(self, path, *rest)
        ended.append(path)

    monkeypatch.setattr(Checkpoints, "wait", interrupted)
    monkeypatch.setattr(Checkpoints, "_finish", slow)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="interrupted: .* goes"):
        import_model(source, run)
    assert ended and not run.exists()


def test_what_is_trained_from_a_model_is_asked_as_it_was_trained(folder, tmp_path):
    """Rows begin with BOS; prompts of the model itself do only where its tokenizer says so."""
    import_model(folder, tmp_path / "run")
    assert not bdjax.load(tmp_path / "run").config.tokenizer.starts_with_bos
    assert bdjax.start_config(tmp_path / "run").tokenizer.starts_with_bos


def test_a_run_cannot_start_from_a_model_folder(tokenizer, tmp_path, capsys):
    source = write_folder(tmp_path / "model", pretrained("sdar"), tokenizer)
    words = ["train", "configs/convert_default.py", "--start", str(source)]
    assert main([*words, "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"bdjax import {source}" in said and not (tmp_path / "run").exists()
