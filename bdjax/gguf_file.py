"""GGUF files of the Llama, Qwen2 and Qwen3 architectures as if they were Hugging Face folders.

Names, config keys and row order become those of Hugging Face, so that one table per family imports
both. What a file says and this cannot honour is refused by its name.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.gguf_header import Header, read_header, shown
from bdjax.gguf_tensors import GGUFTensors, Stored, lay_out
from bdjax.gguf_tokenizer import special_id, tokenizer_config, tokenizer_json
from bdjax.pretrained import Pretrained, PretrainedError

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
_LAYERS = re.compile(r"model\.layers\.(\d+)\.")
_ROPED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")
# Say nothing about the function that the file holds.
_SILENT = ("rope.scaling.finetuned",)
# Published Llama 3.1 and 3.2 models share these; the file has only the frequencies they lead to.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
# What float32 can hold.
_SMALLEST, _LARGEST = 1e-37, 1e37


class _Keys:
    """The metadata below "<architecture>.", each key asked for once; the rest is refused."""

    def __init__(self, metadata: dict[str, Any], architecture: str, path: Path):
        self.prefix, self.path = architecture + ".", path
        self.left = {k: v for k, v in metadata.items() if k.startswith(self.prefix)}

    def _take(self, name: str, default: Any) -> Any:
        key = self.prefix + name
        if key in self.left:
            return self.left.pop(key)
        if default is None:
            raise PretrainedError(f"{self.path} does not say {key}; take a file made by llama.cpp")
        return default

    def whole(self, name: str, default: int | None = None) -> int:
        """A count. Raises PretrainedError if it is missing, no number or negative."""
        found = self._take(name, default)
        if type(found) is not int or found < 0:
            raise PretrainedError(
                f"{self.path} has {self.prefix}{name}={shown(found)}, expected one count"
            )
        return found

    def real(self, name: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that float32 rounds to it (1e-05)."""
        found = self._take(name, default)
        if type(found) is not float or not _SMALLEST < found < _LARGEST:
            raise PretrainedError(
                f"{self.path} has {self.prefix}{name}={shown(found)}, expected a positive number"
            )
        return float(str(np.float32(found)))

    def scaling(self) -> dict[str, Any] | None:
        """RoPE scaling in Hugging Face's words."""
        factor = self.real("rope.scaling.factor", 1.0)
        # llama.cpp scales by a factor alone, too.
        kind = self._take("rope.scaling.type", "none" if factor == 1 else "linear")
        original = self.whole("rope.scaling.original_context_length", 0)
        if not isinstance(kind, str):
            raise PretrainedError(
                f"{self.path} has {self.prefix}rope.scaling.type={shown(kind)}, expected a name"
            )
        if kind == "none":
            return None
        found = {"rope_type": kind, "factor": factor}
        return found | ({"original_max_position_embeddings": original} if original else {})

    def refuse_rest(self) -> None:
        """Raises PretrainedError if the file says what nobody has asked for."""
        rest = {k: v for k, v in self.left.items() if k.removeprefix(self.prefix) not in _SILENT}
        if rest:
            said = ", ".join(
                f"{shown(key)[1:-1]}={shown(value)}" for key, value in sorted(rest.items())[:8]
            )
            raise PretrainedError(f"{self.path} asks for what bdjax does not compute: {said}")


def open_gguf(path: str | Path) -> Pretrained:
    """The model in a GGUF file: its config, lazily dequantised tensors and tokenizer.

    Raises PretrainedError with one sentence for what is no whole GGUF file, another architecture, a
    key, a RoPE scaling or a tokenizer that is not known, and without the `gguf` package; OSError
    where the file cannot be read.
    """
    path = Path(path)
    header = read_header(path)
    metadata = header.metadata
    architecture, what = metadata.get("general.architecture"), metadata.get("general.type", "model")
    parts = metadata.get("split.count", 1)
    # Any key may hold an array, which compares with nothing.
    if not isinstance(what, str) or what != "model":
        raise PretrainedError(f"{path} holds a {shown(what)}, expected a model")
    if not isinstance(architecture, str) or architecture not in _CLASSES:
        raise PretrainedError(
            f"{path} is a model of the architecture {shown(architecture)}, which bdjax cannot "
            f"read; take a file of one of these: {', '.join(sorted(_CLASSES))}"
        )
    if not isinstance(parts, int) or parts != 1:
        raise PretrainedError(
            f"{path} is one of {shown(parts)} parts of a model; type llama-gguf-split --merge "
            "FIRST-PART WHOLE.gguf (llama.cpp)"
        )
    stored = lay_out(path, header)
    frequencies = stored.pop(_FREQUENCIES, None)
    named = {_hugging_face(name): one for name, one in stored.items()}
    if len(named) < len(stored):
        raise PretrainedError(f"{path} has one tensor under two names; fetch the file again")
    config = _config(path, header, architecture, named)
    if frequencies is not None:
        config["rope_scaling"] = _llama3_scaling(path, frequencies, config)
    if architecture == "llama":
        named = {name: _roped(path, name, one, config["head_dim"]) for name, one in named.items()}
    where = str(path)
    return Pretrained(
        config=config,
        generation=_generation(metadata, config["vocab_size"], where),
        tensors=GGUFTensors(path=path, stored=named),
        tokenizer_json=tokenizer_json(metadata, where),
        tokenizer_config=tokenizer_config(metadata, where),
        chat_template=_chat_template(metadata, where),
        where=where,
    )


def _hugging_face(name: str) -> str:
    """The Hugging Face name of a tensor; one that is not known keeps its own and stays unused."""
    found = _LAYER.fullmatch(name)
    if found and found[2] in _INNER:
        return f"model.layers.{found[1]}.{_INNER[found[2]]}.{found[3]}"
    outer, _, kind = name.rpartition(".")
    return f"{_OUTER[outer]}.{kind}" if outer in _OUTER else name


def _roped(path: Path, name: str, stored: Stored, head_dim: int) -> Stored:
    """A tensor of the Llama architecture, whose query and key heads are interleaved."""
    if not _ROPED.fullmatch(name):
        return stored
    if head_dim % 2 or stored.info.shape[0] % max(head_dim, 1):
        raise PretrainedError(
            f"{path} is damaged: {shown(stored.info.name)} has {stored.info.shape[0]} rows, "
            f"expected an even number for each head, {head_dim}; fetch the file again"
        )
    return replace(stored, interleaved=head_dim)


def _config(
    path: Path, header: Header, architecture: str, named: dict[str, Stored]
) -> dict[str, Any]:
    keys = _Keys(header.metadata, architecture, path)
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    embedding = named.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.info.shape) != 2 or embedding.info.shape[1] != width:
        raise PretrainedError(
            f"{path} is damaged: token_embd.weight should have rows of {width} values; fetch the "
            "file again"
        )
    vocab_size = embedding.info.shape[0]
    head_dim = keys.whole("attention.key_length", width // max(heads, 1))
    if min(width, heads, head_dim) < 1:
        raise PretrainedError(
            f"{path} is damaged: it has {heads} heads of {head_dim} for {width} values; fetch the "
            "file again"
        )
    config = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.whole("context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10_000.0),
        "rope_scaling": keys.scaling(),
        "tie_word_embeddings": "lm_head.weight" not in named,
    }
    if architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in named
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in named
    equal = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": vocab_size,
        "expert_count": 0,
        "expert_used_count": 0,
    }
    for name, expected in equal.items():
        if (found := keys.whole(name, expected)) != expected:
            raise PretrainedError(
                f"{path} has {architecture}.{name}={found}, and {expected} is what bdjax computes"
            )
    keys.refuse_rest()
    # The families lay out as many layers as the config says: no more than the file has.
    layers = {found[1] for name in named if (found := _LAYERS.match(name))}
    if len(layers) != config["num_hidden_layers"]:
        raise PretrainedError(
            f"{path} is damaged: {architecture}.block_count is {config['num_hidden_layers']}, and "
            f"it has tensors of {len(layers)} layers; fetch the file again"
        )
    return config


def _llama3_scaling(path: Path, stored: Stored, config: dict[str, Any]) -> dict[str, Any]:
    """The scaling whose divisors of the RoPE frequencies the file stores, if it is Llama 3's."""
    divisors = GGUFTensors(path=path, stored={_FREQUENCIES: stored}).read(_FREQUENCIES, ())
    # The lowest frequency is divided by the whole factor, the highest by 1.
    factor, half = float(np.ravel(divisors)[-1]), config["head_dim"] // 2
    known = config["rope_scaling"] is None and 1 <= factor < math.inf
    known = known and divisors.shape == (half,)
    if known:
        turns = _ORIGINAL * config["rope_theta"] ** (-np.arange(half) / half) / (2 * math.pi)
        kept = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
        known = np.allclose(divisors, 1 / (kept + (1 - kept) / factor), rtol=1e-4, atol=0)
    if not known:
        raise PretrainedError(
            f"{path} scales its RoPE by {_FREQUENCIES}, and these are not the frequencies of "
            "Llama 3.1 or 3.2; import the model from its Hugging Face folder"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _generation(metadata: dict[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """BOS and every id that ends an answer: end of text, of a turn and of a message."""
    ends = [special_id(metadata, key, vocab_size, where) for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    bos = special_id(metadata, "bos", vocab_size, where)
    found = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    return {key: value for key, value in found.items() if value not in (None, [])}


def _chat_template(metadata: dict[str, Any], where: str) -> str | None:
    found = metadata.get("tokenizer.chat_template")
    if found is not None and not isinstance(found, str):
        raise PretrainedError(f"{where} is damaged: its chat template is no text")
    return found
