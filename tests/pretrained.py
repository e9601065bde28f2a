"""Tiny models in the files of every family, written from our own table, without torch."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bdjax import safetensors_file
from bdjax.corpus import Document
from bdjax.embedding import TokenEmbedding
from bdjax.families import FAMILIES, Family, family_of
from bdjax.family_config import decoder_config
from bdjax.hf_tokenizer import train_tokenizer
from bdjax.parameters import Parameter, Role, map_table
from bdjax.pretrained import Pretrained
from bdjax.readout import TokenReadout
from bdjax.step import Model
from bdjax.weights import stored, to_file

TEXT = "the cat sat on the mat, é and 𝄞; the dog did not. " * 40
# The tokenizer's ids, and the embedding's rows.
IDS, ROWS = 280, 288
BOS, EOS, MASK = 0, 1, 2
BASE = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SPECIAL = {
    "llama": {"rope_scaling": LLAMA3},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "qwen2": {"tie_word_embeddings": True, "sliding_window": 32, "use_sliding_window": False},
    "qwen3": {"head_dim": 16},
    "sdar": {"head_dim": 16, "block_size": 4, "mask_token_id": MASK},
    "Fast_dLLM_Qwen": {"bd_size": 8, "mask_token_id": MASK},
    "Dream": {"mask_token_id": MASK},
    "llada": {
        "mask_token_id": MASK,
        "embedding_size": ROWS,
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "rope_full_precision": True,
    },
}
# Diffusion transformers have files of another kind: test_dit.py.
TYPES = tuple(family.model_type for family in FAMILIES if not family.modulated)


def config(model_type: str, **more) -> dict:
    """A config.json with the keys that the family uses."""
    family = family_of(model_type, "test")
    found = BASE | {"model_type": model_type} | SPECIAL[model_type] | more
    return {family.keys.get(key, key): deepcopy(value) for key, value in found.items()}


@cache
def tokenizer_json(folder: Path) -> str:
    """The text of a trained tokenizer.json with ids 0 .. IDS-1; 0 to 3 are special."""
    made = train_tokenizer([Document("a", TEXT.encode())], IDS, folder)
    return Path(made.path).read_text(encoding="utf-8")


class Arrays:
    """`Tensors` in memory, which remember what was read of them."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.reads: dict[str, np.ndarray] = {n: np.zeros(a.shape, int) for n, a in arrays.items()}

    @property
    def shapes(self):
        return {name: array.shape for name, array in self.arrays.items()}

    @property
    def dtypes(self):
        return {name: array.dtype.name for name, array in self.arrays.items()}

    def read(self, name, index):
        self.reads[name][index] += 1
        return self.arrays[name][index]


def network(pretrained: Pretrained, rows: int = ROWS) -> tuple[Family, Model]:
    """Its family, and its network without a tokenizer: nothing is banned."""
    family = family_of(pretrained.config["model_type"], pretrained.where)
    c = decoder_config(pretrained, family, "float32")
    return family, Model(
        decoder=c,
        embedding=TokenEmbedding(vocab_size=rows, width=c.width, dtype=c.dtype),
        readout=TokenReadout(vocab_size=rows, width=c.width, tied=c.tied_head),
    )


def arrays_of(family: Family, model: Model, params, rows: int = ROWS) -> dict[str, np.ndarray]:
    """The tensors of `params` as the family's files have them."""
    found = {}
    for one in stored(family, model.table(), rows):
        *_, last = one.name.split("/")
        value = np.asarray(params["layers"][last] if one.stacked else params[last])
        for layer, file in enumerate(one.files):
            found[file] = to_file(one, value[layer] if one.stacked else value)
    return found


def random_params(model: Model, seed: int = 0, dtype="float32"):
    """Parameters about as large as initial ones, none of which is all ones or zeros."""
    rng = np.random.default_rng(seed)

    def one(parameter: Parameter):
        scale = 0.1 if parameter.role in (Role.NORM, Role.BIAS) else 0.2
        mean = 1.0 if parameter.role is Role.NORM else 0.0
        return jnp.asarray(rng.normal(mean, scale, parameter.shape), dtype)

    return map_table(one, model.table())


def pretrained(
    model_type: str, seed: int = 0, dtype="float32", rows: int = ROWS, **more
) -> Pretrained:
    """A model of the family with random weights, in memory, without a tokenizer."""
    # As many names as layers are looked for.
    names = {str(n): np.zeros(0, np.float32) for n in range(99)}
    empty = Pretrained(config=config(model_type, **more), tensors=Arrays(names), where="tiny")
    family, model = network(empty, rows)
    arrays = arrays_of(family, model, random_params(model, seed, dtype), rows)
    return Pretrained(config=empty.config, tensors=Arrays(arrays), where="tiny")


def write_folder(folder: Path, found: Pretrained, tokenizer: str | None, **files) -> Path:
    """The folder of such a model; `files` are more JSON objects by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = found.tensors.arrays
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    safetensors_file.write(folder / "model.safetensors", described, arrays.__getitem__)
    for name, value in ({"config": found.config} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return folder
