"""Speed is the work of a window over its time; profiles are traces of the steps asked for."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_metrics import scalars
from test_trainer import texts, tiny_config

from bdjax import speed as module
from bdjax import train
from bdjax.chips import H100
from bdjax.cli import main
from bdjax.flops import documents_of, scored_share, step_flops
from bdjax.sharding import make_mesh
from bdjax.speed import Profile, Speed, speed_of


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def read(speed, clock, step, seconds, tokens=10):
    clock.now += seconds
    return speed(step, {"tokens": float(tokens), "block_size": 4.0})


def test_a_reading_is_the_mean_over_the_window():
    clock = Clock()
    speed = Speed(
        lambda documents, labels, size: size * sum(documents), 1000.0, lambda x: [x.size], clock
    )
    for step in range(1, 31):
        segment = np.zeros((1, 50 if step <= 10 else 100), int)
        speed.hand(step, segment, segment > 0)
    assert read(speed, clock, 1, 60.0) == {}  # the first step also compiles
    found = read(speed, clock, 2, 2.0, tokens=6)
    assert found == {"step_seconds": 2.0, "tokens_per_second": 3.0, "mfu": 4 * 50 / 2 / 1000}
    for step in range(3, 31):
        found = read(speed, clock, step, 1.0 if step <= 10 else 4.0)
    # The last twenty steps alone.
    assert found == {"step_seconds": 4.0, "tokens_per_second": 2.5, "mfu": 4 * 100 / 4 / 1000}


def test_a_pause_counts_for_no_step():
    clock = Clock()
    speed = Speed(None, 0.0, clock=clock)
    read(speed, clock, 1, 1.0), read(speed, clock, 2, 1.0)
    speed.restart()
    assert read(speed, clock, 3, 500.0) == {}
    assert read(speed, clock, 4, 1.0) == {"step_seconds": 1.0, "tokens_per_second": 10.0}


def test_mfu_is_model_flops_over_the_peak_of_the_mesh(tmp_path, monkeypatch):
    config = tiny_config(texts(tmp_path))
    model = config.build_model()
    segment = np.array([[1] * 20 + [2] * 10 + [0] * 2] * 4)
    # The second document is an answer of three tokens to a prompt.
    trainable = np.array([[False] + [True] * 19 + [False] * 7 + [True] * 3 + [False] * 2] * 4)
    monkeypatch.setattr(module, "chip_of", lambda kind: H100)
    clock = Clock()
    with jax.set_mesh(make_mesh(data=4)):
        speed = speed_of(config, model, clock)
    for step in (1, 2):
        speed.hand(step, segment, trainable)
        found = read(speed, clock, step, 0.5)
    share = scored_share(config.objective, 4)
    documents = documents_of(segment, config.objective)
    counted = {"block_size": 4, "share": share}
    whole = step_flops(model, config.objective, documents, **counted)
    answers = step_flops(model, config.objective, documents, labels=4 * 22, **counted)
    assert answers.body == whole.body and answers.attention == whole.attention
    assert answers.head == pytest.approx(whole.head * 22 / 28)
    work = answers.total
    assert found["mfu"] == pytest.approx(work / 0.5 / (4 * H100.flops))


def test_unknown_devices_have_no_mfu(tmp_path):
    config = tiny_config(texts(tmp_path))
    clock = Clock()
    with jax.set_mesh(make_mesh()):
        speed = speed_of(config, config.build_model(), clock)
    read(speed, clock, 1, 1.0)
    assert set(read(speed, clock, 2, 1.0)) == {"step_seconds", "tokens_per_second"}


def traces(directory):
    return sorted(directory.rglob("*.xplane.pb"))


def test_the_steps_of_the_window_are_traced_once(tmp_path):
    said, ran = [], []
    with Profile((2, 3), tmp_path / "profile", said.append) as profile:
        for number in range(1, 6):
            profile.step(number, lambda x: ran.append(x), number)
            assert len(said) == (number >= 3)
    assert ran == [1, 2, 3, 4, 5]
    assert len(traces(tmp_path)) == 1 and str(tmp_path / "profile") in said[0]
    assert b"train" in traces(tmp_path)[0].read_bytes()


def test_a_run_that_ends_in_the_window_keeps_its_trace(tmp_path):
    said = []
    with Profile((1, 100), tmp_path, said.append) as profile:
        profile.step(1, jnp.sin, 1.0)
    assert len(said) == 1 and traces(tmp_path)


@pytest.mark.parametrize("window", [(0, 3), (5, 4)])
def test_a_window_that_is_none_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match="type --profile 20:25"):
        Profile(window, tmp_path, print)


def test_the_command_line_says_how_a_window_is_written(capsys):
    demo = str(Path(__file__).resolve().parents[1] / "configs" / "demo.py")
    assert main(["train", demo, "--profile", "20"]) == 1
    assert "--profile '20' is not FIRST:LAST; type --profile 20:25" in capsys.readouterr().err


def test_a_run_writes_speed_curves_and_a_profile(tmp_path):
    config = tiny_config(texts(tmp_path / "texts"))
    result = train(config, tmp_path / "run", profile=(2, 3), say=lambda text: None)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = list(range(1, config.steps + 1))
    assert [line["step"] for line in lines] == steps
    for name in ("step_seconds", "tokens_per_second"):
        found = scalars(tmp_path / "run", name)
        assert [step for step, value in found if value > 0] == steps[1:]
    assert scalars(tmp_path / "run", "mfu") == []
    for line, (_, values) in zip(lines, result.history, strict=True):
        bound = [
            mean * tokens
            for mean, tokens in zip(
                line["bound_by_noise_level"], line["tokens_by_noise_level"], strict=True
            )
            if mean is not None
        ]
        assert sum(bound) == pytest.approx(values["loss_diffusion"], rel=1e-4)
    assert len(traces(tmp_path / "run" / "profile")) == 1
