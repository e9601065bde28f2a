"""Imported models against the library `transformers`: hidden states, logits, tokens, and back.

Remote families are their base architecture under another name, as their authors say: SDAR is Qwen3,
Fast-dLLM v2 and Dream are Qwen2, LLaDA is Llama with other names.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import TYPES, config, network

from bdjax.families import family_of
from bdjax.hf_folder import INDEX, read_folder
from bdjax.layout import clean_places
from bdjax.step import block_step
from bdjax.weights import check_tensors, load_parameters, stored
from pallas_kernels import CleanMode

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

ROWS, LENGTH = 288, 40
CLASSES = {
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "sdar": "Qwen3ForCausalLM",
    "Fast_dLLM_Qwen": "Qwen2ForCausalLM",
    "Dream": "Qwen2ForCausalLM",
    "llada": "LlamaForCausalLM",
}
every_type = pytest.mark.parametrize("model_type", TYPES)


def theirs(model_type: str):
    """A random model of the library with the sizes and settings of `pretrained.config`."""
    kind = getattr(transformers, CLASSES[model_type])
    family = family_of(model_type, "test")
    base = family_of(kind.config_class.model_type, "test")
    ours = {own: name for name, own in family.keys.items()}
    keys = {ours.get(key, key): value for key, value in config(model_type).items()}
    own = {key: keys[key] for key in keys if key not in ("model_type", "block_type")}
    torch.manual_seed(0)
    model = kind(kind.config_class(**own, pad_token_id=0)).eval().to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, base


def save(model, base, model_type: str, folder: Path, **options) -> Path:
    """Its folder, with the names and config of the family that it stands for."""
    model.save_pretrained(folder, **options)
    family = family_of(model_type, "test")
    if family is base:
        return folder
    if family.layer is not base.layer:
        renamed = {base.embed: family.embed, base.head: family.head}
        renamed[base.final_norm] = family.final_norm
        for layer in range(4):
            for name in family.layer:
                old = base.layers.format(layer) + base.layer[name]
                renamed[old] = family.layers.format(layer) + family.layer[name]
        state = {renamed[k]: v.contiguous() for k, v in model.state_dict().items()}
        import safetensors.torch

        safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(model_type)))
    return folder


def block_mask(block: int, batch: int):
    """Additive (B, 1, L, L): a token sees its own block and those before."""
    block_of = np.arange(LENGTH) // block
    seen = block_of[:, None] >= block_of[None, :]
    mask = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)
    return torch.tensor(np.broadcast_to(mask, (batch, 1, LENGTH, LENGTH)).copy())


def states(folder: Path, tokens, block: int | None):
    """Our hidden states and logits, token-causal or block-causal."""
    found = read_folder(folder)
    family, model = network(found)
    wanted = stored(family, model.table(), ROWS)
    check_tensors(found, family, wanted)
    params = load_parameters(found, wanted)
    mode = CleanMode.TOKEN if block is None else CleanMode.BLOCK
    model = replace(model, decoder=replace(model.decoder, clean=mode))
    at = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    places = clean_places(at * 0 + 1, at, block or 1)
    hidden, _ = block_step(model, params, jnp.asarray(tokens), places)
    return np.asarray(hidden), np.asarray(hidden @ model.readout.matrix(params, hidden.dtype).T)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, ROWS, (2, LENGTH))


@every_type
@pytest.mark.parametrize("block", [None, 4, LENGTH])
def test_hidden_states_and_logits_are_those_of_transformers(model_type, block, tokens, tmp_path):
    model, base = theirs(model_type)
    folder = save(model, base, model_type, tmp_path)
    mask = None if block is None else block_mask(block, len(tokens))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens), attention_mask=mask, output_hidden_states=True)
    hidden, logits = states(folder, tokens, block)
    np.testing.assert_allclose(hidden, wanted.hidden_states[-1].numpy(), atol=1e-4)
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-4)
    assert np.abs(logits).max() > 1


def test_the_two_masks_differ(tokens, tmp_path):
    model, base = theirs("qwen3")
    folder = save(model, base, "qwen3", tmp_path)
    causal, blocks = (states(folder, tokens, block)[1] for block in (None, 4))
    assert np.abs(causal - blocks).max() > 0.1


def test_shards_with_an_index_are_one_model(tokens, tmp_path):
    model, base = theirs("qwen2")
    one = save(model, base, "qwen2", tmp_path / "one")
    many = save(model, base, "qwen2", tmp_path / "many", max_shard_size="60KB")
    assert (many / INDEX).exists() and len(list(many.glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(states(one, tokens, None)[1], states(many, tokens, None)[1])


def test_the_config_of_transformers_4_means_the_same(tokens, tmp_path):
    """rope_theta and rope_scaling at the top, torch_dtype, and null where the class has a rule."""
    model, base = theirs("llama")
    folder = save(model, base, "llama", tmp_path)
    wanted = states(folder, tokens, None)[1]
    found = json.loads((folder / "config.json").read_text())
    rope = found.pop("rope_parameters")
    older = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    del found["dtype"], found["head_dim"]
    (folder / "config.json").write_text(json.dumps(found | older | {"num_key_value_heads": 2}))
    np.testing.assert_array_equal(states(folder, tokens, None)[1], wanted)
