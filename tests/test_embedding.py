"""The embedding's gradient: sums by id, whatever the ids, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdjax.embedding import TokenEmbedding, sums_by_id
from bdjax.sharding import make_mesh, reshard

V, D = 40, 6
SUMS = jax.jit(sums_by_id, static_argnames="size")
# One compilation per length: below a chunk, one chunk, several with a rest, two more levels.
LENGTHS = (1, 7, 128, 1000, 9000)


def ids_of(kind: str, n: int, generator) -> np.ndarray:
    return {
        "masks": lambda: np.where(generator.random(n) < 0.6, V - 1, generator.integers(0, V, n)),
        "one": lambda: np.full(n, 3),
        "distinct": lambda: np.arange(n) % V,
        "dropped": lambda: np.where(generator.random(n) < 0.5, V, generator.integers(0, V, n)),
        "runs": lambda: np.repeat(np.arange(V), -(-n // V))[:n],
    }[kind]()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", ["masks", "one", "distinct", "dropped", "runs"])
def test_sums_are_those_of_numpy(kind, n):
    generator = np.random.default_rng(n)
    ids = ids_of(kind, n, generator).astype(np.int32)
    # Small integers: sums are exact, so that every order of adding gives the same.
    rows = generator.integers(-8, 9, (n, D)).astype(np.float32)
    expected = np.zeros((V + 1, D))
    np.add.at(expected, ids, rows)
    np.testing.assert_array_equal(SUMS(jnp.asarray(ids), jnp.asarray(rows), V), expected[:V])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, V), min_size=1000, max_size=1000))
def test_any_ids(ids):
    rows = np.arange(1000 * D, dtype=np.float32).reshape(1000, D) % 17
    expected = np.zeros((V + 1, D))
    np.add.at(expected, ids, rows)
    np.testing.assert_array_equal(SUMS(jnp.asarray(ids), jnp.asarray(rows), V), expected[:V])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_kept_in_float32(dtype):
    rows = jnp.full((9000, D), 1.0, dtype)
    # bfloat16 would stop at 256.
    np.testing.assert_array_equal(SUMS(jnp.zeros(9000, jnp.int32), rows, V)[0], np.full(D, 9000.0))


@pytest.mark.parametrize("mesh", [{}, {"data": 8}, {"fsdp": 2, "tensor": 2, "data": 2}], ids=str)
def test_the_gradient_is_the_one_of_indexing(mesh):
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.integers(-2, V + 3, (8, 24)), jnp.int32)
    table = jnp.asarray(generator.standard_normal((V, 8)), jnp.float32)
    weight = jnp.asarray(generator.standard_normal((8, 24, 8)), jnp.float32)
    embedding = TokenEmbedding(vocab_size=V, width=8, dtype="float32")

    def plain(table):
        return (table[jnp.clip(tokens, 0, V - 1)] ** 2 * weight).sum()

    def ours(table, tokens, weight):
        return (embedding({"embed": table}, tokens) ** 2 * weight).sum()

    value, grad = jax.value_and_grad(plain)(table)
    if not mesh:
        found = jax.jit(jax.value_and_grad(ours))(table, tokens, weight)
    else:
        with jax.set_mesh(make_mesh(**mesh)):
            args = (
                reshard(table, "vocab", "embed_in"),
                reshard(tokens, "batch", "length"),
                reshard(weight, "batch", "length", "embed"),
            )
            found = jax.jit(jax.value_and_grad(ours))(*args)
            assert found[1].sharding == args[0].sharding
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    np.testing.assert_allclose(found[1], grad, atol=1e-5)
