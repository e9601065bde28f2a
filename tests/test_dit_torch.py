"""An imported diffusion transformer against one in torch that was written without seeing ours."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import (
    COND,
    HEADS,
    LAYERS,
    LENGTH,
    ROWS,
    TYPES,
    WIDTH,
    config,
    plain,
    rows_of,
    seen_by_hand,
    shapes,
)

from bdjax.hf_folder import read_folder
from bdjax.step import block_step
from bdjax.weights import load_parameters

torch = pytest.importorskip("torch", reason="type: pip install torch")
pytest.importorskip("safetensors", reason="type: pip install safetensors")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_hidden_states_and_logits_are_those_of_torch(model_type, seed, tmp_path):
    """Under full attention (MDLM), and in both streams under BD3-LM's mask."""
    from dit_torch import random_backbone
    from safetensors.torch import save_file

    sizes = {"width": WIDTH, "heads": HEADS, "blocks": LAYERS, "vocab": ROWS, "cond": COND}
    theirs = random_backbone(seed, **sizes)
    assert {name: tuple(x.shape) for name, x in theirs.state_dict().items()} == shapes()
    state = {f"backbone.{name}": x.contiguous() for name, x in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config(model_type)))

    tokens, places = rows_of(model_type)
    positions = np.tile(np.arange(LENGTH), tokens.shape[1] // LENGTH)
    seen = torch.tensor(seen_by_hand(model_type))[None].repeat(len(tokens), 1, 1)
    with torch.no_grad():
        positions = torch.tensor(positions)[None].repeat(len(tokens), 1)
        hidden, logits = theirs(torch.tensor(tokens), positions, seen)

    model, wanted, files = plain(read_folder(tmp_path))
    params = load_parameters(files, wanted)
    got, _ = block_step(model, params, jnp.asarray(tokens), places)
    np.testing.assert_allclose(got, hidden.numpy(), atol=1e-4)
    head = model.readout.matrix(params, got.dtype)
    got = got @ head.T + model.readout.added(params)
    np.testing.assert_allclose(got, logits.numpy(), atol=1e-4)
    assert logits.abs().max() > 1
