"""Overrides, config files and JSON give back what was put in, and explain what they refuse."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from bdjax.overrides import apply_overrides, from_json, load_config, to_json, to_text


class Mode(Enum):
    TOKEN = "token"
    BLOCK = "block"


@dataclass(frozen=True, kw_only=True)
class Draw:
    pass


@dataclass(frozen=True, kw_only=True)
class ExactCount(Draw):
    foo: int = 1
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Stratified(ExactCount):
    needed: int


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Draw):
    floor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scaling:
    factor: float = 8.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    num_layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mode: Mode = Mode.TOKEN
    scaling: Scaling | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")


@dataclass(frozen=True, kw_only=True)
class Process:
    draw: Draw = field(default_factory=Bernoulli)
    either: Scaling | ExactCount = field(default_factory=Scaling)


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Shape = field(default_factory=Shape)
    process: Process = field(default_factory=Process)
    peak_lr: float = 1e-3
    name: str = "run"
    limit: int | None = None
    fast: bool = False
    mesh: tuple[int, ...] = (1, 1)
    pair: tuple[int, str] = (1, "a")
    terms: tuple[Draw, ...] = (Bernoulli(), ExactCount())
    anything: Any = 3


CLASSES = {
    c.__name__: c for c in (Run, Shape, Process, Draw, ExactCount, Stratified, Bernoulli, Scaling)
}


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("model.num_layers=4", lambda c: c.model.num_layers == 4),
        ("peak_lr=2e-4", lambda c: c.peak_lr == 2e-4),
        ("peak_lr=1", lambda c: type(c.peak_lr) is float),
        ("fast=True", lambda c: c.fast is True),
        ("name=a=b", lambda c: c.name == "a=b"),
        ("limit=7", lambda c: c.limit == 7),
        ("limit=None", lambda c: c.limit is None),
        ("model.mode=block", lambda c: c.model.mode is Mode.BLOCK),
        ("model.mode=BLOCK", lambda c: c.model.mode is Mode.BLOCK),
        ("mesh=2,2,2", lambda c: c.mesh == (2, 2, 2)),
        ("mesh=", lambda c: c.mesh == ()),
        ("pair=3,b", lambda c: c.pair == (3, "b")),
        ("process.draw=exactcount", lambda c: c.process.draw == ExactCount()),
        ("process.either=ExactCount", lambda c: c.process.either == ExactCount()),
        ("model.scaling=Scaling", lambda c: c.model.scaling == Scaling()),
        ("terms.1.foo=5", lambda c: c.terms == (Bernoulli(), ExactCount(foo=5))),
        ("terms.0=ExactCount", lambda c: c.terms[0] == ExactCount()),
    ],
)
def test_values_are_read_by_the_type_of_their_field(override, read):
    assert read(apply_overrides(Run(), [override]))


def test_a_chosen_class_is_overridden_inside_in_any_order():
    wanted = ExactCount(foo=3)
    pair = ["process.draw=ExactCount", "process.draw.foo=3"]
    assert apply_overrides(Run(), pair).process.draw == wanted
    assert apply_overrides(Run(), pair[::-1]).process.draw == wanted
    deep = ["process.draw=Stratified", "process.draw.needed=2"]
    assert apply_overrides(Run(), deep).process.draw == Stratified(needed=2)


def test_values_that_are_valid_only_together_are_applied_together():
    changed = apply_overrides(Run(), ["model.heads=9", "model.kv_heads=3"])
    assert (changed.model.heads, changed.model.kv_heads) == (9, 3)


def test_post_init_errors_pass_through():
    with pytest.raises(ValueError, match="^heads=9 is not a multiple of kv_heads=2$"):
        apply_overrides(Run(), ["model.heads=9"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layer=4", "model.num_layer is no key.*did you mean model.num_layers"),
        ("num_layers=4", "num_layers is no key.*model.num_layers"),
        ("zzz=4", "zzz is no key.*known here: model, process"),
        ("terms.7.foo=5", "terms.7 is no key"),
        ("model.num_layers=four", "model.num_layers=four cannot be read: expected int.*=4"),
        ("limit=x", "limit=x cannot be read: expected int or none"),
        ("fast=yes", "fast=yes .*expected true or false.*fast=true"),
        ("model.mode=tokn", "model.mode=tokn .*one of token, block.*model.mode=token"),
        ("process.draw=Exactcont", "one of .*ExactCount.*type for example process.draw=ExactCount"),
        ("process.draw=Stratified", "no default for process.draw.needed"),
        ("pair=1", "pair=1 cannot be read"),
        (
            "model.scaling.factor=2",
            "model.scaling is none and has no fields.*model.scaling=Scaling",
        ),
        ("peak_lr.foo=2", "peak_lr is 0.001 and has no fields"),
        ("fast", "'fast' is no override; type key=value"),
        ("anything=5", "anything=5 cannot be read: expected typing.Any"),
    ],
)
def test_refusals_name_the_key_and_what_to_type(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        apply_overrides(Run(), [override])


CHANGED = [
    "model.scaling=Scaling",
    "process.draw=ExactCount",
    "process.draw.foo=3",
    "limit=5",
    "mesh=4",
    "model.mode=block",
]


def test_every_printed_line_is_an_override_that_gives_it_back():
    changed = apply_overrides(Run(), CHANGED)
    lines = [line for line in to_text(changed).splitlines() if not line.startswith("anything")]
    assert "process.draw = ExactCount" in lines and "process.draw.foo = 3" in lines
    assert apply_overrides(Run(), lines) == changed


def test_json_gives_the_config_back():
    for config in (Run(), apply_overrides(Run(), CHANGED)):
        assert from_json(to_json(config), CLASSES) == config


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"type": "Shape"', '"type": "os.system"', "model has the unknown type 'os.system'"),
        ('"num_layers": 2', '"layers": 2', "model.layers is no field of Shape; known: num_layers"),
        ('"num_layers": 2', '"num_layers": "2"', "model.num_layers is '2'; expected int"),
        ('"mode": "token"', '"mode": "no"', "model.mode is 'no'; expected one of token, block"),
        ('"type": "Bernoulli"', '"type": "Scaling"', "is no field of Scaling"),
        ('"heads": 4', '"heads": 9', "^heads=9 is not a multiple"),
        ("{", "[", "the config is no JSON"),
    ],
)
def test_foreign_json_is_refused(old, new, sentence):
    text = to_json(Run())
    assert old in text
    with pytest.raises(ValueError, match=sentence):
        from_json(text.replace(old, new, 1), CLASSES)


def test_json_of_an_object_in_the_wrong_place_is_refused():
    with pytest.raises(ValueError, match="model is a Scaling; expected one of Shape"):
        from_json('{"type": "Run", "model": {"type": "Scaling"}}', CLASSES)


def test_json_cannot_hold_functions():
    with pytest.raises(ValueError, match="anything is a function, which JSON cannot hold"):
        to_json(Run(anything=lambda: 0))


def test_config_files(tmp_path):
    good = tmp_path / "tiny.py"
    good.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own:\n    steps: 'int' = 3\n"
        "def get_config():\n    return Own()\n"
    )
    config = load_config(good)
    assert apply_overrides(config, ["steps=5"]).steps == 5
    for text, sentence in {
        "x = 1\n": "has no get_config",
        "def get_config():\n    return {}\n": "returned dict; expected a config dataclass",
        "def get_config():\n    return 1 / 0\n": "bad.py, line 2: ZeroDivisionError",
        "def get_config(:\n": "bad.py, line 1: SyntaxError",
        "import no_such_module\n": "bad.py, line 1: ModuleNotFoundError",
    }.items():
        bad = tmp_path / "bad.py"
        bad.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_config(bad)
    with pytest.raises(ValueError, match="no config file .*tyny.py; did you mean .*tiny.py"):
        load_config(tmp_path / "tyny.py")
    with pytest.raises(ValueError, match="there is no folder"):
        load_config(tmp_path / "none" / "a.py")
