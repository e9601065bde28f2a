"""Laws of importing: parameters come back bitwise, each byte is read once, all faults are named.

What no second implementation is needed for; `test_transformers.py` compares with one.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from pretrained import (
    BOS,
    EOS,
    MASK,
    ROWS,
    TYPES,
    Arrays,
    config,
    network,
    pretrained,
    random_params,
    tokenizer_json,
    write_folder,
)

from bdjax.config import config_from_json
from bdjax.families import FAMILIES, family_of
from bdjax.family_config import decoder_config
from bdjax.hf_folder import read_folder
from bdjax.importing import config_of, parameters_of
from bdjax.objective import Alignment
from bdjax.overrides import to_json
from bdjax.pretrained import Pretrained, PretrainedError
from bdjax.safetensors_file import SafetensorsFiles
from bdjax.sharding import make_mesh
from bdjax.weights import check_tensors, load_parameters, stored
from pallas_kernels import CleanMode

every_type = pytest.mark.parametrize("model_type", TYPES)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    return tokenizer_json(tmp_path_factory.mktemp("tokenizer"))


def equal_bitwise(one, other):
    flat, tree = jax.tree.flatten(one)
    assert tree == jax.tree.structure(other)
    for a, b in zip(flat, jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@every_type
def test_parameters_come_back_bitwise(model_type):
    found = pretrained(model_type)
    family, model = network(found)
    params = random_params(model)
    assert family.model_type == model_type
    wanted = stored(family, model.table(), ROWS)
    check_tensors(found, family, wanted)
    equal_bitwise(load_parameters(found, wanted), params)


def test_matrices_are_turned_from_out_in(tmp_path):
    found = pretrained("qwen3")
    family, model = network(found)
    params = load_parameters(found, stored(family, model.table(), ROWS))
    names = found.tensors.arrays
    x = np.random.default_rng(0).normal(size=32).astype(np.float32)
    got = np.einsum("d,dnh->nh", x, np.asarray(params["layers"]["wq"][2])).reshape(-1)
    wanted = names["model.layers.2.self_attn.q_proj.weight"] @ x
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    y = np.random.default_rng(1).normal(size=64).astype(np.float32)
    got = np.einsum("nh,nhd->d", y.reshape(4, 16), np.asarray(params["layers"]["wo"][1]))
    wanted = names["model.layers.1.self_attn.o_proj.weight"] @ y
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [dict(fsdp=4), dict(tensor=2, fsdp=2), dict(data=2, fsdp=2)])
def test_each_byte_is_read_once_on_a_mesh(shape):
    found = pretrained("qwen2")
    family, model = network(found)
    wanted = stored(family, model.table(), ROWS)
    alone = load_parameters(found, wanted)
    reader = Arrays(found.tensors.arrays)
    seen = []
    with jax.set_mesh(make_mesh(**shape)):
        params = load_parameters(
            replace(found, tensors=reader), wanted, progress=lambda *x: seen.append(x)
        )
        abstract = jax.eval_shape(model.init, jax.random.key(0))
        for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.spec == other.sharding.spec
    for name, count in reader.reads.items():
        np.testing.assert_array_equal(count, 1, name)
    assert seen[-1][0] == seen[-1][1] == sum(x.nbytes for x in jax.tree.leaves(alone))
    equal_bitwise(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, alone))


def test_dtype_of_the_files_or_the_one_asked_for(tmp_path):
    narrow = pretrained("llama", dtype="bfloat16")
    folder = write_folder(tmp_path, narrow, None)
    found = read_folder(folder)
    family, model = network(found)
    wanted = stored(family, model.table(), ROWS)
    params = load_parameters(found, wanted)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert decoder_config(found, family).dtype == "bfloat16"
    wide = load_parameters(found, wanted, "float32")
    equal_bitwise(wide, jax.tree.map(lambda x: x.astype("float32"), params))
    halves = {n: a.astype(np.float16) for n, a in narrow.tensors.arrays.items()}
    half = replace(narrow, tensors=Arrays(halves))
    assert decoder_config(half, family).dtype == "float32"
    loaded = load_parameters(half, wanted)
    np.testing.assert_array_equal(
        np.asarray(loaded["embed"]), halves["model.embed_tokens.weight"].astype(np.float32)
    )


@pytest.mark.parametrize(
    "model_type, mask, block, alignment, clean",
    [
        ("llama", ROWS, 1, Alignment.SHIFTED_CLEAN, CleanMode.TOKEN),
        ("smollm3", ROWS, 1, Alignment.SHIFTED_CLEAN, CleanMode.TOKEN),
        ("qwen3", ROWS, 1, Alignment.SHIFTED_CLEAN, CleanMode.TOKEN),
        ("sdar", MASK, 4, Alignment.SAME_POSITION, CleanMode.BLOCK),
        ("Fast_dLLM_Qwen", MASK, 8, Alignment.SHIFTED_NOISY, CleanMode.BLOCK),
        ("Dream", MASK, 64, Alignment.SHIFTED_NOISY, CleanMode.BLOCK),
        ("llada", MASK, 64, Alignment.SAME_POSITION, CleanMode.BLOCK),
    ],
)
def test_sampling_facts(tokenizer, model_type, mask, block, alignment, clean):
    found = replace(
        pretrained(model_type),
        tokenizer_json=tokenizer,
        generation={"eos_token_id": [3, EOS]},
    )
    made = config_of(found)
    assert made.objective.process.mask_id == made.tokenizer.mask_id == mask
    assert made.block_size() == block
    assert (made.objective.alignment, made.model.clean) == (alignment, clean)
    assert made.tokenizer.stop_ids == (EOS, 3) and made.tokenizer.bos_id == BOS
    # Nothing of the model's own but a mask is banned, as nothing is where it comes from.
    assert made.build_model().readout.banned == (mask, *range(ROWS + 1, made.vocab_size))
    assert made.vocab_size == (ROWS if mask == MASK else ROWS + 8)
    parameters_of(found, made)
    assert config_from_json(to_json(made)) == made


def test_the_mask_of_a_family_is_a_number():
    masks = {family.model_type: family.mask_id for family in FAMILIES}
    assert masks["sdar"] == 151_669 and masks["Fast_dLLM_Qwen"] == 151_665
    assert masks["Dream"] == 151_666 and masks["llada"] == 126_336
    assert [masks[name] for name in ("llama", "smollm3", "qwen2", "qwen3")] == [None] * 4


@pytest.mark.parametrize(
    "model_type, more, message",
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true.*null or false"),
        ("llama", {"sliding_window": 16}, "sliding_window=16.*use_sliding_window=false"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*llama3"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters=.*llama3"),
        ("llama", {"original_max_position_embeddings": 16}, "original_max_position_embeddings=16"),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 8}},
            "dual_chunk_attention_config",
        ),
        ("llama", {"rope_theta": 0}, "rope_theta=0"),
        ("llama", {"rope_theta": 10**400}, "rope_theta=1000.*number above zero"),
        ("llama", {"rms_norm_eps": 1e300}, "rms_norm_eps=1e.300.*at most 1e37"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}},
            'rope_scaling={"type": "yarn"}.*the same there as in rope_parameters',
        ),
        ("qwen3", {"rope_parameters": {"rope_theta": 7.0}}, "rope_theta=5000.0.*parameters, 7.0"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters=.*the same in every layer",
        ),
        ("llama", {"attention_bias": True}, "attention_bias=true.*with false there"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=true.*null or false"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act="gelu".*silu'),
        ("llama", {"qk_norm": True}, "qk_norm=true.*false there"),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types=.*full_attention"),
        ("llama", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers="),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=.*every layer"),
        ("llada", {"block_type": "sequential"}, 'block_type="sequential".*llama'),
        ("llada", {"num_hidden_layers": 10**9}, "n_layers=1000000000.*no more layers"),
        ("llama", {"hidden_size": "32"}, 'hidden_size="32".*positive integer'),
        ("llama", {"hidden_size": True}, "hidden_size=true.*positive integer"),
        ("llama", {"num_attention_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps=null.*number above zero"),
        ("llama", {"rope_theta": None}, "rope_theta=null.*base of its RoPE"),
    ],
)
def test_a_config_that_means_other_numbers_is_refused_by_name(model_type, more, message):
    tensors = Arrays({str(n): np.zeros(0, np.float32) for n in range(99)})
    found = Pretrained(config=config(model_type, **more), tensors=tensors, where="tiny")
    with pytest.raises(PretrainedError, match=f"config.json of tiny has {message}"):
        decoder_config(found, family_of(model_type, "tiny"))


@pytest.mark.parametrize("key, expected", [("rope", "true"), ("layer_norm_type", '"rms"')])
def test_silence_is_what_the_familys_own_class_makes_of_it(key, expected):
    # LLaDA's: no RoPE, and layer norms that subtract the mean.
    found = pretrained("llada")
    family = family_of("llada", "tiny")
    assert decoder_config(found, family)
    del found.config[key]
    with pytest.raises(PretrainedError, match=f"has no {key}; bdjax reads llada .* {expected}"):
        decoder_config(found, family)


def test_unknown_keys_are_named():
    found = pretrained("llama")
    found.config["odd_new_key"] = 1
    with pytest.warns(UserWarning, match="does not know and passes over: odd_new_key"):
        decoder_config(found, family_of("llama", "tiny"))
    with pytest.raises(PretrainedError, match=r"model_type 'gpt2', which .* reads llama, smollm3"):
        family_of("gpt2", "x")


def test_all_faults_of_the_tensors_are_one_error():
    found = pretrained("llama")
    family, model = network(found)
    wanted = stored(family, model.table(), ROWS)
    arrays = dict(found.tensors.arrays)
    for layer in (1, 2, 3):
        arrays[f"model.layers.{layer}.mlp.up_proj.bias"] = np.zeros(48, np.float32)
        del arrays[f"model.layers.{layer}.mlp.up_proj.weight"]
    del arrays["model.norm.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"].astype(np.int8)
    with pytest.raises(PretrainedError) as caught:
        check_tensors(replace(found, tensors=Arrays(arrays)), family, wanted)
    said = str(caught.value)
    assert "4 missing (model.layers.{1..3}.mlp.up_proj.weight, model.norm.weight)" in said
    assert "3 unused (model.layers.{1..3}.mlp.up_proj.bias)" in said
    assert (
        "1 of another shape (lm_head.weight; lm_head.weight is 287 x 32, expected 288 x 32)" in said
    )
    assert "1 in int8 (model.embed_tokens.weight)" in said and "inv_freq" not in said


def test_a_tied_head_may_come_along_if_it_is_the_embedding():
    found = pretrained("qwen2")
    family, model = network(found)
    wanted = stored(family, model.table(), ROWS)
    embed = found.tensors.arrays["model.embed_tokens.weight"]
    both = found.tensors.arrays | {"lm_head.weight": embed}
    check_tensors(replace(found, tensors=Arrays(both)), family, wanted)
    other = embed.copy()
    other[-1, -1] += 1
    both |= {"lm_head.weight": other}
    with pytest.raises(PretrainedError, match="type tie_word_embeddings=false"):
        check_tensors(replace(found, tensors=Arrays(both)), family, wanted)


def test_boxes_of_a_file_are_those_of_the_array(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(5, 6, 7)).astype(np.float32),
        "b": rng.normal(size=(9, 4)).astype(ml_dtypes.bfloat16),
        "c": np.float16(3) + np.zeros((), np.float16),
        "d": np.zeros((0, 3), np.float32),
    }
    found = Pretrained(config={}, tensors=Arrays(arrays), where="")
    files = SafetensorsFiles(write_folder(tmp_path, found, None) / "model.safetensors")
    assert files.shapes == {n: a.shape for n, a in arrays.items()}
    for name, array in arrays.items():
        for _ in range(20):
            box = tuple(slice(*sorted(rng.integers(0, n + 1, 2).tolist())) for n in array.shape)
            got = files.read(name, box)
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got, array[box])
        whole = files.read(name, tuple(slice(0, n) for n in array.shape))
        np.testing.assert_array_equal(whole, array)


def test_files_are_those_of_the_safetensors_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in (("a.b", (3, 4)), ("é", (5,)))}
    found = Pretrained(config={}, tensors=Arrays(arrays), where="")
    written = library.load_file(write_folder(tmp_path, found, None) / "model.safetensors")
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(written[name], array)
    library.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = SafetensorsFiles(tmp_path / "theirs.safetensors")
    for name, array in arrays.items():
        box = tuple(slice(1, n) for n in array.shape)
        np.testing.assert_array_equal(theirs.read(name, box), array[box])


def test_a_vocabulary_that_ends_inside_a_shard_goes_on_with_zeros():
    """281 rows of the files, 288 of ours: the second of two tensor shards ends in zeros."""
    found = pretrained("qwen3", rows=281, vocab_size=281)
    family, model = network(found)
    wanted = stored(family, model.table(), 281)
    with jax.set_mesh(make_mesh(tensor=2, fsdp=2)):
        params = load_parameters(found, wanted)
    for name, file in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        got = np.asarray(params[name])
        np.testing.assert_array_equal(got[:281], found.tensors.arrays[file])
        assert got.shape == (ROWS, 32) and not got[281:].any()


def test_layers_without_rope_see_no_positions():
    """A stack that never rotates gives the same states wherever its rows stand."""
    found = pretrained("smollm3")
    _, model = network(found)
    params = random_params(model)
    from bdjax.layout import clean_places
    from bdjax.step import block_step

    tokens = jnp.arange(12)[None] % 7
    at = jnp.arange(12)[None]

    def states(layers, scale):
        decoder = replace(model.decoder, rope_layers=layers)
        places = clean_places(at * 0 + 1, at, 1)
        places = places._replace(position=at * scale)
        return np.asarray(block_step(replace(model, decoder=decoder), params, tokens, places)[0])

    never, some = (False,) * 4, (True, True, True, False)
    np.testing.assert_array_equal(states(never, 1), states(never, 3))
    assert np.abs(states(some, 1) - states(some, 3)).max() > 1e-3
    np.testing.assert_array_equal(states((True,) * 4, 2), states(None, 2))
    with pytest.raises(ValueError, match="rope_layers has 1 entries for num_layers=4"):
        replace(model.decoder, rope_layers=(True,))
