"""What the tensors of a family's files mean: a forward pass in NumPy that knows their names."""

import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import ROWS, network, pretrained

from bdjax.families import Decoding
from bdjax.layout import clean_places
from bdjax.step import block_step
from bdjax.weights import load_parameters, stored

LENGTH, HEADS, KV, EPS, THETA = 24, 4, 2, 1e-5, 5000.0
QWEN = {
    "layer": "model.layers.{}.",
    "in": "input_layernorm",
    "post": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
LLADA = {
    "layer": "model.transformer.blocks.{}.",
    "in": "attn_norm",
    "post": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
    "embed": "model.transformer.wte.weight",
    "norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
}


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def rotate(x, turned: bool, llama3: bool):
    """Pairs (i, i + half) of (T, heads, dim) by position times frequency."""
    half = x.shape[-1] // 2
    frequency = THETA ** (-np.arange(half) / half)
    if llama3:  # factor 8, low 1, high 4, original context 32
        wavelength = 2 * np.pi / frequency
        smooth = (32 / wavelength - 1) / 3
        between = (1 - smooth) * frequency / 8 + smooth * frequency
        slow = np.where(wavelength > 32, frequency / 8, between)
        frequency = np.where(wavelength < 8, frequency, slow)
    angle = np.arange(len(x))[:, None, None] * frequency * turned
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def logits(tensors, names, model_type: str, tokens, seen):
    """float64 logits (T, V) of one row; `seen[i, j]`: i sees j."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    x = w[names["embed"]][tokens]
    for layer in range(4):

        def part(name, kind="weight", layer=layer):
            return w[f"{names['layer'].format(layer)}{names.get(name, name)}.{kind}"]

        def project(h, name):
            out = h @ part(name).T
            if model_type in ("qwen2", "Fast_dLLM_Qwen", "Dream"):
                out = out + part(name, "bias")
            return out

        h = norm(x, part("in"))
        q = project(h, "q").reshape(LENGTH, HEADS, -1)
        k, v = (project(h, name).reshape(LENGTH, KV, -1) for name in "kv")
        if model_type in ("qwen3", "sdar"):
            q, k = norm(q, part("self_attn.q_norm")), norm(k, part("self_attn.k_norm"))
        turned = not (model_type == "smollm3" and layer == 3)
        q, k = (rotate(y, turned, model_type == "llama") for y in (q, k))
        k, v = (np.repeat(y, HEADS // KV, axis=1) for y in (k, v))
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("nqk,knh->qnh", p, v).reshape(LENGTH, -1) @ part("o").T
        h = norm(x, part("post"))
        gate = h @ part("gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ part("up").T)) @ part("down").T
    head = w.get(names["head"], w[names["embed"]])
    return norm(x, w[names["norm"]]) @ head.T


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "qwen2", "qwen3", "llada"])
def test_logits_are_those_of_the_named_tensors(model_type):
    found = pretrained(model_type)
    family, model = network(found)
    params = load_parameters(found, stored(family, model.table(), ROWS))
    block = 1 if family.decoding is Decoding.TOKENS else 4
    tokens = np.random.default_rng(0).integers(0, ROWS, LENGTH)
    of = np.arange(LENGTH) // block
    names = LLADA if model_type == "llada" else QWEN
    wanted = logits(found.tensors.arrays, names, model_type, tokens, of[:, None] >= of)
    at = jnp.arange(LENGTH)[None]
    places = clean_places(at * 0 + 1, at, block)
    hidden, _ = block_step(model, params, jnp.asarray(tokens)[None], places)
    got = np.asarray(hidden @ model.readout.matrix(params, hidden.dtype).T)[0]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.abs(wanted).max() > 1
