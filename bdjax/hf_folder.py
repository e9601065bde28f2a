"""A model folder of the Hugging Face hub: JSON and safetensors, read as `Pretrained`.

No Python file of such a folder is looked at, and no pickle (*.bin, *.pt, *.pth) is ever opened.
"""

import json
from pathlib import Path
from typing import Any

from bdjax.chat_template import TEMPLATE_NAME
from bdjax.pretrained import Pretrained, PretrainedError
from bdjax.safetensors_file import SafetensorsFiles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Larger than any of the hub's, small enough to parse.
_LARGEST_JSON, _LARGEST_TOKENIZER = 64 << 20, 256 << 20


def read_folder(folder: str | Path) -> Pretrained:
    """The model in a folder; arrays are only looked up, not read.

    Raises PretrainedError for a folder without config.json or safetensors, and for a file in it
    that cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise PretrainedError(
            f"{folder} has no config.json; type a folder of the Hugging Face hub with config.json, "
            "tokenizer.json and *.safetensors"
        )
    config = _object(folder / "config.json")
    tokenizer_config = _object(folder / "tokenizer_config.json", needed=False)
    return Pretrained(
        config=config,
        tensors=SafetensorsFiles(*_tensor_files(folder)),
        where=str(folder),
        generation=_object(folder / "generation_config.json", needed=False),
        tokenizer_json=_text(folder / "tokenizer.json", _LARGEST_TOKENIZER, needed=False),
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(folder, tokenizer_config),
    )


def is_pretrained(path: str | Path) -> bool:
    """Whether `path` is somebody else's model rather than a run or a checkpoint of ours.

    A .gguf file, or a folder with some of what such models consist of, if not all of it.
    """
    path = Path(path)
    if is_gguf(path):
        return True
    if any((path / name).exists() for name in ("bdjax.json", "arrays")):
        return False
    weights = (found for end in ("safetensors", "bin") for found in path.glob(f"*.{end}"))
    return (path / "config.json").is_file() or any(weights)


def is_gguf(path: Path) -> bool:
    """Whether it is a file of that name."""
    return path.suffix == ".gguf" and path.is_file()


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        pickles = sorted(p.name for s in ("bin", "pt", "pth") for p in folder.glob(f"*.{s}"))
        if pickles:
            raise PretrainedError(
                f"{folder} has {pickles[0]}, a pickle, which can run any code and is never read; "
                "where you trust it, convert it with transformers: AutoModelForCausalLM"
                f'.from_pretrained({str(folder)!r}).save_pretrained("converted")'
            )
        raise PretrainedError(
            f"{folder} has neither {SINGLE} nor {INDEX}; download the model again"
        )
    found = _object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise PretrainedError(f"{index} has no weight_map; download it again")
    names = set()
    for name in found.values():
        # A path could lead anywhere.
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise PretrainedError(
                f"{index} names {str(name)[:80]!r}, no safetensors file beside it"
            )
        names.add(name)
    for name in sorted(names):
        if not (folder / name).exists():
            raise PretrainedError(f"{folder} lacks {name}, which {INDEX} names; download it")
    return [folder / name for name in sorted(names)]


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """Its own file, else what tokenizer_config.json says; the default one of several."""
    own = _text(folder / TEMPLATE_NAME, _LARGEST_JSON, needed=False)
    if own is not None:
        return own
    found = _object(folder / "chat_template.json", needed=False).get("chat_template")
    if found is None:
        found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _text(path: Path, largest: int, needed: bool = True) -> str | None:
    if not path.exists() and not needed:
        return None
    try:
        if not path.is_file() or path.stat().st_size > largest:
            raise PretrainedError(
                f"{path} is no file of at most {largest} bytes; download it again"
            )
        return path.read_bytes().decode()
    except (OSError, UnicodeError) as error:
        raise PretrainedError(f"{path} cannot be read ({error}); download it again") from error


def _object(path: Path, needed: bool = True) -> dict[str, Any]:
    text = _text(path, _LARGEST_JSON, needed)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise PretrainedError(f"{path} is no JSON object; download it again")
    return found
