"""Diffusion transformers (BD3-LM, MDLM): their noise level folded away changes nothing."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import Arrays, tokenizer_json, write_folder

import bdjax
from bdjax.cli import main
from bdjax.dit import folded
from bdjax.embedding import TokenEmbedding
from bdjax.families import FAMILIES, family_of
from bdjax.family_config import decoder_config
from bdjax.importing import config_of, parameters_of
from bdjax.layout import Places, clean_places, join, join_places, noisy_places
from bdjax.objective import Alignment
from bdjax.pretrained import Pretrained, PretrainedError
from bdjax.readout import TokenReadout
from bdjax.step import Model, block_step
from bdjax.weights import load_parameters, stored, to_file
from pallas_kernels import CleanMode, dense_mask

TYPES = tuple(family.model_type for family in FAMILIES if family.modulated)
WIDTH, HEADS, LAYERS, COND, LENGTH, BLOCK = 32, 4, 2, 8, 16, 4
# The ids of the test's tokenizer, and one more: the mask.
ROWS, EOS = 281, 1
MASK = ROWS - 1


def config(model_type: str, **more) -> dict:
    """A config.json with the keys of BD3-LM's and MDLM's own classes."""
    found = {
        "model_type": model_type,
        "vocab_size": ROWS,
        "model_length": LENGTH,
        "hidden_dim": WIDTH,
        "cond_dim": COND,
        "n_blocks": LAYERS,
        "n_heads": HEADS,
        "dropout": 0.1,
        "time_conditioning": False,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
    }
    if model_type == "bd3lm":
        found |= {"block_size": BLOCK, "cross_attn": True, "adaln": True, "causal": False}
        found |= {"attn_backend": "flex", "var_min": True}
        found |= {"sampling_eps_min": 1e-3, "sampling_eps_max": 0.999}
    return found | more


def shapes() -> dict[str, tuple[int, ...]]:
    """What the description of the checkpoints lists."""
    d = WIDTH
    found = {
        "vocab_embed.embedding": (ROWS, d),
        "sigma_map.mlp.0.weight": (COND, 256),
        "sigma_map.mlp.0.bias": (COND,),
        "sigma_map.mlp.2.weight": (COND, COND),
        "sigma_map.mlp.2.bias": (COND,),
    }
    for n in range(LAYERS):
        at = f"blocks.{n}."
        found |= {at + "norm1.weight": (d,), at + "norm2.weight": (d,)}
        found |= {at + "attn_qkv.weight": (3 * d, d), at + "attn_out.weight": (d, d)}
        found |= {at + "mlp.0.weight": (4 * d, d), at + "mlp.0.bias": (4 * d,)}
        found |= {at + "mlp.2.weight": (d, 4 * d), at + "mlp.2.bias": (d,)}
        found |= {at + "adaLN_modulation.weight": (6 * d, COND)}
        found |= {at + "adaLN_modulation.bias": (6 * d,)}
    out = "output_layer."
    found |= {out + "norm_final.weight": (d,)}
    found |= {out + "adaLN_modulation.weight": (2 * d, COND)}
    found |= {out + "adaLN_modulation.bias": (2 * d,)}
    return found | {out + "linear.weight": (ROWS, d), out + "linear.bias": (ROWS,)}


@cache
def arrays() -> dict[str, np.ndarray]:
    """Random tensors, those of the modulation too, which are zero in a fresh model."""
    rng = np.random.default_rng(0)

    def draw(name, shape):
        x = rng.standard_normal(shape)
        if "norm" in name:
            x = 1 + 0.3 * x
        elif len(shape) == 1:
            x = 0.3 * x
        elif name == "vocab_embed.embedding":
            x = 0.02 * x  # as small as trained ones, so that the norms' epsilon matters
        else:
            x = x / np.sqrt(shape[1])
        return x.astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes().items()}


def pretrained(model_type: str, prefix: str = "backbone.", **more) -> Pretrained:
    """A checkpoint in memory, with the buffers that BD3-LM's own class adds."""
    found = {prefix + name: array for name, array in arrays().items()}
    found[prefix + "rotary_emb.inv_freq"] = np.ones(WIDTH // HEADS // 2, np.float32)
    if model_type == "bd3lm":
        found |= {f"sampling_eps_{end}": np.array(0.5, np.float32) for end in ("min", "max")}
    return Pretrained(config=config(model_type, **more), tensors=Arrays(found), where="tiny")


def plain(found: Pretrained) -> tuple[Model, list, Pretrained]:
    """The network, where its parameters are, and the files without a noise level."""
    family = family_of(found.config["model_type"], found.where)
    c = decoder_config(found, family, "float32")
    model = Model(
        decoder=c,
        embedding=TokenEmbedding(vocab_size=ROWS, width=c.width, dtype=c.dtype),
        readout=TokenReadout(vocab_size=ROWS, width=c.width, bias=c.head_bias),
    )
    return model, stored(family, model.table(), ROWS), folded(found, family, c, ROWS)


# The published formulas, unfolded, in float64.


def silu(x):
    return x / (1 + np.exp(-x))


def modulated(tokens, positions, seen):
    """Final hidden states and logits of one row; `seen` (T, T) is True where a token is seen."""
    w = {name: array.astype(np.float64) for name, array in arrays().items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return centred / spread * w[f"{name}.weight"]

    def turned(x):
        half = x.shape[-1] // 2
        angle = positions[:, None, None] * 1e4 ** (-np.arange(half) / half)
        one, two = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    waves = np.concatenate([np.cos(np.zeros(128)), np.sin(np.zeros(128))])
    c = silu(linear("sigma_map.mlp.2", silu(linear("sigma_map.mlp.0", waves))))
    x = w["vocab_embed.embedding"][tokens]
    for n in range(LAYERS):
        at = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
            linear(f"{at}.adaLN_modulation", c), 6
        )
        h = norm(f"{at}.norm1", x) * (1 + scale1) + shift1
        q, k, v = np.moveaxis(linear(f"{at}.attn_qkv", h).reshape(len(x), 3, HEADS, -1), 1, 0)
        scores = np.einsum("tnh,snh->nts", turned(q), turned(k)) / np.sqrt(q.shape[-1])
        scores = np.where(seen, scores, -np.inf)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", share, v).reshape(x.shape)
        x = x + gate1 * linear(f"{at}.attn_out", mixed)
        h = norm(f"{at}.norm2", x) * (1 + scale2) + shift2
        up = linear(f"{at}.mlp.0", h)
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + gate2 * linear(f"{at}.mlp.2", up)
    shift, scale = np.split(linear("output_layer.adaLN_modulation", c), 2)
    hidden = norm("output_layer.norm_final", x) * (1 + scale) + shift
    return hidden, linear("output_layer.linear", hidden)


def rows_of(model_type: str) -> tuple[np.ndarray, Places]:
    """Two rows as each family trains on them: one noisy block, or a clean stream and a view."""
    rng = np.random.default_rng(1)
    text = rng.integers(0, MASK, (2, LENGTH))
    noisy = np.where(rng.random(text.shape) < 0.5, MASK, text)
    at = jnp.broadcast_to(jnp.arange(LENGTH), text.shape)
    block = BLOCK if model_type == "bd3lm" else LENGTH
    clean = clean_places(at * 0 + 1, at, block)
    if model_type == "mdlm":
        return noisy, noisy_places(clean, 1)
    both = join(jnp.asarray(text), jnp.asarray(noisy))
    return np.asarray(both), join_places(clean, noisy_places(clean, 1))


def seen_by_hand(model_type: str) -> np.ndarray:
    """The mask of training.md 3.1 for [clean; noisy], or everything."""
    if model_type == "mdlm":
        return np.ones((LENGTH, LENGTH), bool)
    block = np.arange(LENGTH) // BLOCK
    before, same = block[:, None] > block, block[:, None] == block
    return np.block([[before | same, np.zeros_like(same)], [before, same]])


@pytest.mark.parametrize("model_type", TYPES)
def test_the_imported_network_is_the_modulated_one(model_type):
    found = pretrained(model_type)
    model, wanted, files = plain(found)
    params = load_parameters(files, wanted)
    tokens, places = rows_of(model_type)
    hidden, _ = block_step(model, params, jnp.asarray(tokens), places)
    logits = hidden @ model.readout.matrix(params, hidden.dtype).T + model.readout.added(params)
    seen = seen_by_hand(model_type)
    assert np.array_equal(seen, dense_mask(places.meta, places.meta, CleanMode.BLOCK)[0])
    for row in range(len(tokens)):
        one, two = modulated(tokens[row], np.asarray(places.position)[row], seen)
        np.testing.assert_allclose(hidden[row], one, atol=1e-4)
        np.testing.assert_allclose(logits[row], two, atol=1e-4)
        assert np.abs(two).max() > 1


def test_each_folded_tensor_is_its_formula_rounded_once():
    _, _, files = plain(pretrained("mdlm"))
    w = {name: array.astype(np.float64) for name, array in arrays().items()}

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    ones = np.repeat((1.0, 0.0), 128)
    c = silu(linear("sigma_map.mlp.2", silu(linear("sigma_map.mlp.0", ones))))
    parts = np.split(linear("blocks.1.adaLN_modulation", c), 6)
    last = np.split(linear("output_layer.adaLN_modulation", c), 2)
    assert min(np.abs(part).max() for part in (*parts, *last)) > 0.1
    expected = {
        "blocks.1.norm1.weight": w["blocks.1.norm1.weight"] * (1 + parts[1]),
        "blocks.1.norm1.bias": parts[0],
        "blocks.1.attn_q.weight": w["blocks.1.attn_qkv.weight"][:WIDTH],
        "blocks.1.attn_k.weight": w["blocks.1.attn_qkv.weight"][WIDTH : 2 * WIDTH],
        "blocks.1.attn_v.weight": w["blocks.1.attn_qkv.weight"][2 * WIDTH :],
        "blocks.1.attn_out.weight": parts[2][:, None] * w["blocks.1.attn_out.weight"],
        "blocks.1.norm2.weight": w["blocks.1.norm2.weight"] * (1 + parts[4]),
        "blocks.1.norm2.bias": parts[3],
        "blocks.1.mlp.0.weight": w["blocks.1.mlp.0.weight"],
        "blocks.1.mlp.0.bias": w["blocks.1.mlp.0.bias"],
        "blocks.1.mlp.2.weight": parts[5][:, None] * w["blocks.1.mlp.2.weight"],
        "blocks.1.mlp.2.bias": parts[5] * w["blocks.1.mlp.2.bias"],
        "output_layer.norm_final.weight": w["output_layer.norm_final.weight"] * (1 + last[1]),
        "output_layer.norm_final.bias": last[0],
        "output_layer.linear.bias": w["output_layer.linear.bias"],
        "vocab_embed.embedding": w["vocab_embed.embedding"],
    }
    for name, wanted in expected.items():
        assert files.tensors.shapes[name] == wanted.shape
        whole = files.tensors.read(name, tuple(slice(0, size) for size in wanted.shape))
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, wanted, rtol=1e-7, atol=1e-12, err_msg=name)
        box = (slice(3, 7), *(slice(1, size) for size in wanted.shape[1:]))
        assert np.array_equal(files.tensors.read(name, box), whole[box])


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_names_lead_to_parameters_and_back(model_type, prefix):
    model, wanted, files = plain(pretrained(model_type, prefix))
    names = [file for one in wanted for file in one.files]
    assert sorted(names) == sorted(files.tensors.shapes)
    params = load_parameters(files, wanted)
    for one in wanted:
        *parents, last = one.name.split("/")
        value = np.asarray((params["layers"] if parents else params)[last])
        for layer, file in enumerate(one.files):
            back = to_file(one, value[layer] if one.stacked else value)
            whole = tuple(slice(0, size) for size in back.shape)
            assert np.array_equal(back, files.tensors.read(file, whole))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_json(tmp_path_factory.mktemp("tokenizer"))


def test_a_mesh_holds_the_same_parameters(tokenizer):
    """Rows of the folded matrices are split over both axes, biases over the second."""
    found = replace(pretrained("bd3lm"), tokenizer_json=tokenizer)
    whole = parameters_of(found, config_of(found))
    mesh = bdjax.MeshConfig(fsdp=2, tensor=2)
    with jax.set_mesh(mesh.build()):
        split = parameters_of(found, config_of(found, mesh=mesh))
    assert split["head_bias"].shape == (288,)
    assert split["head_bias"].addressable_shards[0].data.shape == (144,)
    assert split["layers"]["wo"].addressable_shards[0].data.shape == (LAYERS, 2, 8, 16)
    assert split["layers"]["b_up"].addressable_shards[0].data.shape == (LAYERS, 64)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other), whole, split)


def broken(change) -> Pretrained:
    found = pretrained("bd3lm")
    change(found.tensors.arrays)
    return found


def test_all_that_is_missing_unused_or_of_another_shape_is_listed_by_its_own_name():
    def change(tensors):
        for n in range(LAYERS):
            del tensors[f"backbone.blocks.{n}.attn_qkv.weight"]
        tensors["backbone.pos_embed"] = np.zeros(3, np.float32)
        name = "backbone.output_layer.linear.bias"
        tensors[name] = tensors[name][1:]

    with pytest.raises(PretrainedError) as error:
        plain(broken(change))
    said = str(error.value)
    assert "2 missing (backbone.blocks.{0..1}.attn_qkv.weight)" in said
    assert "1 unused (backbone.pos_embed)" in said
    assert "backbone.output_layer.linear.bias is 280, expected 281" in said


REFUSED = {
    "time": ("mdlm", {"time_conditioning": True}, "time_conditioning=true.*null or false there"),
    "no modulation": ("bd3lm", {"adaln": False}, "adaln=false.*null or true there"),
    "causal": ("bd3lm", {"causal": True}, "causal=true.*null or false there"),
    "sedd": ("mdlm", {"parameterization": "sedd"}, "parameterization=.*null or .*subs"),
    "tied": ("mdlm", {"tie_word_embeddings": True}, "tie_word_embeddings=true"),
    "heads": ("mdlm", {"n_heads": 5}, "n_heads=5.*heads of an even width out of 32"),
    "no width": ("mdlm", {"hidden_dim": None}, "hidden_dim=null.*positive integer"),
    "level": ("mdlm", {"cond_dim": "wide"}, "cond_dim=.*positive integer"),
    "whole": ("bd3lm", {"cross_attn": False}, "cross_attn=false.*block_size=model_length"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_another_network_is_refused_by_its_key(fault):
    model_type, change, message = REFUSED[fault]
    with pytest.raises(PretrainedError, match=message):
        plain(pretrained(model_type, **change))


def test_facts_of_sampling(tokenizer):
    found = replace(pretrained("bd3lm"), tokenizer_json=tokenizer)
    config = config_of(found)
    objective = config.objective
    assert objective.process.mask_id == config.tokenizer.mask_id == MASK
    assert (objective.block_size.largest, objective.clean_stream) == (BLOCK, True)
    assert config.model.clean is CleanMode.BLOCK
    assert objective.alignment is Alignment.SAME_POSITION
    # The paper's wrapped text: blocks are counted along the row.
    assert not objective.documents and not config.data.aligned
    assert (config.data.row_length, config.model.dtype) == (LENGTH, "float32")
    assert MASK in config.build_model().readout.banned
    # Its sampler begins every text with BOS, which GPT-2's file does not write.
    assert config.tokenizer.starts_with_bos

    whole = config_of(replace(pretrained("mdlm"), tokenizer_json=tokenizer))
    one = pretrained("bd3lm", block_size=LENGTH, cross_attn=False)
    for config in (whole, config_of(replace(one, tokenizer_json=tokenizer))):
        assert config.objective.block_size.largest == LENGTH
        assert not config.objective.clean_stream
    assert not whole.tokenizer.starts_with_bos


def test_what_is_ambiguous_is_asked_for(tokenizer):
    found = replace(pretrained("bd3lm"), tokenizer_json=tokenizer)

    def without(*keys):
        left = {key: value for key, value in found.config.items() if key not in keys}
        return replace(found, config=left)

    with pytest.raises(PretrainedError, match="no mask_token_id.*mask there unless it is 50257"):
        config_of(without("mask_token_id"))
    with pytest.raises(PretrainedError, match="no block_size.*positive integer"):
        config_of(without("block_size"))
    with pytest.raises(PretrainedError, match="no end-of-sequence token; type eos_token_id"):
        config_of(without("eos_token_id"))
    with pytest.raises(PretrainedError, match=r"from_pretrained\('gpt2'\).save_pretrained"):
        config_of(pretrained("mdlm"))


def test_no_folder_of_transformers_holds_such_a_network(tokenizer, tmp_path):
    folder = write_folder(tmp_path / "bd3lm", pretrained("bd3lm"), tokenizer)
    loaded = bdjax.load(folder)
    with pytest.raises(PretrainedError, match="norm=layer and mlp=gelu and head_bias=true is none"):
        bdjax.export_model(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_is_imported_and_writes_text_without_masks(
    model_type, tokenizer, tmp_path, capsys
):
    folder = write_folder(tmp_path / model_type, pretrained(model_type), tokenizer)
    run = tmp_path / "run"
    assert main(["import", str(folder), "--run", str(run)]) == 0
    capsys.readouterr()
    assert main(["sample", str(run), "--prompt", "the", "--tokens", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[0])
    assert len(said["tokens"]) == 8 and MASK not in said["tokens"]


def test_lora_takes_no_matrix_that_is_not_there():
    with pytest.raises(ValueError, match="type lora.targets=wq,wk,wv,wo,w_up,w_down"):
        replace(plain(pretrained("mdlm"))[0].decoder, lora=bdjax.LoraConfig())
