"""Who may know whom, how long a file gets, and what is promised to the outside."""

import ast
import dataclasses
import inspect
from importlib import resources
from pathlib import Path

import pytest

import bdjax

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a module imports from layers below its own and from nowhere else. A new file
# needs a place here.
LAYERS = (
    # Leaves: nothing of bdjax.
    ("block_size", "chips", "corpus", "display", "distributed", "hlo", "interrupts")
    + ("learning_rate", "manifest", "messages", "metrics", "mixture", "ngram", "overrides", "plots")
    + ("prefetch", "pretrained", "run_files", "schedules", "sharding", "state_tree", "stats")
    + ("template_process", "tokenizer", "watchdog"),
    ("attention", "chat_template", "checkpoint", "data", "gguf_header", "hf_tokenizer", "layout")
    + ("nll", "parameters", "policies", "reading", "safetensors_file", "seeds", "unstacking"),
    ("cache", "chat", "draws", "embedding", "families", "gguf_tensors", "gguf_tokenizer")
    + ("hf_folder", "lora", "muon", "readout", "sources"),
    ("gguf_file", "model", "noise", "optim", "weights"),
    ("family_config", "objective", "step"),
    ("dit", "flops", "levels"),
    ("loss",),
    ("config", "likelihood", "presets", "sampler", "train_step"),
    ("base", "plan", "speed"),
    ("importing",),
    ("generation",),
    ("asking", "converting", "exporting", "trainer"),
    ("__init__",),
    ("arguments",),
    ("cli",),
)
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}

# What only these files know of: replacing a dependency touches one file.
KNOWN_BY = {
    "orbax": {"checkpoint"},
    "optax": {"muon", "optim"},
    "flax": {"model"},
    "gguf": {"gguf_tensors"},
    "grain": {"data"},
    "tensorboardX": {"metrics"},
    "matplotlib": {"plots"},
    "pyarrow": {"reading"},
    "jinja2": {"template_process"},
    "tokenizers": {"hf_tokenizer"},
    "zstandard": {"reading"},
    "rich": {"cli", "display", "metrics"},
}
# These run where no accelerator is wanted: in data workers and scripts.
WITHOUT_JAX = ("corpus", "data", "display", "ngram", "overrides", "plots", "tokenizer")
WITHOUT_JAX += ("chat", "chat_template", "hf_folder", "hf_tokenizer", "messages", "mixture")
WITHOUT_JAX += ("prefetch", "pretrained", "reading", "safetensors_file", "template_process")
NEVER = {"pickle", "marshal", "shelve", "torch", "tensorflow", "dill", "cloudpickle"}

LIBRARY = sorted((ROOT / "bdjax").glob("*.py"))
KERNELS = sorted((ROOT / "pallas_kernels").glob("*.py"))
SCRIPTS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "configs").glob("*.py")])


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path):
    """Dotted names that a file imports anywhere, "bdjax.config" for `from bdjax import config`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path):
    """Modules of bdjax that a file imports."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "bdjax":
            yield parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def by_stem(path):
    return path.stem


def test_every_module_has_a_layer_and_every_layer_its_modules():
    assert sorted(LEVEL) == sorted(path.stem for path in LIBRARY)


@pytest.mark.parametrize("path", LIBRARY, ids=by_stem)
def test_imports_go_one_way(path):
    upward = [name for name in own(path) if LEVEL[name] >= LEVEL[path.stem]]
    assert upward == [], f"{path.stem} imports {upward} from its own layer or above"


def test_the_layers_are_no_higher_than_they_must_be():
    # Otherwise the table would allow imports that nobody needs.
    for path in LIBRARY:
        level = LEVEL[path.stem]
        below = [LEVEL[name] for name in own(path)]
        if 0 < level < LEVEL["config"]:
            needs_kernels = any(name.startswith("pallas_kernels") for name in imports(path))
            assert level - 1 in below or (level == 1 and needs_kernels), path.stem


@pytest.mark.parametrize("path", KERNELS, ids=by_stem)
def test_kernels_stand_alone(path):
    known = {"pallas_kernels", "jax", "numpy", "jaxtyping"}
    standard = {"collections", "dataclasses", "enum", "functools", "importlib", "json", "math"}
    standard.add("typing")
    assert {name.split(".")[0] for name in imports(path)} <= known | standard


@pytest.mark.parametrize("path", LIBRARY, ids=by_stem)
def test_each_dependency_is_known_by_its_own_files(path):
    used = {name.split(".")[0] for name in imports(path)}
    assert not used & NEVER
    for dependency, files in KNOWN_BY.items():
        assert dependency not in used or path.stem in files
    assert path.stem not in WITHOUT_JAX or "jax" not in used


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS, *SCRIPTS], ids=by_stem)
def test_files_stay_small(path):
    most = 650 if path.parent.name == "pallas_kernels" else 450
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= most, f"{path.name} has {lines} lines and is asking to become two"


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS], ids=by_stem)
def test_nothing_is_remembered_between_calls(path):
    nodes = list(ast.walk(tree(path)))
    assert not any(isinstance(node, ast.Global) for node in nodes)
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set):
            for target in node.targets:
                # Tables are constants by their names; anything else would be state.
                assert target.id.isupper() or target.id == "__all__", target.id


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS], ids=by_stem)
def test_nothing_read_is_executed(path):
    called = {
        node.func.id
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS, *SCRIPTS], ids=by_stem)
def test_public_things_say_what_they_are(path):
    parsed = tree(path)
    assert ast.get_docstring(parsed), f"{path.name} has no docstring"
    for node in parsed.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("name", bdjax.__all__)
def test_public_names_exist_and_are_documented(name):
    found = getattr(bdjax, name)
    if inspect.isclass(found):
        # dataclass and NamedTuple write a docstring of their own where there is none.
        assert found.__doc__ and not found.__doc__.startswith(f"{name}(")
    elif callable(found):
        assert found.__doc__
        hints = inspect.signature(found)
        assert hints.return_annotation is not inspect.Signature.empty, f"{name} has no return type"


def test_public_names_are_listed_once():
    assert len(set(bdjax.__all__)) == len(bdjax.__all__)
    imported = {name for name in vars(bdjax) if not name.startswith("_")}
    modules = {name for name in imported if inspect.ismodule(getattr(bdjax, name))}
    assert imported - modules == set(bdjax.__all__)


@pytest.mark.parametrize("name", bdjax.__all__)
def test_configs_are_frozen_and_by_keyword(name):
    found = getattr(bdjax, name)
    if inspect.isclass(found) and dataclasses.is_dataclass(found):
        assert found.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(found))


def test_the_command_line_uses_the_public_names_alone():
    path = ROOT / "bdjax" / "cli.py"
    used = {
        node.attr
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "bdjax"
    }
    assert used - set(bdjax.__all__) <= {"__version__"}
    assert set(own(path)) <= {"__init__", "arguments", "display", "interrupts"}


def test_types_are_shipped():
    assert (resources.files("bdjax") / "py.typed").is_file()
