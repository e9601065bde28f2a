"""The decoder against a plain numpy one in float64, and what its options may not change."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.embedding import TokenEmbedding
from bdjax.layout import clean_places
from bdjax.model import DecoderConfig, Llama3Scaling, Remat, rope_angles
from bdjax.parameters import Role, count, map_table
from bdjax.readout import TokenReadout
from bdjax.sharding import make_mesh
from bdjax.step import Model, block_step
from pallas_kernels import KEPT, Blockwise, Cudnn

LENGTH, VOCABULARY = 12, 24
LLAMA = DecoderConfig(
    num_layers=2,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=20,
    dtype="float32",
    remat=Remat.NONE,
    norm_eps=1e-5,
    rope_theta=500.0,
    rope_scaling=Llama3Scaling(factor=8.0, original_length=64),
)
QWEN2 = dataclasses.replace(LLAMA, rope_scaling=None, qkv_bias=True, num_kv_heads=1)
QWEN3 = dataclasses.replace(LLAMA, rope_scaling=None, qk_norm=True, head_dim=10, tied_head=True)


def build(config: DecoderConfig) -> Model:
    return Model(
        decoder=config,
        embedding=TokenEmbedding(vocab_size=VOCABULARY, width=config.width, dtype=config.dtype),
        readout=TokenReadout(vocab_size=VOCABULARY, width=config.width, tied=config.tied_head),
    )


def random_params(model: Model):
    """Every leaf random, so that a forgotten bias or norm weight shows."""
    generator = np.random.default_rng(0)

    def draw(p):
        scale = 0.5 if p.role in (Role.NORM, Role.BIAS) else 1 / math.sqrt(p.shape[-1])
        shift = 1.0 if p.role is Role.NORM else 0.0
        return jnp.asarray(shift + scale * generator.standard_normal(p.shape), jnp.float32)

    return map_table(draw, model.table())


def reference(config: DecoderConfig, params, tokens: np.ndarray) -> np.ndarray:
    """A causal decoder, one token and one head at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layers, half = p["layers"], config.head_dim // 2

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight

    def frequency(i):
        f = config.rope_theta ** (-2 * i / config.head_dim)
        s = config.rope_scaling
        if s is None:
            return f
        wavelength = 2 * math.pi / f
        low, high = s.original_length / s.low_freq_factor, s.original_length / s.high_freq_factor
        if wavelength < high:
            return f
        if wavelength > low:
            return f / s.factor
        smooth = (s.original_length / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        return (1 - smooth) * f / s.factor + smooth * f

    def rotate(x, position):
        out = np.empty_like(x)
        for i in range(half):
            c, s = math.cos(position * frequency(i)), math.sin(position * frequency(i))
            out[i] = x[i] * c - x[i + half] * s
            out[i + half] = x[i + half] * c + x[i] * s
        return out

    x = p["embed"][tokens]
    for n in range(config.num_layers):
        w = {name: value[n] for name, value in layers.items()}
        h = norm(x, w["attn_norm"])
        q, k, v = (np.einsum("td,dnh->tnh", h, w[name]) for name in ("wq", "wk", "wv"))
        if config.qkv_bias:
            q, k, v = q + w["bq"], k + w["bk"], v + w["bv"]
        if config.qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        group = config.num_heads // config.num_kv_heads
        mixed = np.zeros_like(q)
        for t in range(len(tokens)):
            for head in range(config.num_heads):
                query = rotate(q[t, head], t)
                keys = [rotate(k[s, head // group], s) for s in range(t + 1)]
                scores = np.array([query @ key for key in keys]) / math.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                mixed[t, head] = weights / weights.sum() @ v[: t + 1, head // group]
        x = x + np.einsum("tnh,nhd->td", mixed, w["wo"])
        h = norm(x, w["mlp_norm"])
        gate = h @ w["w_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w_up"])) @ w["w_down"]
    return norm(x, p["final_norm"])


TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (1, LENGTH))


def hidden_of(model: Model, params):
    position = jnp.arange(LENGTH)[None]
    places = clean_places(position * 0 + 1, position, 4)
    return block_step(model, params, jnp.asarray(TOKENS), places)[0]


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_families_by_configuration(config):
    """RoPE scaling, biases, q/k norms, grouped heads and a free head_dim, to 1e-5 of float64."""
    model = build(config)
    params = random_params(model)
    expected = reference(config, params, TOKENS[0])
    assert np.abs(np.asarray(hidden_of(model, params)[0]) - expected).max() < 1e-5


def test_tied_heads_have_no_matrix_of_their_own():
    assert "head" not in build(QWEN3).table()
    assert (
        count(build(LLAMA).table())
        - count(build(dataclasses.replace(LLAMA, tied_head=True)).table())
        == VOCABULARY * LLAMA.width
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"remat": Remat.DOTS}, marks=pytest.mark.slow),
        {"remat": Remat.FULL},
        {"remat": Remat.FULL, "unroll": LLAMA.num_layers},
    ],
)
def test_remat_and_unrolled_layers_change_no_gradient(change):
    def gradient(config):
        model = build(config)
        params = random_params(model)
        return jax.grad(lambda p: (hidden_of(model, p) ** 3).sum())(params)

    kept, again = gradient(LLAMA), gradient(dataclasses.replace(LLAMA, **change))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        # Entries that cancel are as exact as those that they are summed from.
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max())


def bodies(equation) -> list:
    """The jaxprs inside an equation."""
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    found = [getattr(body, "jaxpr", body) for body in found]
    return [body for body in found if hasattr(body, "eqns")]


def is_remat(equation) -> bool:
    return equation.primitive.name in ("remat2", "checkpoint")


def guards(jaxpr) -> list[bool]:
    """Of each rematerialised part, whether XLA is kept from finding it computed already."""
    found = [e.params["prevent_cse"] for e in jaxpr.eqns if is_remat(e)]
    return found + [x for e in jaxpr.eqns for body in bodies(e) for x in guards(body)]


@pytest.mark.parametrize("remat", [Remat.FULL, Remat.DOTS])
def test_without_a_loop_xla_may_not_merge_what_is_computed_again(remat):
    """A loop's body stands apart from its gradient's; unrolled, they are one program. On an H100
    the gradient of four unrolled layers had 86 products and 132 MiB with FULL as with NONE; kept
    apart, it has 106 and 61."""

    def guarded(unroll):
        model = build(dataclasses.replace(LLAMA, remat=remat, unroll=unroll))
        params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
        gradient = jax.grad(lambda p: (hidden_of(model, p) ** 3).sum())
        return guards(jax.make_jaxpr(gradient)(params).jaxpr)

    assert set(guarded(LLAMA.num_layers)) == {True} and set(guarded(1)) == {False}


def named_again(jaxpr, inside: bool = False) -> int:
    """How many of a forward kernel's results the rematerialised part of a gradient computes."""
    found = 0
    for equation in jaxpr.eqns:
        again = inside or is_remat(equation)
        found += again and equation.primitive.name == "name" and equation.params["name"] == KEPT
        found += sum(named_again(body, again) for body in bodies(equation))
    return found


@pytest.mark.parametrize("attention", [Blockwise(), Cudnn(query_chunk=4, backend="xla")])
def test_with_products_kept_no_forward_kernel_runs_again(attention):
    def again(remat):
        model = build(dataclasses.replace(LLAMA, remat=remat, attention=attention))
        params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
        gradient = jax.grad(lambda p: (hidden_of(model, p) ** 3).sum())
        return named_again(jax.make_jaxpr(gradient)(params).jaxpr)

    assert again(Remat.FULL) > again(Remat.DOTS) == 0


def test_bfloat16_computes_narrow_from_wide_masters():
    """Hidden rows and cached keys are bfloat16, masters float32, and the error is bfloat16's."""
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    model = build(config)
    params = model.init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = hidden_of(model, params)
    assert hidden.dtype == jnp.bfloat16
    wide = hidden_of(build(LLAMA), params)
    error = jnp.linalg.norm(hidden.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
    assert 1e-4 < error < 3e-2


def test_parameters_are_born_sharded_and_do_not_depend_on_the_mesh():
    model = build(LLAMA)
    alone = model.init(jax.random.key(3))
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        split = model.init(jax.random.key(3))
    wq = split["layers"]["wq"]
    assert wq.sharding.shard_shape(wq.shape) == (2, 4, 2, 6)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_initial_activations_have_unit_scale():
    """Fan-in initialisation of stacked layers looks at one layer's inputs, not at the stack."""
    table = build(dataclasses.replace(LLAMA, width=64, mlp_width=256, num_layers=5)).table()
    drawn = map_table(lambda p: p.init(jax.random.key(1), p.shape, jnp.float32), table["layers"])
    assert abs(float(drawn["w_down"].std()) * math.sqrt(256) - 1) < 0.05
    assert abs(float(drawn["wq"].std()) * math.sqrt(64) - 1) < 0.05
    assert abs(float(drawn["wo"].std()) * math.sqrt(4 * 6) - 1) < 0.1


def test_rope_turns_by_position_times_frequency():
    angles = np.asarray(rope_angles(QWEN3, jnp.array([[0, 3]])))[0, :, 0]
    assert np.allclose(angles[0], 0)
    assert np.allclose(angles[1], 3 * 500.0 ** (-np.arange(5) / 5), rtol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_kv_heads": 3}, "num_kv_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"width": 0}, "width=0"),
        ({"dtype": "float16"}, "bfloat16"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(LLAMA, **change)
