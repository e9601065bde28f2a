"""Our model as a Hugging Face folder, which `transformers` loads with equal logits.

The folder is of a base architecture that the library knows (llama, smollm3, qwen2, qwen3), or of
another family if one is asked for. What the library has no word for, how to write in blocks, stands
under one key of config.json, from which an import makes the same sampler again.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdjax import safetensors_file
from bdjax.chat_template import TEMPLATE_NAME
from bdjax.config import TrainConfig
from bdjax.families import Decoding, Family, family_of
from bdjax.generation import LanguageModel, merge
from bdjax.hf_folder import INDEX, SINGLE
from bdjax.hf_tokenizer import FILE_NAME
from bdjax.importing import OWN_KEY
from bdjax.model import Mlp, Norm
from bdjax.objective import Alignment
from bdjax.pretrained import PretrainedError
from bdjax.sharding import to_host
from bdjax.weights import Stored, stored, to_file
from pallas_kernels import CleanMode

# As the hub's own tools cut: a shard of a few gigabytes.
SHARD_BYTES = 5_000_000_000


def export_model(
    language_model: LanguageModel,
    folder: str | Path,
    *,
    model_type: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `folder` and returns it: config, tokenizer, generation settings, weights, LoRA merged.

    model_type: the family to write, None for the base architecture that fits. dtype: of the
    weights, None for theirs. max_length: of a text, which the folder tells programs that serve it,
    by default the training rows' length, at most 2048 for an imported model. It is written beside
    its place and moved there when it is whole.
    progress: called with bytes written and bytes to write.

    Raises PretrainedError for a network that no family has and a `folder` that cannot be made,
    FileExistsError when it is there.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists; type --out with another folder")
    language_model = merge(language_model)
    config = language_model.config
    longest = config.data.row_length if max_length is None else max_length
    if longest < 1:
        raise ValueError(f"max_length={longest} must be at least 1; type --max-length 4096")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1; type 5000000000")
    family = _family(config, model_type)
    rows = _rows(config)
    # A name of its own: what others have there is not ours to take away.
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise PretrainedError(
            f"{folder} cannot be made ({error.strerror}); type --out with another folder"
        ) from error
    try:
        wanted = stored(family, language_model.model.table(), rows)
        tensors = _Parameters(language_model.params, wanted, dtype)
        files = _write_tensors(part, tensors, shard_bytes, progress)
        facts = _config(config, family, rows, longest, tensors.dtype_name)
        _write(part / "config.json", facts)
        _write(part / "generation_config.json", _generation(config))
        _write(part / "tokenizer_config.json", _tokenizer_config(config, longest))
        (part / FILE_NAME).write_text(config.tokenizer.to_json(), encoding="utf-8")
        if config.chat_template is not None:
            (part / TEMPLATE_NAME).write_text(config.chat_template.text, encoding="utf-8")
        for path in part.iterdir():
            if path.name not in files:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


class _Parameters:
    """The tensors of a model's files, made of parameters when they are written."""

    def __init__(self, params: Any, wanted: list[Stored], dtype: str | None):
        self._params = params
        self._places = {
            file: (one, layer if one.stacked else None)
            for one in wanted
            for layer, file in enumerate(one.files)
        }
        self._dtype = dtype
        self._held: tuple[str, np.ndarray] | None = None

    @property
    def dtype_name(self) -> str:
        """Of most of the bytes."""
        return self.described(next(iter(self._places)))[1].name

    def names(self) -> list[str]:
        """Every tensor's, in the order of the parameters."""
        return list(self._places)

    def described(self, file: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype in the file."""
        one, _ = self._places[file]
        return one.shape, jnp.dtype(self._dtype or self._array(one).dtype)

    def read(self, file: str) -> np.ndarray:
        """One tensor. All layers of a parameter are fetched from its devices with the first."""
        one, layer = self._places[file]
        if self._held is None or self._held[0] != one.name:
            self._held = None
            self._held = one.name, to_host(self._array(one))
        value = self._held[1] if layer is None else self._held[1][layer]
        return to_file(one, value).astype(self.described(file)[1], copy=False)

    def _array(self, one: Stored):
        node = self._params
        for name in one.name.split("/"):
            node = node[name]
        return node


def _write_tensors(
    folder: Path, tensors: _Parameters, shard_bytes: int, progress
) -> dict[str, list[str]]:
    """Names of the files and of what is in each; an index where there are several."""
    sizes = {
        name: int(np.prod(shape)) * dtype.itemsize
        for name in tensors.names()
        for shape, dtype in [tensors.described(name)]
    }
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = {SINGLE: shards[0]}
    if len(shards) > 1:
        files = {
            f"model-{n:05d}-of-{len(shards):05d}.safetensors": names
            for n, names in enumerate(shards, start=1)
        }
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        _write(folder / INDEX, index)
    done, total = 0, sum(sizes.values())

    def read(name: str) -> np.ndarray:
        nonlocal done
        done += sizes[name]
        if progress is not None:
            progress(done, total)
        return tensors.read(name)

    for file, names in files.items():
        described = {name: tensors.described(name) for name in names}
        safetensors_file.write(folder / file, described, read)
    return files


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _family(config: TrainConfig, model_type: str | None) -> Family:
    """The family whose network this is."""
    c = config.model
    other = {
        "norm=layer": c.norm is not Norm.RMS,
        "mlp=gelu": c.mlp is not Mlp.SWIGLU,
        "head_bias=true": c.head_bias,
    }
    if any(other.values()):
        raise PretrainedError(
            f"a network with {' and '.join(name for name, has in other.items() if has)} is none "
            "that transformers has a class for; export a model of the Llama or Qwen families"
        )
    if model_type is None:
        kinds = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
        model_type = kinds.get((c.qkv_bias, c.qk_norm), "")
        if c.rope_layers is not None and model_type == "llama":
            model_type = "smollm3"
        if not model_type:
            raise PretrainedError(
                "qkv_bias=True with qk_norm=True is a network that transformers has no class for; "
                "train with one of them for a model to export"
            )
    family = family_of(model_type, "the folder to write")
    if family.modulated:
        raise PretrainedError(
            f"bdjax cannot write {family.model_type} folders; leave --as out, or type it with "
            "another family"
        )
    if family.decoding is not Decoding.TOKENS and config.objective.views == 0:
        raise PretrainedError(
            f"this model writes token by token, and a {family.model_type} model does not; leave "
            "--as out, or make it write in blocks by bdjax convert first"
        )
    misfits = {
        f"qkv_bias={c.qkv_bias}": c.qkv_bias != family.qkv_bias,
        f"qk_norm={c.qk_norm}": c.qk_norm != family.qk_norm,
        "rope_layers": c.rope_layers is not None and not family.skips_rope,
        f"head_dim={c.head_dim}": bool(family.keys) and c.head_dim * c.num_heads != c.width,
        "rope_scaling": c.rope_scaling is not None and bool(family.keys),
        f"width={c.width} and num_heads={c.num_heads}, which does not divide it": (
            family.model_type == "llama" and c.width % c.num_heads != 0
        ),
    }
    wrong = [name for name, misfit in misfits.items() if misfit]
    if wrong:
        raise PretrainedError(
            f"a {family.model_type} model cannot have {' and '.join(wrong)}; leave --as out, or "
            "type it with another family"
        )
    return family


def _rows(config: TrainConfig) -> int:
    """Rows of the vocabulary to write: all ids but an AR model's mask, where it is the last."""
    tokenizer = config.tokenizer
    rows = tokenizer.vocab_size
    plain = config.objective.views == 0
    return rows - 1 if plain and tokenizer.mask_id == rows - 1 else rows


def _config(
    config: TrainConfig, family: Family, rows: int, longest: int, dtype: str
) -> dict[str, Any]:
    c, tokenizer, objective = config.model, config.tokenizer, config.objective
    rope: dict[str, Any] = {"rope_type": "default"}
    if (s := c.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_length,
        }
    found: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": rows,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        # The library reads rope_theta at the top up to version 4, and in here from 5 on.
        "rope_scaling": None if c.rope_scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": c.rope_theta},
        "max_position_embeddings": longest,
        "tie_word_embeddings": c.tied_head,
        "torch_dtype": dtype,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    if family.skips_rope:
        layers = c.rope_layers or (True,) * c.num_layers
        found |= {"no_rope_layers": [int(turned) for turned in layers], "pad_token_id": None}
    if family.keys:  # LLaDA's config has keys of its own, and says what transformers assumes
        found = {family.keys.get(key, key): value for key, value in found.items()}
        del found["rope_parameters"], found["rope_scaling"], found["head_dim"]
        found |= {"embedding_size": rows, "block_type": "llama", "layer_norm_type": "rms"}
        # Where it is silent, LLaDA's class has biases and no RoPE.
        found |= {"rope": True, "include_bias": False, "include_qkv_bias": False}
    if objective.views == 0:
        return found
    mask = objective.process.mask_id
    block = objective.block_size.largest if objective.clean_stream else 0
    found["mask_token_id"] = mask
    if block:
        found[family.block_key] = block
    found[OWN_KEY] = {
        "decoding": _decoding(config).value,
        "mask_token_id": mask,
        "block_size": block,
        "clean": c.clean.value,
        "alignment": objective.alignment.value,
    }
    return found


def _decoding(config: TrainConfig) -> Decoding:
    shifted = config.objective.alignment is Alignment.SHIFTED_NOISY
    if not config.objective.clean_stream:
        return Decoding.WHOLE_SHIFTED if shifted else Decoding.WHOLE
    if config.model.clean is CleanMode.TOKEN:
        return Decoding.TOKENS
    return Decoding.SEEDED_BLOCKS if shifted else Decoding.BLOCKS


def _generation(config: TrainConfig) -> dict[str, Any]:
    stops = list(config.tokenizer.stop_ids)
    ends = stops if len(stops) > 1 else stops[0]
    return {"bos_token_id": config.tokenizer.bos_id, "eos_token_id": ends}


def _tokenizer_config(config: TrainConfig, longest: int) -> dict[str, Any]:
    """Enough for the library's own class to read tokenizer.json and leave texts as they are."""
    named = {"bos_token": config.tokenizer.bos_id, "eos_token": config.tokenizer.eos_id}
    spelled = {key: config.tokenizer.spelling(number) for key, number in named.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    } | {key: text for key, text in spelled.items() if text is not None}
