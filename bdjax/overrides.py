"""Nested frozen dataclasses from files, dotted overrides and JSON, and back to text.

Nothing here knows what is configured: types of the fields decide how a text is read.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class _Node:
    """What the overrides say about one key: its own text, and the keys below it."""

    text: str | None = None
    below: dict[str, "_Node"] = dataclasses.field(default_factory=dict)


def apply_overrides(config: Any, overrides: Sequence[str]) -> Any:
    """`config` with `("model.num_layers=4", "process.draw=ExactCount")` applied.

    Values are read by the type of their field: int, float, true/false, text, an Enum's value or
    name, "a,b" for a tuple, "none", or the class name of an object, which then starts from its
    defaults. The last of two equal keys wins; the order does not matter otherwise, because a
    dataclass is rebuilt once, with all of its changes. A tuple's items are keys too: `terms.0`.

    Raises ValueError for a key that does not exist (with the closest ones) or a value that cannot
    be read; errors of a `__post_init__` pass through unchanged.
    """
    root = _Node()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{override!r} is no override; type key=value, as in seed=1")
        node = root
        for name in key.strip().split("."):
            node = node.below.setdefault(name, _Node())
        node.text = text.strip()
    return _rebuild(config, type(config), root, "", [key for key, _ in _lines(config, "")])


def _rebuild(current, hint, node: _Node, key: str, known: Sequence[str]):
    if node.text is not None:
        chosen = _candidates(hint).get(node.text.casefold())
        if chosen is not None:
            return _build(chosen, {}, node, key, known)
        current = _parse(node.text, hint, key)
        if not node.below:
            return current
    elif dataclasses.is_dataclass(current):
        values = {f.name: getattr(current, f.name) for f in dataclasses.fields(current) if f.init}
        return _build(type(current), values, node, key, known)
    elif isinstance(current, tuple):
        return _rebuild_tuple(current, hint, node, key, known)
    names = [kind.__name__ for kind in _candidates(hint).values()]
    advice = f"; type {key}={names[0]} too" if names else ""
    state = "not set" if isinstance(current, dataclasses.Field) else _text(current)
    raise ValueError(
        f"{key}.{next(iter(node.below))} cannot be set: {key} is {state} and has no fields{advice}"
    )


def _rebuild_tuple(current: tuple, hint, node: _Node, key: str, known: Sequence[str]):
    items = list(current)
    for name, below in node.below.items():
        if not name.isdecimal() or int(name) >= len(items):
            raise _unknown_key(f"{key}.{name}", key, map(str, range(len(items))), known)
        item_hint = _item_hints(hint, len(items))[int(name)]
        items[int(name)] = _rebuild(items[int(name)], item_hint, below, f"{key}.{name}", known)
    return tuple(items)


def _build(cls: type, values: Mapping[str, Any], node: _Node, key: str, known: Sequence[str]):
    """A `cls` of `values`, its defaults where there are none, and the changes below `node`."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    values = dict(values)
    for name, below in node.below.items():
        if name not in fields:
            raise _unknown_key(prefix + name, key, fields, known)
        current = values.get(name, _default(fields[name]))
        values[name] = _rebuild(current, hints[name], below, prefix + name, known)
    missing = [n for n, f in fields.items() if n not in values and _default(f) is f]
    if missing:
        need = ", ".join(prefix + name for name in missing)
        raise ValueError(f"{key}={cls.__name__} has no default for {need}; type {need}=... too")
    return cls(**values)


def _default(field: dataclasses.Field):
    """The field's default; the field itself when it has none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field


def _unknown_key(wrong: str, parent: str, names, known: Sequence[str]) -> ValueError:
    prefix = f"{parent}." if parent else ""
    everywhere = list(dict.fromkeys([*(prefix + name for name in names), *known]))
    last = wrong.rpartition(".")[2]
    close = [k for k in everywhere if k.rpartition(".")[2] == last]
    close += difflib.get_close_matches(wrong, everywhere, n=3, cutoff=0.6)
    close = list(dict.fromkeys(close))[:3]
    here = ", ".join(k for k in everywhere if k.startswith(prefix) and "." not in k[len(prefix) :])
    answer = f"did you mean {' or '.join(close)}?" if close else f"known here: {here or 'nothing'}"
    return ValueError(f"{wrong} is no key of this config; {answer}")


def _members(hint) -> tuple:
    """The alternatives of a type: itself, or the parts of a union, text last."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [member for part in typing.get_args(hint) for member in _members(part)]
        return tuple(sorted(parts, key=lambda part: part is str))
    return (hint,)


def _candidates(hint) -> dict[str, type]:
    """The dataclasses that a field of this type accepts, by case-folded name."""
    found: dict[str, type] = {}
    for member in _members(hint):
        if not isinstance(member, type) or member is object:
            continue
        waiting = [member]
        while waiting:
            cls = waiting.pop(0)
            if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls):
                found.setdefault(cls.__name__.casefold(), cls)
            waiting += type.__subclasses__(cls)
    return found


def _item_hints(hint, length: int) -> tuple:
    """The type of each of a tuple's items; Any where the annotation does not say."""
    for member in _members(hint):
        if typing.get_origin(member) is tuple:
            items = typing.get_args(member)
            return items[:1] * length if items[-1:] == (...,) else items
    return (Any,) * length


def _parse(text: str, hint, key: str):
    for member in _members(hint):
        try:
            return _parse_as(text, member, key)
        except (ValueError, TypeError):
            continue
    kinds = " or ".join(dict.fromkeys(_describe(member) for member in _members(hint)))
    close = difflib.get_close_matches(text.casefold(), _candidates(hint), n=1)
    example = _candidates(hint)[close[0]].__name__ if close else _example(_members(hint)[0])
    tail = f"; type for example {key}={example}" if example else ""
    raise ValueError(f"{key}={text} cannot be read: expected {kinds}{tail}")


def _parse_as(text: str, member, key: str):
    """The value of `text` as one alternative; ValueError or TypeError when it is none."""
    if member is types.NoneType and text.casefold() == "none":
        return None
    if member is bool and text.casefold() in ("true", "false"):
        return text.casefold() == "true"
    if member in (int, float, str, Path):
        return member(text)
    if isinstance(member, type) and issubclass(member, Enum):
        wanted = text.casefold()
        for choice in member:
            if wanted in (str(choice.value).casefold(), choice.name.casefold()):
                return choice
    if typing.get_origin(member) is tuple:
        parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
        return tuple(
            _parse(part, item, key)
            for part, item in zip(parts, _item_hints(member, len(parts)), strict=True)
        )
    raise ValueError


def _describe(member) -> str:
    if member is types.NoneType:
        return "none"
    if member is bool:
        return "true or false"
    if isinstance(member, type) and issubclass(member, Enum):
        return "one of " + ", ".join(str(choice.value) for choice in member)
    if typing.get_origin(member) is tuple:
        return "values with commas between, " + _type_name(member)
    names = [cls.__name__ for cls in _candidates(member).values()]
    return "one of " + ", ".join(names) if names else _type_name(member)


def _type_name(hint) -> str:
    return hint.__name__ if type(hint) is type else str(hint)


def _example(member) -> str:
    if typing.get_origin(member) is tuple:
        return ",".join(_example(item) for item in _item_hints(member, 2))
    if isinstance(member, type) and issubclass(member, Enum):
        return str(next(iter(member)).value)
    plain = {int: "4", float: "0.1", bool: "true", str: "text", types.NoneType: "none"}
    names = [cls.__name__ for cls in _candidates(member).values()]
    return plain.get(member, names[0] if names else "")


def load_config(path: str | Path, start: Any = None) -> Any:
    """What `get_config()` of a Python file returns: the user's own code, which is executed.

    start: the config of the run to start from, for a `get_config(start)` that builds on it.

    Raises ValueError with one sentence: no such file (with the ones beside it), no `get_config`,
    an error inside (with file and line), or something returned that is no dataclass.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no config file {path}; {_beside(path)}")
    spec = importlib.util.spec_from_file_location(f"bdjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses defined in the file look up their module by name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ValueError(
                f"{path} has no get_config(); write `def get_config():` that returns the config"
            )
        config = module.get_config(*_wanted(path, module.get_config, start))
    except Exception as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else own[-1].lineno if own else None
        if line is None:
            raise
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(
            f"get_config() of {path} returned {type(config).__name__}; expected a config dataclass"
        )
    return config


def _wanted(path: Path, get_config: Callable, start: Any) -> tuple:
    """The arguments of `get_config`: the start, where it takes one."""
    if not inspect.signature(get_config).parameters:
        return ()
    if start is None:
        raise ValueError(
            f"get_config(start) of {path} builds on a run; type --start with its folder"
        )
    return (start,)


def _beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(other.name for other in folder.glob("*.py"))
    if not names:
        return f"{folder} holds no .py file"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(str(folder / name) for name in close)}?"
    return f"{folder} holds {', '.join(names)}"


def to_text(config: Any) -> str:
    """One `dotted.key = value` line per field; every line is an override that gives it back."""
    return "\n".join(f"{key} = {text}" for key, text in _lines(config, ""))


def _lines(value, key: str) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value):
        if key:
            yield key, type(value).__name__
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield key, _text(value)
        return
    for name, item in items:
        yield from _lines(item, f"{key}.{name}" if key else name)


def _text(value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return type(value).__name__ if dataclasses.is_dataclass(value) else str(value)


def to_json(config: Any) -> str:
    """JSON with a "type" (the class name) in every object: `from_json` gives `config` back.

    Raises ValueError for a field that holds anything but numbers, text, None, Enums, tuples and
    dataclasses.
    """
    return json.dumps(_encode(config, ""), indent=2)


def _encode(value, key: str):
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        if "type" in names:
            raise ValueError(f"{type(value).__name__} has a field `type`, JSON's tag; rename it")
        below = {name: _encode(getattr(value, name), f"{key}.{name}") for name in names}
        return {"type": type(value).__name__} | below
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_encode(item, f"{key}.{index}") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"{key.lstrip('.')} is a {type(value).__name__}, which JSON cannot hold; "
        "use numbers, text, Enums, tuples or dataclasses"
    )


def from_json(text: str, classes: Mapping[str, type]) -> Any:
    """The config that `to_json` wrote, built from `classes` (by name) and nothing else.

    Fields that the text lacks take their defaults, so that a newer class reads an older text.
    Raises ValueError for broken JSON, an unknown class or field, or a value of a wrong type.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"the config is a JSON {type(data).__name__}; expected an object")
    return _decode(data, Any, "", classes)


def _decode(data, hint, key: str, classes: Mapping[str, type]):
    where = key or "the config"
    if isinstance(data, dict):
        value = _decode_object(data, where, key, classes)
        allowed = _candidates(hint).values()
        if allowed and type(value) not in allowed:
            names = ", ".join(cls.__name__ for cls in allowed)
            raise ValueError(f"{where} is a {type(value).__name__}; expected one of {names}")
        return value
    if isinstance(data, list):
        hints = _item_hints(hint, len(data))
        if len(hints) != len(data):
            raise ValueError(f"{where} has {len(data)} items; expected {len(hints)}")
        items = zip(data, hints, strict=True)
        return tuple(_decode(v, h, f"{key}.{i}", classes) for i, (v, h) in enumerate(items))
    for member in _members(hint):
        if isinstance(member, type) and issubclass(member, Enum):
            if data in [choice.value for choice in member]:
                return member(data)
        elif member is Path and isinstance(data, str):
            return Path(data)
        elif member is Any or type(data) is member or (member is float and type(data) is int):
            return data
    if not all(map(_is_readable, _members(hint))):
        return data  # an array's place, say: the class itself judges the value
    kinds = " or ".join(_describe(member) for member in _members(hint))
    raise ValueError(f"{where} is {data!r}; expected {kinds}")


def _is_readable(member) -> bool:
    """Whether JSON has a word for values of this type, so that a mismatch is an error."""
    plain = (bool, int, float, str, Path, types.NoneType)
    tuples = typing.get_origin(member) is tuple
    is_class = isinstance(member, type)
    return (
        tuples
        or member in plain
        or (is_class and (issubclass(member, Enum) or dataclasses.is_dataclass(member)))
    )


def _decode_object(data: dict, where: str, key: str, classes: Mapping[str, type]):
    name = data.get("type")
    if name not in classes:
        close = difflib.get_close_matches(str(name), classes, n=3) or sorted(classes)
        raise ValueError(f"{where} has the unknown type {name!r}; known: {', '.join(close)}")
    cls = classes[name]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for field in data.keys() - {"type"} - fields.keys():
        raise ValueError(
            f"{prefix}{field} is no field of {name}; known: {', '.join(fields) or 'none'}"
        )
    values = {
        field: _decode(value, hints[field], prefix + field, classes)
        for field, value in data.items()
        if field != "type"
    }
    missing = [n for n, f in fields.items() if n not in values and _default(f) is f]
    if missing:
        raise ValueError(f"{where} ({name}) lacks {', '.join(missing)}")
    return cls(**values)
