"""The predicate against pictures drawn by hand; the intervals against the predicate everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BLOCK, TOKEN, Document, find, pack, stack, with_views
from hypothesis import given, settings
from hypothesis import strategies as st

from bdjax.cache import Cache
from bdjax.layout import clean_places, join_places, noisy_places, window_places
from pallas_kernels import CleanMode, Meta, dense_mask, visible

LENGTH = 24  # of every generated clean stream: shapes are fixed, so nothing recompiles
SLOTS = 20  # of every cache
CANVAS = 4


def picture(text: str) -> np.ndarray:
    """Rows of queries, columns of keys; x is seen, spaces are for the eye."""
    lines = [line.replace(" ", "") for line in text.split("\n") if line]
    return np.array([[c == "x" for c in line] for line in lines])


# Documents of 3 and 2 tokens in blocks of 2, then padding: clean A0 A1 A2 B0 B1 -, noisy the same.
TWO_DOCUMENTS_TOKEN = picture("""
x..... ......
xx.... ......
xxx... ......
...x.. ......
...xx. ......
...... ......
...... xx....
...... xx....
xx.... ..x...
...... ...xx.
...... ...xx.
...... ......
""")

TWO_DOCUMENTS_BLOCK = picture("""
xx.... ......
xx.... ......
xxx... ......
...xx. ......
...xx. ......
...... ......
...... xx....
...... xx....
xx.... ..x...
...... ...xx.
...... ...xx.
...... ......
""")

# One document of 4 tokens in blocks of 2, two views: clean, view 1, view 2.
TWO_VIEWS_TOKEN = picture("""
x... .... ....
xx.. .... ....
xxx. .... ....
xxxx .... ....
.... xx.. ....
.... xx.. ....
xx.. ..xx ....
xx.. ..xx ....
.... .... xx..
.... .... xx..
xx.. .... ..xx
xx.. .... ..xx
""")

# Cache of blocks 0 and 1 (one slot empty), finished block 2, canvas of block 3 cut to one token.
FUSED_BLOCK = picture("""
xxxx. xx..
xxxx. xx..
xxxx. xxx.
..... ....
""")

FUSED_TOKEN = picture("""
xxxx. x...
xxxx. xx..
xxxx. xxx.
..... ....
""")


@pytest.mark.parametrize(
    "clean, expected", [(TOKEN, TWO_DOCUMENTS_TOKEN), (BLOCK, TWO_DOCUMENTS_BLOCK)]
)
def test_two_packed_documents_as_drawn(clean, expected):
    row = with_views(pack(6, [Document(3, 2), Document(2, 2)]), 1)
    assert np.array_equal(dense_mask(row, row, clean), expected)


def test_two_views_as_drawn():
    row = with_views(pack(4, [Document(4, 2)]), 2)
    assert np.array_equal(dense_mask(row, row, TOKEN), TWO_VIEWS_TOKEN)


@pytest.mark.parametrize("clean, expected", [(TOKEN, FUSED_TOKEN), (BLOCK, FUSED_BLOCK)])
def test_a_fused_window_as_drawn(clean, expected):
    slots = np.arange(5)
    cached = Meta(slots * 0, (slots < 4).astype(int), slots // 2, slots)
    window = Meta(
        np.array([0, 0, 1, 1]), np.array([1, 1, 1, 0]), np.array([2, 2, 3, 3]), np.arange(4, 8)
    )
    found = [dense_mask(window, key, clean) for key in (cached, window)]
    assert np.array_equal(np.concatenate(found, axis=1), expected)


def test_the_predicate_needs_operators_alone():
    """Plain integers, numpy arrays and traced arrays give the same answers."""
    row = with_views(pack(6, [Document(3, 2), Document(2, 2)]), 1)
    for q, k in ((8, 1), (8, 2), (8, 8), (8, 7), (2, 8), (5, 5), (9, 2)):
        one = visible(Meta(*(int(x[q]) for x in row)), Meta(*(int(x[k]) for x in row)), TOKEN)
        assert bool(one) == TWO_DOCUMENTS_TOKEN[q, k]
    traced = jax.jit(dense_mask, static_argnums=2)(row, row, BLOCK)
    assert np.array_equal(traced, TWO_DOCUMENTS_BLOCK)


documents = st.lists(
    st.builds(Document, st.integers(1, 12), st.integers(1, 9), st.integers(0, 3)), max_size=8
)
rows = st.builds(lambda docs, lead: pack(LENGTH, docs, lead), documents, st.integers(0, 3))
batches = st.lists(rows, min_size=4, max_size=4)
modes = st.sampled_from(list(CleanMode))


def assert_same(q: Meta, k: Meta, clean: CleanMode) -> None:
    """The intervals say what the predicate says, in disjoint well-ordered pieces."""
    bounds = find(q, k, clean)
    expected = np.asarray(dense_mask(q, k, clean))
    length = k.stream.shape[1]
    assert np.array_equal(np.asarray(bounds.mask(length)), expected)
    a0, a1, b0, b1 = (np.asarray(x) for x in bounds)
    assert (a0 <= a1).all() and (b0 <= b1).all()
    assert (np.minimum(a0, b0) >= 0).all() and (np.maximum(a1, b1) <= length).all()
    assert np.array_equal((a1 - a0) + (b1 - b0), expected.sum(axis=-1))


@settings(max_examples=60, deadline=None)
@given(batches, modes, st.sampled_from([0, 1, 3]))
def test_intervals_of_packed_rows_are_the_predicate(batch, clean, views):
    """Any documents, block sizes per document, padding before, between and after, any views."""
    row = with_views(stack(*batch), views)
    assert_same(row, row, clean)


@settings(max_examples=25, deadline=None)
@given(batches, modes)
def test_noisy_rows_without_a_clean_stream(batch, clean):
    """MDLM's layout: every noisy token sees its own block and nothing else."""
    clean_row = stack(*batch)
    noisy = clean_row._replace(stream=clean_row.stream + 1)
    assert_same(noisy, noisy, clean)
    same = dense_mask(noisy, noisy, clean)
    assert np.array_equal(same, np.swapaxes(same, 1, 2))


@settings(max_examples=25, deadline=None)
@given(batches, modes, st.permutations(range(2 * LENGTH)))
def test_queries_may_stand_in_any_order(batch, clean, order):
    """Only keys are ordered: permuting the queries permutes the intervals."""
    row = with_views(stack(*batch), 1)
    shuffled = Meta(*(field[:, list(order)] for field in row))
    assert_same(shuffled, row, clean)


one_row = st.fixed_dictionaries(
    {
        "size": st.integers(1, CANVAS),
        "block": st.integers(0, 3),
        "pending": st.booleans(),
        "live": st.booleans(),
        "cut": st.integers(0, CANVAS - 1),
        "stale": st.integers(0, 7),
    }
)


def fused(row: list[dict]):
    """Fused windows [finished block; canvas] and the caches behind them, one row per entry.

    The canvas stands in block `block`; a row with `pending` has not cached the block before it.
    Cache slots past the length hold what an earlier use left there.
    """
    size, block, cut, stale = (
        np.array([r[name] for r in row], np.int32) for name in ("size", "block", "cut", "stale")
    )
    pending = np.array([r["pending"] for r in row]) & (block > 0)
    live = np.array([r["live"] for r in row])
    slot = np.arange(CANVAS)
    whole = slot < size[:, None]
    inside = whole & (slot < np.maximum(size - cut, 1)[:, None]) & live[:, None]
    first = ((block - 1) * size, block - 1, CANVAS, whole & pending[:, None], pending | True)
    canvas = (block * size, block, CANVAS, inside, pending & False)
    numpy_or_jax = [
        window_places(*(x if isinstance(x, int) else jnp.asarray(x) for x in given))
        for given in (first, canvas)
    ]
    length = (block - pending) * size
    at = np.arange(SLOTS) + 0 * size[:, None]
    blocks = np.where(at < length[:, None], at // size[:, None], stale[:, None]).astype(np.int32)
    nothing = jnp.zeros((1, len(row), SLOTS, 1, 1))
    cache = Cache(nothing, nothing, jnp.asarray(blocks), jnp.asarray(length, jnp.int32))
    return join_places(*numpy_or_jax), cache, size, block


@settings(max_examples=40, deadline=None)
@given(st.lists(one_row, min_size=4, max_size=4), modes)
def test_intervals_of_fused_windows_and_their_caches_are_the_predicate(row, clean):
    """Short canvases, rows with nothing to commit, idle rows, stale slots behind the length."""
    places, cache, *_ = fused(row)
    assert_same(places.meta, places.meta, clean)
    assert_same(places.meta, cache.meta, clean)


@settings(max_examples=40, deadline=None)
@given(st.lists(one_row, min_size=4, max_size=4), modes)
def test_a_fused_window_sees_what_the_training_row_sees(row, clean):
    """Cache and window together show each slot the positions that the one-pass row shows it."""
    places, cache, size, block = fused(row)
    near = np.asarray(find(places.meta, places.meta, clean).mask(2 * CANVAS))
    far = np.asarray(find(places.meta, cache.meta, clean).mask(SLOTS))
    streams, segments, _, _, positions = (np.asarray(x) for x in places)
    for n in range(len(row)):
        committed = block[n] * size[n]
        for t in np.flatnonzero(segments[n]):
            clean_near = near[n, t] & (streams[n] == 0)
            seen = sorted([*np.flatnonzero(far[n, t]), *positions[n][clean_near]])
            own = positions[n][near[n, t] & (streams[n] == 1)]
            at = positions[n, t]
            if streams[n, t] == 1:
                canvas = positions[n][(streams[n] == 1) & (segments[n] != 0)]
                assert seen == list(range(committed)) and list(own) == list(canvas)
            else:
                end = at + 1 if clean is TOKEN else committed
                assert seen == list(range(end)) and not len(own)


@settings(max_examples=25, deadline=None)
@given(batches, st.integers(1, 3))
def test_places_carry_the_integers_of_the_row(batch, size):
    """`clean_places` and `noisy_places` give the mask what `pack` writes out by hand."""
    clean = stack(*batch)
    expected = with_views(clean._replace(block=clean.order // size), 2)
    places = clean_places(*(jnp.asarray(x) for x in (clean.segment, clean.order)), size)
    places = join_places(places, noisy_places(places, 2))
    for name, want in expected._asdict().items():
        assert np.array_equal(getattr(places.meta, name), want), name
    assert np.array_equal(places.position, expected.order)


def test_no_keys_are_no_intervals():
    row = stack(pack(LENGTH, [Document(5, 2)]))
    nobody = Meta(*(field[:, :0] for field in row))
    assert all((np.asarray(x) == 0).all() for x in find(row, nobody, TOKEN))
