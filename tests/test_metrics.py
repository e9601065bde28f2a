"""Metrics are read one step late, once each, and in full at the end."""

import io
import json
import math

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from bdjax.metrics import Progress, Writer


def test_values_are_read_when_the_next_step_arrives():
    with Writer(None) as writer:
        assert writer.write(1, {"loss": jnp.asarray(2.0)}) is None
        assert writer.history == []
        assert writer.write(2, {"loss": jnp.asarray(1.0)}) == (1, {"loss": 2.0})
        assert writer.history == [(1, {"loss": 2.0})]
    assert writer.history[-1] == (2, {"loss": 1.0})
    assert writer.flush() is None


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


def scalars(directory, tag):
    found = []
    for file in sorted(directory.glob("events*")):
        data = file.read_bytes()
        while data:  # a record: length (8), checksum (4), event, checksum (4)
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return sorted(found)


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
