"""Families of published models: names of their tensors, how they write, what they are known by.

One row of FAMILIES per `model_type` of config.json. Mask ids are numbers, because the same text has
other ids in sister models; a config's own `mask_token_id` goes first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bdjax.parameters import Parameter, Role, Table, is_parameter
from bdjax.pretrained import PretrainedError


class Decoding(Enum):
    """How a family writes, and which preset its training resembles."""

    TOKENS = "tokens"  # one after the other, each read from the clean token before it
    BLOCKS = "blocks"  # SDAR: blocks, block-causal, same position
    WRAPPED_BLOCKS = "wrapped_blocks"  # BD3-LM: the same, counted over a row of wrapped text
    SEEDED_BLOCKS = "seeded_blocks"  # Fast-dLLM v2: block-causal, shifted, a seed from the commit
    WHOLE = "whole"  # LLaDA: the text is one block
    WHOLE_SHIFTED = "whole_shifted"  # Dream: one block, each token read from the row before it


_LLAMA_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
_LLADA_LAYER: Mapping[str, str] = {
    "attn_norm": "attn_norm.weight",
    "wq": "q_proj.weight",
    "wk": "k_proj.weight",
    "wv": "v_proj.weight",
    "wo": "attn_out.weight",
    "mlp_norm": "ff_norm.weight",
    "w_gate": "ff_proj.weight",
    "w_up": "up_proj.weight",
    "w_down": "ff_out.weight",
}
# The network that `bdjax.dit` makes of a diffusion transformer; its files have other tensors.
_DIT_LAYER: Mapping[str, str] = {
    "attn_norm": "norm1.weight",
    "attn_norm_bias": "norm1.bias",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "wo": "attn_out.weight",
    "mlp_norm": "norm2.weight",
    "mlp_norm_bias": "norm2.bias",
    "w_up": "mlp.0.weight",
    "b_up": "mlp.0.bias",
    "w_down": "mlp.2.weight",
    "b_down": "mlp.2.bias",
}
_DIT_KEYS: Mapping[str, str] = {
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "n_blocks",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "model_length",
}
# Where LLaDA's config says the same by another name.
_LLADA_KEYS: Mapping[str, str] = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
    "hidden_act": "activation_type",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model. `layer` are the names after `layers.format(number)`; `embed`, `final_norm`
    and `head` whole names. keys: config.json's own names of keys. head_dim: a class default where
    config.json has none (None: width / heads). tied, rope_theta: class defaults of the same kind.
    block_size: as well, None where config.json must have it. modulated: a diffusion transformer,
    whose noise level `bdjax.dit` folds into the weights. tokenizer: the model whose tokenizer it
    has, where it comes without. leads: prompts begin with BOS, whatever the tokenizer's file says.
    """

    model_type: str
    architecture: str
    decoding: Decoding = Decoding.TOKENS
    qkv_bias: bool = False
    qk_norm: bool = False
    skips_rope: bool = False
    mask_id: int | None = None
    block_key: str = "block_size"
    block_size: int | None = 1
    head_dim: int | None = None
    modulated: bool = False
    tokenizer: str | None = None
    leads: bool = False
    tied: bool = False
    rope_theta: float | None = None
    layers: str = "model.layers.{}."
    layer: Mapping[str, str] = field(default_factory=lambda: _LLAMA_LAYER, repr=False)
    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)

    def file_names(self, table: Table) -> dict[str, tuple[str, Parameter]]:
        """Our name of every parameter, "layers/wq", to its file name (with {} for the layer)."""
        whole = {"embed": self.embed, "final_norm": self.final_norm, "head": self.head}
        for name in ("final_norm", "head"):
            whole[f"{name}_bias"] = whole[name].removesuffix("weight") + "bias"
        names = {name: (whole[name], node) for name, node in table.items() if is_parameter(node)}
        for name, node in table["layers"].items():
            names[f"layers/{name}"] = (self.layers + self.layer[name], node)
        return names


_DIT: Mapping[str, Any] = {
    "modulated": True,
    "tokenizer": "gpt2",
    "mask_id": 50_257,
    "rope_theta": 1e4,
    "layers": "blocks.{}.",
    "layer": _DIT_LAYER,
    "embed": "vocab_embed.embedding",
    "final_norm": "output_layer.norm_final.weight",
    "head": "output_layer.linear.weight",
    "keys": _DIT_KEYS,
}
FAMILIES = (
    Family(model_type="llama", architecture="LlamaForCausalLM"),
    Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        skips_rope=True,
        tied=True,
        rope_theta=2e6,
    ),
    Family(model_type="qwen2", architecture="Qwen2ForCausalLM", qkv_bias=True),
    Family(model_type="qwen3", architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    # TraDo too.
    Family(
        model_type="sdar",
        architecture="SDARForCausalLM",
        decoding=Decoding.BLOCKS,
        qk_norm=True,
        mask_id=151_669,
        block_size=4,
        head_dim=128,
    ),
    Family(
        model_type="Fast_dLLM_Qwen",
        architecture="Fast_dLLM_QwenForCausalLM",
        decoding=Decoding.SEEDED_BLOCKS,
        qkv_bias=True,
        mask_id=151_665,
        block_key="bd_size",
        block_size=32,
    ),
    # DiffuCoder too.
    Family(
        model_type="Dream",
        architecture="DreamModel",
        decoding=Decoding.WHOLE_SHIFTED,
        qkv_bias=True,
        mask_id=151_666,
    ),
    Family(
        model_type="llada",
        architecture="LLaDAModelLM",
        decoding=Decoding.WHOLE,
        mask_id=126_336,
        layers="model.transformer.blocks.{}.",
        layer=_LLADA_LAYER,
        embed="model.transformer.wte.weight",
        final_norm="model.transformer.ln_f.weight",
        head="model.transformer.ff_out.weight",
        keys=_LLADA_KEYS,
    ),
    Family(
        model_type="bd3lm",
        architecture="BD3LM",
        decoding=Decoding.WRAPPED_BLOCKS,
        block_size=None,
        leads=True,
        **_DIT,
    ),
    Family(model_type="mdlm", architecture="MDLM", decoding=Decoding.WHOLE, **_DIT),
)


def family_of(model_type: object, where: str) -> Family:
    """The family of a `model_type`, whatever its capitals.

    Raises PretrainedError naming those there are.
    """
    for family in FAMILIES:
        if isinstance(model_type, str) and family.model_type.casefold() == model_type.casefold():
            return family
    raise PretrainedError(
        f"{where} is of model_type {str(model_type)[:80]!r}, which bdjax cannot read; it reads "
        + ", ".join(family.model_type for family in FAMILIES)
    )


def groups(parameter: Parameter) -> tuple[tuple[int, ...], ...]:
    """Which of a parameter's axes make up each axis of its tensor in a file, layers aside.

    A file's matrix is [out, in] and heads are written out: q_proj.weight is ((heads, head_dim),
    (width,)) of our (width, heads, head_dim).
    """
    first = 1 if "layers" in parameter.axes else 0
    own = range(first, len(parameter.axes))
    if parameter.role is Role.EMBEDDING:
        return tuple((axis,) for axis in own)
    if parameter.contracted:
        return tuple(a for a in own if a not in parameter.contracted), parameter.contracted
    return (tuple(own),)
