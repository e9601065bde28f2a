"""An AR model converted, measured and sampled from by tools/convert_smollm2.py, at toy size."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bdjax
from bdjax import likelihood

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
gguf_files = pytest.importorskip("gguf_files", reason="needs the extra hf")
tool = pytest.importorskip("convert_smollm2")
bits = pytest.importorskip("conversion_bits")
decoding = pytest.importorskip("conversion_decode")
page_of = pytest.importorskip("conversion_report")
rows = pytest.importorskip("conversion_rows")

ANIMALS = ("cat", "dog", "owl")
QUICK = ["data.batch_size=4", "data.lanes=1", "optim.peak_lr=0.01"]


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """Three sources of lines that rhyme with nothing."""
    folder = tmp_path_factory.mktemp("mix")
    draw = np.random.default_rng(0)
    for side, count in (("train", 40), ("heldout", 12)):
        (folder / side).mkdir()
        for animal in ANIMALS:
            numbers = draw.integers(1, 99, (count, 24))
            texts = ["".join(f"the {animal} sat {n} times, " for n in row) for row in numbers]
            lines = "\n".join(json.dumps({"text": text}) for text in texts)
            (folder / side / f"{animal}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def out(mix, tmp_path_factory):
    """The folder after `start`."""
    folder = tmp_path_factory.mktemp("out")
    model = gguf_files.write(folder / "tiny.gguf", "llama")
    words = ["start", str(folder), "--model", str(model), "--mix", str(mix), "--row-length", "128"]
    words += ["--tokens-per-source", "300", "--rows", "4", "--dtype", "float32"]
    assert tool.main(words) == 0
    return folder


def result(out, name):
    return json.loads((out / "results" / f"{name}.json").read_text())


def test_an_interrupt_is_a_sentence(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool.rows, "sources", stop)
    assert tool.main(["start", str(tmp_path / "new"), "--mix", "mix"]) == 130
    assert "interrupted; type the same command again" in capsys.readouterr().err


def test_windows_are_full_blocks_of_text_and_the_same_each_time(out, mix):
    tokenizer = bdjax.start_config(out / "start").tokenizer
    found = rows.held_out(mix, tokenizer, 128, 300)
    assert list(found) == sorted(ANIMALS)
    for texts in found.values():
        assert sum(len(ids) - 1 for ids in texts) >= 300 - 127
        for ids in texts:
            assert len(ids) % rows.WIDEST == 0 and ids[0] == tokenizer.bos_id
            assert tokenizer.token_bytes()[ids[1:]].all()
    again = rows.held_out(mix, tokenizer, 128, 300)
    assert rows.fingerprint(again) == rows.fingerprint(found) == result(out, "start")["windows"]
    again["cat"][0][5] += 1
    assert rows.fingerprint(again) != rows.fingerprint(found)
    # In rows nothing is lost, and everything but the heads is scored.
    batches = rows.rows(found["cat"], 128, 4, tokenizer.eos_id)
    real = [batch["tokens"][batch["segment"] > 0] for batch in batches]
    assert np.array_equal(np.concatenate(real), np.concatenate(found["cat"]))
    scored = sum(int(batch["trainable"].sum()) for batch in batches)
    assert scored == sum(len(ids) - 1 for ids in found["cat"])


def test_the_start_is_measured_as_the_ar_model_that_it_was(out, mix):
    """bits/byte = sum of -log2 p(token | before) over the windows' bytes, whatever the packing."""
    loaded = bits.as_ar(bdjax.load(out / "start"))
    tokenizer = loaded.config.tokenizer
    found = rows.held_out(mix, tokenizer, 128, 300)
    nats = 0.0
    for ids in (ids for texts in found.values() for ids in texts):
        batch = rows.rows([ids], 128, 1, tokenizer.eos_id)
        with jax.set_mesh(loaded.config.mesh.build()):
            one = likelihood.evaluate(
                loaded.config.objective,
                loaded.model,
                loaded.params,
                batch,
                tokenizer.token_bytes(),
                block_size=1,
            )
        nats += one.ar.nats_per_token * one.tokens
    size = sum(tokenizer.token_bytes()[ids].sum() for texts in found.values() for ids in texts)
    ar = result(out, "start")["ar"]
    assert ar["bytes"] == size
    assert ar["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert set(ar["sources"]) == set(ANIMALS)


def test_one_rule_of_all_is_that_rule():
    from bdjax.policies import View
    from bdjax.stats import Stats

    draw = np.random.default_rng(0)
    values = {name: jnp.asarray(draw.uniform(size=(3, 8)), "float32") for name in Stats._fields}
    stats = Stats(**(values | {"token": jnp.zeros((3, 8), "int32")}))
    at = jnp.tile(jnp.arange(8), (3, 1))
    keys = jax.random.split(jax.random.key(0), (3, 8))
    zero = jnp.zeros(3, "int32")
    masked = jnp.asarray(draw.uniform(size=(3, 8)) < 0.7)
    view = View(masked, zero, zero + 8, at, keys)
    alone = {
        "threshold": bdjax.Threshold(threshold=0.5),
        "steps": bdjax.Static(steps=4),
        "entropy": bdjax.EntropyBounded(budget=0.5),
        "sequential": bdjax.Sequential(steps=8),
        "random": bdjax.RandomOne(),
    }
    numbers = {"threshold": 0.5, "steps": 4.0, "entropy": 0.5, "sequential": 8.0, "random": 0.0}
    for number, name in enumerate(decoding.RULES):
        one = decoding.AnyRule(rule=np.int32(number), number=np.float32(numbers[name]))
        assert np.array_equal(one.select(stats, view), alone[name].select(stats, view)), name


def test_recipes_differ_in_what_they_teach_alone(out):
    """Objective, clean stream and how rows end: else equal tokens would compare something else."""
    found = result(out, "start")
    recipes = ("default", "nbdiff", "sdar", "fast_dllm_v2")
    first, *others = (tool.config_of(out, found, recipe, 8, 100, []) for recipe in recipes)
    for config in others:
        assert config != first
        model = replace(config.model, clean=first.model.clean)
        data = replace(config.data, tail=first.data.tail)
        same = replace(config, objective=first.objective, model=model, data=data, name=first.name)
        assert same == first


@pytest.mark.parametrize("recipe", ["default", "nbdiff", "sdar", "fast_dllm_v2"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_recipes_reach_the_block_size_they_are_asked_for(out, recipe, size):
    found = result(out, "start")
    config = tool.config_of(out, found, recipe, size, 1000, [])
    sizes = [int(config.objective.block_size.at(step)) for step in (0, 999)]
    assert sizes == [{"default": 2, "nbdiff": 1}.get(recipe, size), size]
    assert config.start_from == str(out / "start")
    assert len(config.data.source.paths) == len(config.data.held_out.paths) == len(ANIMALS)
    if recipe == "nbdiff":
        # Blocks have grown, and the next-token loss is gone, after five eighths of the steps.
        assert int(config.objective.block_size.at(625)) == size
        assert config.objective.ar_weight_at(625) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_default_takes_its_block_size_from_the_command_line(out, size):
    start = bdjax.start_config(out / "start")
    config = bdjax.load_config(ROOT / "configs" / "convert_default.py", start)
    config = bdjax.apply_overrides(config, [f"objective.block_size.last={size}"])
    assert config.objective.block_size.largest == size
    assert config.packing().align == size


def test_what_cannot_be_done_says_why(out, mix, tmp_path, capsys):
    for words, said in (
        (["measure", str(tmp_path), "default-8"], "no start yet"),
        (["train", str(tmp_path), "default"], "no start yet"),
        (["measure", str(out), "default-8"], "default-8"),
        (["measure", str(out), "start", "--block-sizes", "4", "12"], "--block-sizes 12"),
        (["measure", str(out), "start", "--draws", "1"], "type --draws 8"),
        (["train", str(out), "default", "--name", "start"], "--name start"),
        (["train", str(out), "default", "--name", "../x"], "--name ../x"),
        (["train", str(out), "default", "--block-size", "6"], "type --block-size 8"),
        (["decode", str(out), "start"], "type a run"),
        (["report", str(out), str(tmp_path / "none.md")], "none.md"),
    ):
        assert tool.main(words) == 2, words
        assert said in capsys.readouterr().err
    assert not (out.parent / "x").exists()
    for words in (["train", str(out), "none"], ["train", str(out), "default", "--minutes", "0"]):
        with pytest.raises(SystemExit) as end:
            tool.main(words)
        assert end.value.code == 2 and words[-1] in capsys.readouterr().err


def test_a_start_without_a_mix_or_of_another_model_writes_nothing(out, mix, tmp_path, capsys):
    model = gguf_files.write(tmp_path / "tiny.gguf", "llama")
    place, half = tmp_path / "x", tmp_path / "half"
    (half / "train").mkdir(parents=True)
    (half / "train" / "cat.jsonl").write_text('{"text": "the cat"}')
    for folder, given, said in (
        (tmp_path, model, f"{tmp_path / 'train'} holds no .jsonl"),
        (half, model, f"{half / 'heldout'} holds no .jsonl"),
        (mix, tmp_path / "none.gguf", "none.gguf"),
    ):
        assert tool.main(["start", str(place), "--mix", str(folder), "--model", str(given)]) == 2
        assert said in capsys.readouterr().err and not place.exists()
    # What an earlier command left may be of another model, or half of one.
    (place / "start").mkdir(parents=True)
    assert tool.main(["start", str(place), "--mix", str(mix), "--model", str(model)]) == 2
    assert "no whole start from" in capsys.readouterr().err
    assert tool.main(["start", str(out), "--mix", str(half), "--model", "other.gguf"]) == 0
    said = capsys.readouterr().out
    assert "tiny.gguf" in said and "type another OUT" in said


def test_a_source_without_a_window_is_named(out, mix, tmp_path):
    tokenizer = bdjax.start_config(out / "start").tokenizer
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "cat.jsonl").write_text((mix / "heldout" / "cat.jsonl").read_text())
    (tmp_path / "heldout" / "ant.jsonl").write_text('{"text": "an ant"}')
    with pytest.raises(ValueError, match="no text of 15 tokens or more of ant"):
        rows.held_out(tmp_path, tokenizer, 128, 300)
    with pytest.raises(ValueError, match="rows of 15 tokens .* type --row-length"):
        rows.held_out(mix, tokenizer, 15, 300)


def test_results_hold_until_the_run_is_trained_further(tmp_path):
    def holds_after(name, steps):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps({"steps": steps}))
        return tool.still_holds(tmp_path, "measure-a", "a")

    assert not tool.still_holds(tmp_path, "measure-a", "a")
    (tmp_path / "results").mkdir()
    assert holds_after("measure-a", None)
    assert not holds_after("train-a", 600)
    assert holds_after("measure-a", 600)


def test_a_sample_is_judged_by_its_bytes_and_not_by_its_end(out, mix):
    """Bits of all texts over bytes of all texts; the token that ends one is neither."""
    ar = bits.as_ar(bdjax.load(out / "start"))
    tokenizer = ar.config.tokenizer
    ids = rows.held_out(mix, tokenizer, 128, 300)["cat"][0]
    prompts, long, short = np.stack([ids[:8]] * 2), ids[8:40], ids[8:20]

    def judged(*written):
        return decoding.judge(ar, prompts, written)["judge_bits_per_byte"]

    sizes = [tokenizer.token_bytes()[x].sum() for x in (long, short)]
    bits_of = [judged(long, long) * sizes[0], judged(short, short) * sizes[1]]
    assert bits_of[0] > 1.5 * bits_of[1]
    assert judged(long, short) == pytest.approx(sum(bits_of) / sum(sizes), rel=1e-5)
    ended = np.append(short, tokenizer.eos_id)
    assert judged(long, ended) == pytest.approx(judged(long, short), rel=1e-6)


PAGES = {
    "# P\n\ntext\n": "# P\n\ntext\n\n## Results\n\nnew\n",
    "## Results\nold\n": "## Results\n\nnew\n",
    "a\n## Results": "a\n\n## Results\n\nnew\n",
    "a\n\n## Results of others\nb\n": "a\n\n## Results of others\nb\n\n## Results\n\nnew\n",
    "a\n\n## Results\n\n### old\n\n## B\n\nb\n\n# C\n": (
        "a\n\n## Results\n\nnew\n\n## B\n\nb\n\n# C\n"
    ),
    "a\n\n## Results\nold\n# C\n\n## D\nd\n": "a\n\n## Results\n\nnew\n\n# C\n\n## D\nd\n",
}


@pytest.mark.parametrize("before", PAGES)
def test_a_page_keeps_what_stands_around_its_results(before):
    assert page_of.replaced(before, "new") == PAGES[before]
    assert page_of.replaced(PAGES[before], "new") == PAGES[before]


def test_a_page_is_written_whole_or_not_at_all(out, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("# P\n")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert tool.main(["report", str(out), str(page)]) == 2
    assert "pip install 'bdjax[plot]'" in capsys.readouterr().err
    assert page.read_text() == "# P\n" and list(tmp_path.iterdir()) == [page]
    pytest.importorskip("matplotlib")
    assert tool.main(["report", str(out), str(page)]) == 0
    assert page.read_text().startswith("# P\n\n## Results\n\ntiny.gguf on ")
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "page.png"}


def test_a_card_with_memory_is_an_override_of_any_recipe(out):
    found = result(out, "start")
    config = tool.config_of(out, found, "default", 4, 10, ["model.remat=none", "model.unroll=2"])
    assert config.model.unrolled and config.model.remat is bdjax.Remat.NONE
    with pytest.raises(ValueError, match="unroll=3 must be from 1 to num_layers=2"):
        tool.config_of(out, found, "default", 4, 10, ["model.unroll=3"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "nbdiff", "sdar", "fast_dllm_v2"])
def test_every_step_from_start_to_page(out, tmp_path, recipe, capsys):
    run = f"{recipe}-4"
    words = ["train", str(out), recipe, "--block-size", "4", "--steps", "60"]
    words += ["--set", "evaluation.every=20", "evaluation.tokens=8", "checkpoint_every=30"]
    assert tool.main([*words, *QUICK]) == 0, capsys.readouterr().err
    trained = result(out, f"train-{run}")
    assert trained["finished"] and trained["steps"] == 60 and len(trained["curve"]) == 2
    assert tool.main(["measure", str(out), run, "--draws", "2", "--block-sizes", "1", "4"]) == 0
    assert tool.main(["measure", str(out), "start", "--draws", "2", "--block-sizes", "4"]) == 0
    found, before = result(out, f"measure-{run}"), result(out, "measure-start")
    ar = result(out, "start")["ar"]
    for one in found["bounds"].values():
        assert one["bytes"] == ar["bytes"] and one["tokens"] == ar["tokens"]
    assert found["bounds"]["4"]["bits_per_byte"] < 0.8 * before["bounds"]["4"]["bits_per_byte"]
    assert (found["ar"] is None) == (recipe in ("sdar", "fast_dllm_v2"))
    if recipe in ("nbdiff", "sdar"):
        return  # sampling, which takes minutes to compile, is as in the others
    words = ["decode", str(out), run, "--prompt", "16", "--tokens", "12", "--prompts", "3"]
    assert tool.main(words) == 0, capsys.readouterr().err
    swept = result(out, f"decode-{run}")["settings"]
    assert len(swept) == 2 * len(decoding.settings(4))
    alone = [one for one in swept if one["rule"] == "random"]
    # Fast-dLLM's first token comes out of the prefill: 4 tokens of 3 forwards, 12 of 11.
    most = 4 / 3 if recipe == "fast_dllm_v2" else 1
    assert all(one["tokens_per_forward"] <= most + 1e-9 for one in alone)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n## Results\n\nfrom before\n\n## After\n\nlast\n")
    for _ in range(2):
        assert tool.main(["report", str(out), str(page)]) == 0
    text = page.read_text()
    assert (
        "from before" not in text
        and text.count("## Results") == 1
        and text.endswith("## After\n\nlast\n")
    )
    assert run in text and page.with_suffix(".png").stat().st_size > 10_000
    # Everything has its result: nothing is done again.
    for words in (["train", str(out), recipe, "--block-size", "4"], ["measure", str(out), run]):
        assert tool.main(words) == 0
    assert result(out, f"train-{run}") == trained


@pytest.mark.slow
def test_a_training_out_of_time_goes_on(out, capsys):
    words = ["train", str(out), "sdar", "--block-size", "2", "--steps", "4000", "--name", "short"]
    words += ["--minutes", "0.5", "--set", "evaluation.every=0", *QUICK]
    assert tool.main(words) == 0
    first = result(out, "train-short")
    assert not first["finished"] and 0 < first["steps"] < 4000
    assert "type the same command again" in capsys.readouterr().out
    assert tool.main(words) == 0
    second = result(out, "train-short")
    assert second["steps"] > first["steps"] and second["seconds"] > first["seconds"]


@pytest.mark.slow
def test_bounds_of_one_token_are_exact_and_of_shifted_labels_the_ar_loss(out, mix):
    """NBDiff's way of reading at B = 1 is the AR model itself."""
    loaded = bdjax.load(out / "start")
    tokenizer = loaded.config.tokenizer
    found = {
        name: rows.rows(texts, 128, 4, tokenizer.eos_id)
        for name, texts in rows.held_out(mix, tokenizer, 128, 300).items()
    }
    recipe = bdjax.presets.nbdiff(mask_id=tokenizer.mask_id, double_every=10, block_size=4)
    config = replace(loaded.config, objective=recipe.objective)
    shifted = replace(loaded, config=config, model=config.build_model())
    bound = bits.bound_bits(shifted, found, 1, 5)
    assert bound["draws"] == 1 and bound["se"] == 0.0
    ar = result(out, "start")["ar"]["bits_per_byte"]
    assert bound["bits_per_byte"] == pytest.approx(ar, rel=1e-5)
