"""The command line: what it prints, what it refuses and with which words."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_trainer import ROW, STEPS, texts, tiny_config

import bdjax
from bdjax import manifest
from bdjax.checkpoint import Checkpoints
from bdjax.cli import main
from bdjax.overrides import to_json
from bdjax.tokenizer import ByteTokenizer

COMMANDS = ("train", "plan", "sample", "evaluate")

_CONFIG = """
from pathlib import Path

from test_trainer import tiny_config


def get_config():
    return tiny_config(Path({texts!r}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with texts/, config.py and a trained run/."""
    folder = tmp_path_factory.mktemp("home")
    texts(folder / "texts")
    (folder / "config.py").write_text(_CONFIG.format(texts=str(folder / "texts")))
    assert main(["train", str(folder / "config.py"), "--run", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def cli(home, capsys, monkeypatch):
    """Runs a command line in `home`: exit code, output, errors."""
    monkeypatch.chdir(home)
    capsys.readouterr()

    def call(line):
        try:
            code = main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def sentence(err):
    """The one line that a refused command leaves."""
    (line,) = err.splitlines()
    assert line.startswith("bdjax: ")
    return line


def test_print_config_shows_overrides_and_gives_them_back(cli):
    code, out, _ = cli("train config.py --print-config steps=500 optim.peak_lr=0.01 model.width=64")
    lines = out.splitlines()
    assert code == 0
    assert {"steps = 500", "optim.peak_lr = 0.01", "model.width = 64"} <= set(lines)
    # Every line is an override: typed back, they give the same config. A line with lines below it
    # names a class, which is the file's already.
    keys = [line.partition(" = ")[0] for line in lines]
    above = {key for key in keys if any(other.startswith(key + ".") for other in keys)}
    typed = [
        line.replace(" = ", "=") for key, line in zip(keys, lines, strict=True) if key not in above
    ]
    again = " ".join(map(shlex.quote, typed))
    assert cli(f"train config.py --print-config {again}") == (0, out, "")


def test_overrides_may_stand_behind_flags(cli):
    code, out, _ = cli("train config.py steps=7 --print-config seed=3")
    assert code == 0 and {"steps = 7", "seed = 3"} <= set(out.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_are_commands(cli, command, tmp_path, monkeypatch):
    code, out, _ = cli(f"{command} --help")
    examples = [line.strip() for line in out.splitlines() if line.strip().startswith("bdjax ")]
    assert code == 0 and examples
    monkeypatch.chdir(tmp_path)
    for example in examples:
        # There is no such file or run here, as one sentence says; bad usage has more lines.
        code, _, err = cli(example.removeprefix("bdjax "))
        assert code in (1, 2) and "there is no" in sentence(err)


@pytest.mark.parametrize(
    "line", ["", "sample", "train", "paint", "train config.py --fast", *COMMANDS]
)
def test_bad_usage_exits_with_2(cli, line):
    code, _, err = cli(line)
    assert code == 2 and "usage: bdjax" in err
    # What may be left out is not asked for.
    assert "required: config, overrides" not in err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layer=4", "did you mean model.num_layers"),
        ("opt.peak_lr=1", "did you mean optim"),
        ("steps", "type key=value"),
        ("steps=many", "steps=many cannot be read: expected int"),
        ("steps=0", "steps=0 must be at least 1; type steps="),
        ("checkpoint_every=0", "checkpoint_every=0 must be at least 1; type checkpoint_every="),
        ("keep_checkpoints=0", "keep_checkpoints=0 must be at least 1; type keep_checkpoints="),
        ("seed=-1", "seed=-1 must be from 0 to 4294967295; type seed=0"),
        ("objective.block_size.first=0", "block size first=0 must be at least 1"),
        ("objective.block_size.first=64", "objective.block_size of 64 .* type data.row_length=64"),
        ("objective.block_size.first=5", "not a multiple of objective.block_size .*row_length=35"),
        ("data.batch_size=0", "data.batch_size=0 must be at least 1; type data.batch_size=8"),
        ("data.row_length=1", "data.row_length=1 has no room .* type data.row_length=256"),
        ("data.held_out_fraction=0", "data.held_out_fraction=0.0 .*type data.held_out_fraction="),
        ("mesh.data=3", "data.batch_size=4 .* mesh.data .* type data.batch_size=6"),
        ("mesh.data=0", "mesh.data=0 must be at least 1; type mesh.data=1"),
        (
            "mesh.tensor=3",
            "model.num_heads of 2 cannot be split over 3 devices; choose mesh.tensor",
        ),
        ("model.clean=block", "ar_weight=0.5 with model.clean=block .* type model.clean=token"),
        ("objective.process.mask_id=3", "type objective.process.mask_id=258"),
        ("evaluation.every=-1", "evaluation.every=-1 .* type evaluation.every=0"),
        ("evaluation.tokens=0", "evaluation.tokens=0 must be at least 1; type evaluation.tokens="),
        ("optim.peak_lr=nan", "optim.peak_lr=nan must be a number above 0; type .* optim.peak_lr="),
    ],
)
def test_a_config_that_cannot_work_is_refused_when_it_is_built(cli, override, words, home):
    # --print-config builds and stops: nothing may be left for training to find out.
    code, out, err = cli(f"train config.py --print-config {override}")
    assert (code, out) == (1, "")
    assert_matches(words, sentence(err))


def assert_matches(words, line):
    with pytest.raises(ValueError, match=words):
        raise ValueError(line)


def test_an_evaluation_prompt_that_fills_the_row_is_refused_before_training(cli):
    long = "x" * ROW
    code, _, err = cli(
        f"train config.py --print-config evaluation.every=5 evaluation.prompt={long}"
    )
    assert code == 1 and "type a shorter evaluation.prompt" in sentence(err)


def test_a_missing_config_names_the_ones_beside_it(cli):
    code, _, err = cli("train confg.py")
    assert code == 1 and "did you mean config.py?" in sentence(err)


def test_a_corpus_that_cannot_be_read_is_named(cli, home):
    empty, latin = home / "empty.txt", home / "latin.txt"
    empty.write_bytes(b"")
    latin.write_bytes("déjà vu".encode("latin1"))
    for paths, words in {
        "empty.txt": "empty corpus: 1 files .* name at least one file with text",
        "": "empty corpus",
        "latin.txt": r"latin.txt is not UTF-8: byte 0xe9 at offset 1 .* `iconv ",
        "no*.txt": "no file matches 'no.*' .* type a path that exists",
    }.items():
        code, _, err = cli(f"train config.py --run fresh data.source.paths={paths}")
        assert code == 1
        assert_matches(words, sentence(err))
    code, _, err = cli("evaluate run --files latin.txt")
    assert code == 1 and "latin.txt is not UTF-8" in sentence(err)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tokens 0", "--tokens 0 must be at least 1; type --tokens"),
        ("--tokens -5", "--tokens -5 must be at least 1"),
        ("--block-size 0", "block_size=0 must be from 1 to 32, .* type --block-size 4"),
        ("--block-size 33", "block_size=33 must be from 1 to 32, .* type --block-size 4"),
        ("--max-length 0", "max_length=0 has no room .* type --max-length 32"),
        ("--max-length 1", "max_length=1 has no room"),
        ("--top-k 0", "top_k=0 must be from 1 to 256; type --top-k"),
        ("--top-k 100000", "top_k=100000 must be from 1 to 256"),
        ("--top-p 0", "top_p=0.0 must be above 0 and at most 1; type --top-p"),
        ("--top-p nan", "top_p=nan must be above 0"),
        ("--temperature -1", "temperature=-1.0 must be 0 .* type --temperature 1"),
        ("--temperature nan", "temperature=nan must be 0"),
        ("--temperature inf", "temperature=inf must be 0"),
        ("--steps 0", "--steps 0 must be at least 1; type --steps 4"),
        ("--threshold 2", "--threshold 2.0 is no probability; type --threshold"),
        ("--threshold nan", "--threshold nan is no probability"),
        ("--entropy-budget -1", "--entropy-budget -1.0 must be 0 .* type --entropy-budget"),
        ("--seed -1", "seed=-1 must be from 0"),
        ("--seed 99999999999999999999", "must be from 0 to 4294967295"),
        ("--infill a__b --blank __", "--blank '__' must be one character"),
        ("--infill a__b --blank ''", "--blank '' must be one character"),
        ("--infill ab", "--infill 'ab' has no blank '_' to fill; type one, as in --infill 'ab_'"),
        (f"--prompt {'x' * ROW}", "prompt 0 has 33 tokens .* max_length=32; .* --max-length 66"),
        (f"--infill {'x' * ROW}_", "prompt 0 has 34 tokens .* max_length=32"),
        (
            "--prompt Hi --chat-template x.jinja",
            "--chat-template writes messages.* type --chat, or",
        ),
        ("--chat --json", "--chat goes without --prompts and --json"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(cli, flags, words):
    code, out, err = cli(f"sample run {flags}")
    assert (code, out) == (1, "")
    assert_matches(words, sentence(err))


@pytest.mark.parametrize("flags", ["--tokens 0", "--chat --json", "--chat --prompt Hi"])
def test_flags_that_do_not_go_together_are_told_before_a_model_is_read(cli, flags):
    code, _, err = cli(f"sample nothing {flags}")
    assert code == 1 and flags.split()[0] in sentence(err) and "no folder" not in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--block-size 0", "block_size=0 must be from 1 to 32"),
        ("--block-size -1", "block_size=-1 must be from 1 to 32"),
        ("--block-size 33", "block_size=33 must be from 1 to 32"),
        ("--batches 0", "batches=0 must be at least 1; type --batches"),
        ("--batches -1", "batches=-1 must be at least 1"),
        ("--draws 0", "draws=0 must be at least 1; type --draws"),
        ("--seed -1", "seed=-1 must be from 0"),
        ("--exact --block-size 5", "31 forwards .* type --block-size 4"),
        ("--files no.txt", "no file matches 'no.txt'"),
    ],
)
def test_evaluation_refuses_what_makes_no_sense(cli, flags, words):
    code, out, err = cli(f"evaluate run {flags}")
    assert (code, out) == (1, "")
    assert_matches(words, sentence(err))


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_what_is_no_run_is_named(cli, command, home, tmp_path):
    foreign = tmp_path / "foreign" / "checkpoints" / "7"
    foreign.mkdir(parents=True)
    (foreign / "weights.bin").write_bytes(b"x")
    for folder, (exit_code, words) in {
        "nowhere": (2, "there is no folder .*nowhere; type the folder of a run.* config.json"),
        "config.py": (2, "there is no folder .*config.py"),
        "texts": (2, "texts holds no checkpoint: .* type the folder of a run"),
        foreign.parents[1]: (1, "was not written by bdjax .* type the folder of a bdjax run"),
    }.items():
        code, out, err = cli(f"{command} {folder}")
        assert (code, out) == (exit_code, "")
        assert_matches(words, sentence(err))


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_torn_run_is_named_and_a_foreign_text_drives_no_terminal(cli, command, home, tmp_path):
    torn = shutil.copytree(home / "run", tmp_path / "run")
    for file in torn.rglob("bdjax.json"):
        file.write_text("{")
    code, _, err = cli(f"{command} {torn}")
    # The older checkpoint is tried, with a warning, before the command gives up.
    assert code == 1 and "is damaged" in err.splitlines()[-1] and "Traceback" not in err
    evil = shutil.copytree(home / "run", tmp_path / "evil") / "checkpoints" / str(STEPS)
    config = (evil / "config.json").read_text().replace('"steps"', '"\\u001b[31msteps"')
    (evil / "config.json").write_text(config)
    listed = json.loads((evil / "bdjax.json").read_text())
    del listed["crc32"]
    listed["files"] |= manifest.settle(evil, ["config.json"])
    (evil / "bdjax.json").write_text(json.dumps(listed | {"crc32": manifest.checksum(listed)}))
    code, _, err = cli(f"{command} {evil}")
    assert code == 1 and "steps is no field of TrainConfig" in err and "\x1b" not in err


def test_a_torn_newest_checkpoint_is_passed_over_with_a_sentence(cli, home, tmp_path):
    torn = shutil.copytree(home / "run", tmp_path / "run")
    (torn / "checkpoints" / str(STEPS) / "bdjax.json").unlink()
    code, out, err = cli(f"sample {torn} --tokens 4")
    assert code == 0 and out
    assert "bdjax: warning: " in err and "never finished" in err and ".py:" not in err


def test_resuming_with_another_config_says_what_to_type(cli):
    code, _, err = cli("train config.py --run run --resume seed=1")
    assert code == 1 and "type seed=0 to go on" in sentence(err)
    code, _, err = cli("train config.py --run run")
    assert code == 1 and "type --resume" in sentence(err)


def test_json_is_one_object_per_row_and_repeats_by_seed(cli):
    code, first, _ = cli("sample run --prompt 'the ' --tokens 6 --seed 3 --json")
    row = json.loads(first)
    assert code == 0 and row["prompt"] == "the " and 1 <= len(row["tokens"]) <= 6
    each = ("tokens", "step", "entropy", "logprob_raw", "logprob_drawn")
    assert len({len(row[name]) for name in each}) == 1
    assert cli("sample run --prompt 'the ' --tokens 6 --seed 3 --json")[1] == first
    others = [cli(f"sample run --prompt 'the ' --tokens 6 --seed {s} --json")[1] for s in (4, 5)]
    assert first not in others


def test_text_goes_out_and_counts_go_to_errors(cli):
    _, asjson, _ = cli("sample run --prompt 'the ' --tokens 6 --json")
    code, out, err = cli("sample run --prompt 'the ' --tokens 6")
    row = json.loads(asjson)
    assert code == 0 and out == bdjax.cli.clean_text("the " + row["text"]) + "\n"
    assert f"{len(row['tokens'])} tokens, {row['forwards']} forwards" in err


def test_watching_without_a_terminal_prints_the_same_text_once(cli):
    plain = cli("sample run --prompt 'the ' --tokens 6")
    watched = cli("sample run --prompt 'the ' --tokens 6 --watch")
    assert watched == plain and watched[1].count("the ") == 1


@pytest.mark.parametrize("template", ["_", "____", "ab__ the _ at", "_ab", f"{'x' * (ROW - 2)}_"])
def test_infilling_keeps_every_given_character_and_adds_none(cli, template):
    code, out, _ = cli(f"sample run --infill '{template}' --json")
    row = json.loads(out)
    given = [None if c == "_" else ord(c) for c in template]
    before = given.index(None)
    assert code == 0 and row["prompt"] == template[:before]
    assert len(row["tokens"]) == len(template) - before
    slots = zip(given[before:], row["tokens"], row["step"], strict=True)
    for wanted, token, step in slots:
        assert (step == -1) == (wanted is not None)
        assert wanted is None or token == wanted


def test_an_end_drawn_in_a_blank_does_not_cut_the_text_after_it(cli, home, monkeypatch):
    line = "sample run --infill 'ab_cd' --json"
    whole = json.loads(cli(line)[1])
    drawn = whole["tokens"][0]
    # An untrained model hardly ever draws EOS, so EOS becomes what it has drawn. (The former EOS
    # then has no text and is never drawn, which moves all probabilities a little.)
    monkeypatch.setattr(ByteTokenizer, "eos_id", drawn)
    again = json.loads(cli(line)[1])
    assert (again["tokens"], again["text"]) == (whole["tokens"], whole["text"])
    assert again["finish"] == whole["finish"]
    loaded = bdjax.load(home / "run")
    ids = [97, 98, None, 99, 100]
    (cut,) = bdjax.generate(loaded, [ids], max_new_tokens=0)
    assert (cut.finish, cut.tokens.tolist()) == ("stop", [drawn])


def test_control_sequences_never_reach_the_terminal(cli, monkeypatch):
    evil = "\x1b]0;title\x07\x1b[2Jtext\x9b31m\r\x08"
    real = bdjax.generate

    def generate(*args, **options):
        return [replace(row, text=evil) for row in real(*args, **options)]

    monkeypatch.setattr(bdjax, "generate", generate)
    for flags in ("", "--watch", "--json"):
        code, out, err = cli(f"sample run --prompt '\x1b[31mthe' --tokens 6 {flags}")
        assert code == 0 and "the" in out and "text" in out
        assert not set("\x1b\x07\x08\r\x9b") & set(out + err)


def test_a_prompt_is_ids_or_text_that_the_model_can_hold(home):
    loaded = bdjax.load(home / "run")
    mask = loaded.config.tokenizer.mask_id
    for prompts, words in (
        ([[97, mask]], f"prompt 0 holds the mask token {mask} at place 1; give None there"),
        (["ok", [97, 260]], "prompt 1 holds 260 at place 1; ids are 0 to 259"),
        ([[-1]], "prompt 0 holds -1 at place 0"),
        ("the", r"a list of them; type \[prompt\]"),
    ):
        with pytest.raises(ValueError, match=words):
            bdjax.generate(loaded, prompts)
    with pytest.raises(ValueError, match="prompt 0 has no slot to fill; type --tokens"):
        bdjax.generate(loaded, ["the"], max_new_tokens=0)
    assert bdjax.generate(loaded, []) == []


def test_a_short_limit_is_a_short_last_block(cli):
    code, out, _ = cli("sample run --max-length 3 --json")
    row = json.loads(out)
    assert code == 0 and len(row["tokens"]) <= 2


def test_evaluate_is_exact_where_asked_and_strict_json(cli, home):
    code, out, _ = cli("evaluate run --exact")
    assert code == 0 and ", exact" in out and "diffusion bound: " in out
    found = json.loads(cli("evaluate run --exact --json")[1])
    assert found["exact"] and f"{found['diffusion']['bits_per_byte']:.4f}" in out
    (home / "one.txt").write_text("the cat")

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    # One row has no standard error.
    line = cli("evaluate run --files one.txt --json")[1]
    assert json.loads(line, parse_constant=no_constant)["diffusion"]["nats_se"] is None


def test_the_first_batches_are_a_part_of_all(cli):
    some = json.loads(cli("evaluate run --batches 1 --json")[1])
    every = json.loads(cli("evaluate run --json")[1])
    assert 0 < some["tokens"] < every["tokens"]


def test_what_a_pod_trained_a_laptop_samples(home, tmp_path):
    loaded = bdjax.load(home / "run")
    many = 4 * jax.device_count()
    config = tiny_config(home / "texts")
    config = replace(
        config,
        data=replace(config.data, batch_size=many),
        mesh=bdjax.MeshConfig(data=many),
    )
    with Checkpoints(tmp_path) as kept:
        kept.save(1, {"params": loaded.params}, to_json(config))
    found = bdjax.load(tmp_path)
    assert found.config.mesh == bdjax.MeshConfig()
    assert Path(tmp_path / "checkpoints" / "1").is_dir()
    for name in ("embed", "head"):
        assert np.array_equal(found.params[name], loaded.params[name])
