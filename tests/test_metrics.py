"""Metrics are read one step late, once each, and in full at the end."""

import io
import json
import math

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from bdjax.metrics import Progress, Writer, noise_curves


def test_values_are_read_when_the_next_step_arrives():
    with Writer(None) as writer:
        assert writer.write(1, {"loss": jnp.asarray(2.0)}) is None
        assert writer.history == []
        assert writer.write(2, {"loss": jnp.asarray(1.0)}) == (1, {"loss": 2.0})
        assert writer.history == [(1, {"loss": 2.0})]
    assert writer.history[-1] == (2, {"loss": 1.0})
    assert writer.flush() is None


def test_what_is_added_belongs_to_the_step_that_is_held():
    with Writer(None) as writer:
        writer.add({"evaluation/bits": 3.0})
        writer.write(1, {"loss": jnp.asarray(2.0)})
        writer.add({"evaluation/bits": 1.5})
        writer.write(2, {"loss": jnp.asarray(1.0)})
    assert writer.history == [(1, {"loss": 2.0, "evaluation/bits": 1.5}), (2, {"loss": 1.0})]


def test_files_hold_every_step_once(tmp_path):
    with Writer(tmp_path / "run") as writer:
        for step in range(3):
            writer.write(step, {"loss": jnp.asarray(step / 2), "count": jnp.asarray(step)})
        writer.write_text(2, "sample", "a\nb")
    with Writer(tmp_path / "run") as writer:
        writer.write(3, {"loss": math.nan})
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[:3] == [{"step": s, "loss": s / 2, "count": s} for s in range(3)]
    assert lines[3]["step"] == 3 and math.isnan(lines[3]["loss"])
    assert scalars(tmp_path / "run", "loss")[:3] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_what_is_derived_is_shown_but_is_not_part_of_the_run(tmp_path):
    with Writer(tmp_path, derive=lambda step, values: {"twice": 2 * values["loss"]}) as writer:
        writer.write(1, {"loss": jnp.asarray(3.0)})
        assert writer.flush() == (1, {"loss": 3.0, "twice": 6.0})
    assert writer.history == [(1, {"loss": 3.0})]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 3.0}
    assert scalars(tmp_path, "twice") == [(1, 6.0)]


def sums():
    """Half a token per counted one in bin 3, of 2 nats and weight 4; a quarter in bin 9."""
    place = jnp.arange(10)
    tokens = 0.5 * (place == 3) + 0.25 * (place == 9)
    nll = 1.0 * (place == 3) + 0.25 * (place == 9)
    weighted = {"nll": nll, "bound": nll * jnp.where(place == 3, 4.0, 1.0), "tokens": tokens}
    return {f"loss_by_noise_{name}": x for name, x in weighted.items()}


def test_sums_by_noise_level_become_curves_and_bars(tmp_path):
    curves = noise_curves(sums())
    assert curves["nll_by_noise_level"] == [None] * 3 + [2.0] + [None] * 5 + [1.0]
    assert curves["bound_by_noise_level"] == [None] * 3 + [8.0] + [None] * 5 + [1.0]
    assert noise_curves({"loss": 1.0}) == {}
    with Writer(tmp_path) as writer:
        writer.write(5, {"loss": jnp.asarray(3.0)} | sums())
    assert writer.history == [(5, {"loss": 3.0})]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 5, "loss": 3.0} | curves
    ((step, bars),) = histograms(tmp_path, "nll_by_noise_level")
    assert step == 5 and list(bars.bucket) == [0, 0, 0, 2, 0, 0, 0, 0, 0, 1]
    assert bars.bucket_limit[3] == pytest.approx(0.4) and bars.bucket_limit[9] == 1.0


def histograms(directory, tag):
    return [(step, v.histo) for step, v in values(directory) if v.tag == tag]


def scalars(directory, tag):
    return sorted((step, v.simple_value) for step, v in values(directory) if v.tag == tag)


def values(directory):
    found = []
    for file in sorted(directory.glob("events*")):
        data = file.read_bytes()
        while data:  # a record: length (8), checksum (4), event, checksum (4)
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            found += [(event.step, v) for v in event.summary.value]
    return found


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_when_the_output_is_no_terminal():
    out, clock = io.StringIO(), Clock()
    with Progress(100, file=out, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1.0 if step > 1 else 60.0
            progress.update(step, loss=2.5, tokens=2000)
    lines = out.getvalue().splitlines()
    assert lines[1] == "step 10/100  loss 2.5000  2.0k tokens/s  0:01:30 left"
    assert lines[-1].startswith("step 100/100") and lines[-1].endswith("0:00:00 left")
    assert 10 <= len(lines) <= 21 and "\x1b" not in out.getvalue()


def test_mfu_is_shown_where_it_is_known():
    out = io.StringIO()
    with Progress(1, file=out) as progress:
        progress.update(1, loss=2.5, tokens=2000, mfu=0.4123)
    assert "41.2% MFU" in out.getvalue()


def test_slow_steps_still_speak_every_ten_seconds():
    out, clock = io.StringIO(), Clock()
    with Progress(1000, file=out, clock=clock) as progress:
        for step in range(1, 31):
            clock.now += 4.0
            progress.update(step, loss=1.0, tokens=10)
    assert len(out.getvalue().splitlines()) == 10


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    with Progress(10, file=out) as progress:
        progress.update(1, loss=1.25, tokens=10)
        progress.update(10, loss=0.75, tokens=10)
    assert "10/10" in out.getvalue() and "0.7500" in out.getvalue()
