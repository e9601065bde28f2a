"""GGUF files as models: parameters and logits are those of the Hugging Face arrays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import Arrays

from bdjax.generation import load
from bdjax.gguf_file import open_gguf
from bdjax.importing import config_of, parameters_of
from bdjax.layout import clean_places
from bdjax.pretrained import PretrainedError
from bdjax.step import block_step

pytest.importorskip("gguf", reason="needs the extra hf")
pytest.importorskip("tokenizers", reason="needs the extra hf")
files = pytest.importorskip("gguf_files")
reference = pytest.importorskip("smollm2_reference")


def parameters(pretrained):
    """Imported as one device's float32 parameters."""
    config = config_of(pretrained, dtype="float32")
    with jax.set_mesh(config.mesh.build()):
        return config, parameters_of(pretrained, config, dtype="float32")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_hugging_face_arrays(tmp_path, architecture):
    """Permuted heads of llama come back in order; those of the others were never permuted."""
    found = files.arrays(architecture, 282, tied=architecture == "llama")
    pretrained = open_gguf(files.write(tmp_path / "x.gguf", architecture, found))
    one, other = (
        parameters(which)[1] for which in (pretrained, replace(pretrained, tensors=Arrays(found)))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_logits_are_those_of_the_file_read_without_bdjax(tmp_path):
    """The reference turns neighbours of the rows as stored, bdjax halves of rows in order."""
    path = files.write(tmp_path / "x.gguf", kind=files.TYPE.Q4_1)
    ids = np.random.default_rng(0).integers(0, 282, 40)
    config, params = parameters(open_gguf(path))
    at = jnp.arange(40)[None]
    places = clean_places(at * 0 + 1, at, 1)
    model = config.build_model()
    hidden, _ = block_step(model, params, jnp.asarray(ids)[None], places)
    head = model.readout.matrix(params, hidden.dtype)
    logits = np.asarray(hidden @ head.T)[0, :, :282]
    np.testing.assert_allclose(logits, reference.Reference(path).logits(ids), atol=1e-4)


def test_a_file_is_loaded_where_a_folder_is(tmp_path):
    path = files.write(tmp_path / "x.gguf")
    model = load(path)
    assert model.config.model.dtype == "float32" and model.config.tokenizer.eos_id == 2
    assert model.config.tokenizer.encode("the cat").size


REFUSED = {
    "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    # As llama.cpp reads a factor without a type.
    "factor.*4.0": {"llama.rope.scaling.factor": 4.0},
    "yarn": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_scalings_that_are_not_computed_are_refused_by_name(tmp_path, name):
    path = files.write(tmp_path / "x.gguf", metadata=REFUSED[name])
    with pytest.raises(PretrainedError, match=name):
        load(path)


def test_sizes_that_disagree_with_the_tensors_are_refused(tmp_path):
    sizes = {"llama.feed_forward_length": 128, "llama.attention.head_count": 8}
    for key, value in sizes.items():
        path = files.write(tmp_path / "x.gguf", metadata={key: value})
        with pytest.raises(PretrainedError, match="of another shape"):
            load(path)


def test_missing_and_unknown_tensors_are_named_together(tmp_path):
    found = files.arrays("llama", 282)
    del found["model.layers.1.mlp.up_proj.weight"]
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = files.write(tmp_path / "x.gguf", found=found, extra=extra)
    with pytest.raises(PretrainedError, match=r"mlp\.up_proj.*attn_sinks"):
        load(path)
