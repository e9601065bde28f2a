"""config.json to a `DecoderConfig`: every key that changes a number is used, or refused by name."""

import json
import warnings
from collections.abc import Mapping, Set
from typing import Any

from bdjax.families import Decoding, Family
from bdjax.model import DecoderConfig, Llama3Scaling, Mlp, Norm
from bdjax.pretrained import Pretrained, PretrainedError
from pallas_kernels import CleanMode

_OFF = (None, False)
# What a key must be, where it is there at all; the rest is another network than `DecoderConfig`.
_NEUTRAL: Mapping[str, tuple] = {
    "hidden_act": ("silu",),
    "activation_type": ("silu",),
    "mlp_bias": _OFF,
    "use_sliding_window": _OFF,
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleaved": _OFF,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "quantization_config": (None,),
    "use_mrope": _OFF,
    # Of relatives of these families.
    "original_max_position_embeddings": (None,),
    "dual_chunk_attention_config": (None,),
    "attention_chunk_size": (None,),
    "attn_temperature_tuning": _OFF,
    "sliding_window_pattern": (None, 1),
    "interleaved_sliding_window": (None,),
    "rope_interleave": _OFF,
    "rope_ratio": (None, 1),
    "rotary_dim": (None,),
    "parallel_residual": _OFF,
    "use_parallel_residual": _OFF,
    "scale_emb": (None, 1),
    "embedding_scale": (None, 1),
    "residual_scale": (None, 1),
    "clip_qkv": (None,),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "alibi": _OFF,
    "attention_layer_norm": _OFF,
    "bias_for_layer_norm": _OFF,
    "block_group_size": (None, 1),
    "block_type": ("llama",),
    "include_bias": _OFF,
    "include_qkv_bias": _OFF,
    "input_emb_norm": _OFF,
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (None, True),
    "multi_query_attention": _OFF,
    "rope": (True,),
    "rope_full_precision": (None, True),
    "scale_logits": _OFF,
}
# What LLaDA's class takes for another network's where config.json is silent, at the same tensors.
_LLADA_NEEDED = ("layer_norm_type", "rope")
_QK_NORM = ("qk_norm", "use_qk_norm", "qk_layernorm")
# Read here, or of no consequence for what the network computes.
_KNOWN = """
architectures model_type torch_dtype dtype transformers_version auto_map use_cache bos_token_id
eos_token_id pad_token_id mask_token_id sep_token_id initializer_range attention_dropout
max_position_embeddings max_window_layers pretraining_tp _name_or_path attn_implementation
_attn_implementation fuse_cross_entropy micro_forward skip_checkpoint use_deepep ep_size debug
tie_word_embeddings vocab_size hidden_size intermediate_size num_hidden_layers
num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling
rope_parameters attention_bias sliding_window layer_types no_rope_layers
no_rope_layer_interval block_size bd_size block_diffusion d_model mlp_hidden_size mlp_ratio
n_layers n_heads n_kv_heads max_sequence_length weight_tying embedding_size alibi_bias_max
attention_layer_norm_with_affine embedding_dropout residual_dropout flash_attention
init_cutoff_factor init_device init_fn init_std precision hidden_dropout
return_dict output_attentions output_hidden_states chunk_size_feed_forward id2label label2id
problem_type use_bfloat16 task_specific_params transformers.js_config is_llama_config is_decoder
"""
# The same for diffusion transformers, whose config has few keys and none in common with a Llama's.
_DIT_NEUTRAL: Mapping[str, tuple] = {
    "time_conditioning": _OFF,
    "adaln": (None, True),
    "causal": _OFF,
    "parameterization": (None, "subs"),
    "scale_by_sigma": _OFF,
    "tie_word_embeddings": _OFF,
    "quantization_config": (None,),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
}
_DIT_KNOWN = """
architectures model_type torch_dtype dtype transformers_version auto_map bos_token_id eos_token_id
pad_token_id mask_token_id vocab_size hidden_dim cond_dim n_blocks n_heads model_length block_size
cross_attn attn_backend dropout var_min sampling_eps_min sampling_eps_max return_dict
output_attentions output_hidden_states _name_or_path block_diffusion
"""
# A length beyond this is no model's; what is derived from it would be built before it is refused.
_LARGEST = 2**31
# What float32 can hold.
_SMALLEST_NUMBER, _LARGEST_NUMBER = 1e-37, 1e37


class ConfigReader:
    """Keys of one config.json, each checked when it is asked for; errors name key and file."""

    def __init__(self, pretrained: Pretrained, family: Family):
        self._found = pretrained.config
        self._family = family
        self._where = pretrained.where

    def fail(self, key: str, expected: str) -> PretrainedError:
        """The error for a key that is not as `expected`."""
        name = self._family.keys.get(key, key)
        value = f"no {name}"
        if name in self._found:
            value = f"{name}={json.dumps(self._found[name])[:80]}"
        return PretrainedError(
            f"config.json of {self._where} has {value}; bdjax reads {self._family.model_type} "
            f"models with {expected}"
        )

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands."""
        return self._found.get(self._family.keys.get(key, key), default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < _LARGEST:
            raise self.fail(key, "a positive integer there")
        return value

    def number(self, key: str, value: Any) -> float:
        """`value` as a float above zero that float32 can hold; errors name `key`."""
        if type(value) not in (int, float) or not _SMALLEST_NUMBER < value < _LARGEST_NUMBER:
            raise self.fail(key, "a number above zero there, at most 1e37")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; `default` where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.fail(key, "true or false there")
        return value

    def check(self) -> None:
        """Refuses keys that would change a number; warns of those that nobody here has heard of."""
        if self._family.modulated:
            self._check_neutral(_DIT_NEUTRAL)
            self._warn({*_DIT_KNOWN.split(), *_DIT_NEUTRAL})
            return
        self._check_neutral(_NEUTRAL)
        for key in _LLADA_NEEDED if self._family.keys else ():
            if key not in self._found:
                raise self.fail(key, f"{json.dumps(*_NEUTRAL[key])} there")
        for key in _QK_NORM:
            if self._found.get(key) not in (None, self._family.qk_norm):
                raise self.fail(key, f"{str(self._family.qk_norm).lower()} there")
        # Qwen2 has biases whatever this key says; elsewhere the output would get one too.
        if not self._family.qkv_bias and self._found.get("attention_bias") not in _OFF:
            raise self.fail("attention_bias", "false there")
        window = self._found.get("sliding_window")
        if window is not None and self._found.get("use_sliding_window") is not False:
            raise self.fail("sliding_window", "use_sliding_window=false")
        kinds = self._found.get("layer_types")
        if kinds is not None and (
            not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
        ):
            raise self.fail("layer_types", "full_attention in every layer")
        self._warn({*_KNOWN.split(), *_NEUTRAL, *_QK_NORM})

    def _check_neutral(self, neutral: Mapping[str, tuple]) -> None:
        for key, allowed in neutral.items():
            if key in self._found and self._found[key] not in allowed:
                raise self.fail(key, f"{' or '.join(map(json.dumps, allowed))} there")

    def _warn(self, known: Set[str]) -> None:
        unknown = sorted(self._found.keys() - known)
        if unknown:
            names = ", ".join(unknown)[:300]
            warnings.warn(
                f"config.json of {self._where} has keys that bdjax does not know and passes over: "
                f"{names}",
                stacklevel=4,
            )


def decoder_config(
    pretrained: Pretrained, family: Family, dtype: str | None = None
) -> DecoderConfig:
    """The network that config.json describes, computed in `dtype` (None: that of the files).

    Raises PretrainedError for a key that is missing, wrong or of another network.
    """
    read = ConfigReader(pretrained, family)
    read.check()
    width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    layers = read.integer("num_hidden_layers")
    if layers > len(pretrained.tensors.shapes):
        raise read.fail("num_hidden_layers", "no more layers than tensors")
    if family.modulated:
        return _dit_config(read, family, width, heads, layers, dtype)
    theta, scaling = _rope(read, family)
    blocks = family.decoding is not Decoding.TOKENS
    try:
        return DecoderConfig(
            num_layers=layers,
            width=width,
            num_heads=heads,
            num_kv_heads=read.integer("num_key_value_heads", heads),
            head_dim=read.integer("head_dim", family.head_dim or max(width // heads, 1)),
            mlp_width=read.integer("intermediate_size"),
            clean=CleanMode.BLOCK if blocks else CleanMode.TOKEN,
            rope_theta=theta,
            rope_scaling=scaling,
            rope_layers=_rope_layers(read, family, layers),
            norm_eps=read.number("rms_norm_eps", read.get("rms_norm_eps")),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            tied_head=read.flag("tie_word_embeddings", family.tied),
            dtype=dtype or _arithmetic(pretrained, family),
        )
    except PretrainedError:
        raise
    except ValueError as error:
        raise PretrainedError(f"config.json of {pretrained.where} has {error}") from error


def _dit_config(
    read: ConfigReader, family: Family, width: int, heads: int, layers: int, dtype: str | None
) -> DecoderConfig:
    """A diffusion transformer's, with what its config leaves to the class that reads it.

    float32 unless asked: folded weights are no bfloat16 numbers, whatever those of the files are.
    """
    if width % heads or width // heads % 2:
        raise read.fail("num_attention_heads", f"heads of an even width out of {width}")
    if not read.flag("cross_attn", True) and read.integer("block_size") < read.integer(
        "max_position_embeddings"
    ):
        raise read.fail(
            "cross_attn",
            "true there, or with block_size=model_length: all tokens see each other without it",
        )
    return DecoderConfig(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        clean=CleanMode.BLOCK,
        rope_theta=family.rope_theta,
        norm_eps=1e-5,
        norm=Norm.LAYER,
        mlp=Mlp.GELU,
        head_bias=True,
        dtype=dtype or "float32",
    )


def rows_of(pretrained: Pretrained, family: Family) -> int:
    """Rows of the embedding."""
    read = ConfigReader(pretrained, family)
    size = read.integer("vocab_size")
    # LLaDA's table may be padded beyond its vocabulary; it alone has the key.
    padded = family.decoding is Decoding.WHOLE and not family.modulated
    return read.integer("embedding_size", size) if padded else size


def _arithmetic(pretrained: Pretrained, family: Family) -> str:
    """bfloat16 for weights in it, float32 for all others: each holds the weights exactly."""
    return "bfloat16" if pretrained.tensors.dtypes.get(family.embed) == "bfloat16" else "float32"


def _rope(read: ConfigReader, family: Family) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, as transformers 4 writes them (rope_scaling) or 5 (rope_parameters)."""
    key = "rope_scaling" if read.get("rope_parameters") is None else "rope_parameters"
    found = read.get(key)
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise read.fail(key, "null or an object there")
    if any(isinstance(value, dict) for value in found.values()):
        raise read.fail(key, "the same in every layer")
    older = read.get("rope_scaling")
    if older is not None and (not isinstance(older, dict) or _turns(older) != _turns(found)):
        raise read.fail("rope_scaling", "the same there as in rope_parameters")
    theta, outer = found.get("rope_theta"), read.get("rope_theta")
    if theta is not None and outer is not None and theta != outer:
        raise read.fail("rope_theta", f"the same there as in {key}, {str(theta)[:80]}")
    theta = outer if theta is None else theta
    theta = family.rope_theta if theta is None else theta
    if theta is None:
        raise read.fail("rope_theta", "the base of its RoPE there")
    theta = read.number("rope_theta", theta)
    if found.get("partial_rotary_factor") not in (None, 1):
        raise read.fail(key, "partial_rotary_factor=1")
    kind = _turns(found)["rope_type"]
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise read.fail(key, "rope_type default or llama3")
    original = found.get("original_max_position_embeddings")
    if type(original) is not int or not 0 < original < _LARGEST:
        raise read.fail(key, "original_max_position_embeddings as a positive integer")
    factor, low, high = (
        read.number(key, found.get(name))
        for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if not low < high:
        raise read.fail(key, "low_freq_factor below high_freq_factor")
    return theta, Llama3Scaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_length=original
    )


def _turns(found: dict[str, Any]) -> dict[str, Any]:
    """A scaling without its base and under the newer name of its kind."""
    rest = {key: value for key, value in found.items() if key not in ("rope_theta", "type")}
    return {"rope_type": found.get("type", "default")} | rest


def _rope_layers(read: ConfigReader, family: Family, layers: int) -> tuple[bool, ...] | None:
    """Which layers rotate; None for all of them."""
    if not family.skips_rope:
        if read.get("no_rope_layers") is not None:
            raise read.fail("no_rope_layers", "null there")
        return None
    found = read.get("no_rope_layers")
    if found is None:
        every = read.integer("no_rope_layer_interval", 4)
        found = [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(found, list) or len(found) < layers or any(x not in (0, 1) for x in found):
        raise read.fail("no_rope_layers", "a 0 or 1 for every layer there")
    rotated = tuple(bool(x) for x in found[:layers])
    return None if all(rotated) else rotated
