"""The Hopper kernels: their plans against the mask, the algorithm in numpy, the laws on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BLOCK,
    TOKEN,
    AttentionCases,
    Document,
    assert_close,
    find,
    in_type,
    make_case,
    pack,
    reference,
    run_jit,
    stack,
    with_views,
)
from gpu_interpret import interpreted

from pallas_kernels import CleanMode, Hopper, Intervals, hopper, hopper_backward, hopper_forward
from pallas_kernels.hopper_forward import Runs
from pallas_kernels.hopper_tiles import (
    FIRST_HALF,
    FLAGS,
    IDLE,
    MOST_KEYS,
    OWN,
    SECOND_HALF,
    QueryPlan,
    key_plan,
    query_plan,
    rounds_of,
    shares_of,
)

TILE = 8

make_query_plan = jax.jit(query_plan, static_argnums=(1, 2, 3))
make_key_plan = jax.jit(key_plan, static_argnums=(1, 2, 3))


@partial(jax.jit, static_argnums=1)
def routes(columns, steps: int):
    """Per query tile: its numbers of full and of all tiles; per step the tile and its part."""

    def one(place):
        runs, step = Runs.read(columns, place), jnp.arange(steps)
        return runs.full, runs.count, runs.tile(step), runs.masked_tile(step)[1]

    return jax.vmap(one)(jnp.arange(columns.shape[0]))


@pytest.mark.gpu
class TestHopper(AttentionCases):
    """Rows of several tiles, the last one partly empty."""

    impl = Hopper()
    length = 300
    window = (40, 296)
    width = 64
    dtype = "bfloat16"


@pytest.mark.gpu
class TestHopperWide(TestHopper):
    """The tuned width, rows that fill their tiles."""

    length = 384
    width = 128


@pytest.mark.gpu
class TestHopperFewBlocks(TestHopperWide):
    """Thread blocks that take many items each: the rows of these laws are too short for 132."""

    @pytest.fixture(autouse=True)
    def few_blocks(self, monkeypatch):
        monkeypatch.setattr(hopper, "BLOCKS", 3)
        jax.clear_caches()
        yield
        jax.clear_caches()


@pytest.mark.gpu
class TestHopperPadded(TestHopper):
    """A width that no product has, rows shorter than a tile."""

    length = 72
    width = 80

    def test_prefix_attention_reads_one_layer_of_a_stacked_cache(self):
        """A cache is read as it lies: widths that no product has are refused."""
        with pytest.raises(NotImplementedError, match="head_dim"):
            super().test_prefix_attention_reads_one_layer_of_a_stacked_cache()


def rows(clean: CleanMode = TOKEN, views: int = 1) -> tuple[Intervals, np.ndarray]:
    """Two packed rows of 32 tokens a stream, with padding: intervals and the mask."""
    first = pack(32, [Document(9, 4, 2), Document(11, 3), Document(10, 5)])
    second = pack(32, [Document(20, 8)], lead=3)
    meta = with_views(stack(first, second), views)
    bounds = find(meta, meta, clean)
    return bounds, np.asarray(bounds.mask(meta.stream.shape[1]))


@pytest.mark.parametrize("clean", CleanMode)
@pytest.mark.parametrize("views", [1, 2])
def test_a_query_tile_visits_what_it_sees_and_masks_what_it_must(clean, views):
    """Steps below `full` are of tiles seen whole, all others are masked; each pair counts once."""
    bounds, mask = rows(clean, views)
    queries, found = mask.shape[1], np.zeros_like(mask, dtype=int)
    plan = make_query_plan(bounds, queries, TILE, TILE)
    columns = np.asarray(plan.columns)
    assert columns[:, :2].tolist() == [list(x) for x in np.ndindex(2, queries // TILE)]
    lengths = columns[:, 5] - columns[:, 2] + columns[:, 9] - columns[:, 6]
    assert np.array_equal(plan.order, np.argsort(-lengths, kind="stable"))
    low, high = (np.asarray(jnp.stack(x)) for x in ((bounds.a0, bounds.b0), (bounds.a1, bounds.b1)))
    route = (np.asarray(x) for x in routes(plan.columns, 2 * queries // TILE))
    for (row, tile, *_), full, count, visited, own in zip(columns, *route, strict=True):
        at = slice(tile * TILE, (tile + 1) * TILE)
        for step in range(count):
            key, part = visited[step] * TILE, int(own[step])
            if step < full:
                assert mask[row, at, key : key + TILE].all()
                found[row, at, key : key + TILE] += 1
                continue
            keys = key + np.arange(TILE)
            inside = (keys >= low[part, row, at, None]) & (keys < high[part, row, at, None])
            found[row, at, key : key + TILE] += inside
    assert np.array_equal(found, mask.astype(int))
    assert np.array_equal(np.asarray(plan.used, bool), mask.any(axis=1))
    unclean = ~mask.any(axis=1).reshape(2, -1, TILE).all(axis=2)
    assert np.array_equal(np.asarray(plan.unclean, bool), unclean) and unclean.any()


@pytest.mark.parametrize("heads, blocks", [(1, 3), (3, 7), (2, 132)])
def test_shares_hold_each_item_once_and_are_even(heads, blocks):
    """In order in each block, and loads apart by no more than one item's work."""
    bounds, mask = rows()
    plan = make_query_plan(bounds, mask.shape[1], TILE, TILE)
    work = np.asarray(routes(plan.columns, 1)[1])
    items = work.size * heads
    shares = np.asarray(jax.jit(shares_of, static_argnums=(1, 2))(plan, heads, blocks))
    assert shares.shape[0] == min(blocks, items)
    counts = np.asarray(rounds_of(jnp.arange(shares.shape[0]), items, shares.shape[0]))
    taken = [share[:count] for share, count in zip(shares, counts, strict=True)]
    assert sorted(np.concatenate(taken)) == list(range(items))
    assert all((np.diff(share) > 0).all() for share in taken)
    assert np.ptp([work[share // heads].sum() for share in taken]) <= work.max() > 1


def test_shares_go_up_and_down():
    """Work of 8 to 1 for two blocks: 8 5 4 1 and 7 6 3 2, not 8 6 4 2."""
    plan = QueryPlan(*[jnp.zeros((8, 1), jnp.int32)] * 3, order=jnp.arange(8)[::-1])
    assert np.asarray(shares_of(plan, 1, 2)).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]


@pytest.mark.parametrize("clean", CleanMode)
def test_the_halves_of_a_query_tile_name_the_half_key_tiles_that_they_see(clean):
    """Half a key tile is passed over where, and only where, no key of it is seen by the half."""
    bounds, mask = rows(clean)
    half = TILE // 2
    columns = np.asarray(make_query_plan(bounds, mask.shape[1], TILE, TILE).columns)
    keys = np.arange(mask.shape[1])
    for row, tile, *rest in columns:
        covers = np.array(rest[9:13]).reshape(2, 2)
        for part, (low, high) in enumerate(((bounds.a0, bounds.a1), (bounds.b0, bounds.b1))):
            for side in range(2):
                at = slice(tile * TILE + side * half, tile * TILE + (side + 1) * half)
                low_, high_ = (np.asarray(x[row, at])[:, None] for x in (low, high))
                seen = ((keys >= low_) & (keys < high_)).any(axis=0).reshape(-1, half).any(axis=1)
                begin, end = covers[part, side] >> 16, covers[part, side] & 0xFFFF
                named = (np.arange(seen.size) >= begin) & (np.arange(seen.size) < end)
                assert not (seen & ~named).any() and named.any() == seen.any()
                if seen.any():
                    assert seen[begin] and seen[end - 1]


@pytest.mark.parametrize("clean", CleanMode)
@pytest.mark.parametrize("views", [1, 2])
def test_a_key_tile_lists_the_query_tiles_that_see_it(clean, views):
    """Entries without a mask first; a flag where a query's interval is empty; each pair once."""
    bounds, mask = rows(clean, views)
    half, found = TILE // 2, np.zeros_like(mask, dtype=int)
    plan = make_key_plan(bounds, mask.shape[2], half, TILE)
    columns, entries = np.asarray(plan.columns), np.asarray(plan.entries)
    assert columns[:, 1::-1].tolist() == [list(x) for x in np.ndindex(mask.shape[2] // TILE, 2)]
    low, high = (np.asarray(jnp.stack(x)) for x in ((bounds.a0, bounds.b0), (bounds.a1, bounds.b1)))
    for (row, tile, full, count), listed in zip(columns, entries, strict=True):
        keys = tile * TILE + np.arange(TILE)
        for step, entry in enumerate(listed[:count]):
            queries, part = entry >> FLAGS, entry & OWN
            at = slice(queries * half, (queries + 1) * half)
            inside = (keys >= low[part, row, at, None]) & (keys < high[part, row, at, None])
            assert inside.any() and (step >= full or inside.all())
            assert bool(entry & FIRST_HALF) == inside[:, :half].any()
            assert bool(entry & SECOND_HALF) == inside[:, half:].any()
            assert bool(entry & IDLE) == bool((low[part, row, at] >= high[part, row, at]).any())
            found[row, at, keys[0] : keys[-1] + 1] += inside
    assert np.array_equal(found, mask.astype(int))


def in_interpreter(row, clean: CleanMode, hold=0.0, **options):
    """Results and float64 reference of a row and its noisy view, with `hold` in what is unseen."""
    meta = with_views(stack(row), 1)
    case = in_type(make_case(meta, meta, clean, heads=2, kv_heads=1, width=64), "bfloat16")
    empty = ~case.seen.any(axis=-1)
    arrays = (
        np.where(empty[..., None, None], hold, getattr(case, n)) for n in ["q", "k", "v", "d_out"]
    )
    q, k, v, d_out = (jnp.asarray(x, "bfloat16") for x in arrays)
    d_lse = jnp.asarray(np.where(empty[..., None], hold, case.d_lse), jnp.float32)
    # Traced afresh: what was traced in or out of the interpreter must not be used again.
    run = run_jit.__wrapped__
    with interpreted(**options):
        got = jax.block_until_ready(run(Hopper(), q, k, v, case.intervals, d_out, d_lse))
    expected = reference(case.q, case.k, case.v, case.d_out, case.d_lse, case.seen)
    for name, actual, want in zip(expected._fields, got, expected, strict=True):
        if name == "lse":
            actual, want = np.asarray(actual)[~empty], want[~empty]
        assert_close(actual, want, 1e-2, name, by_norms=True)


@pytest.mark.slow
@pytest.mark.parametrize("clean", CleanMode)
@pytest.mark.parametrize(
    "row, blocks",
    [
        pytest.param(pack(256, [Document(24, 5), Document(232, 9)]), 3, id="masks everywhere"),
        pytest.param(pack(256, [Document(256, 128)]), 1, id="noisy tiles without a mask"),
        pytest.param(pack(256, [Document(100, 7)]), 1, id="tiles that see nothing"),
    ],
)
def test_the_kernels_in_the_interpreter_give_the_reference_without_races(
    row, clean, blocks, monkeypatch
):
    """All three passes with their barriers, blocks of several items, grouped heads; bfloat16.

    A warpgroup of the forward pass may be an item ahead of the other, whatever the items' steps.
    Without `zero_rows`, in which two warpgroups write the same zeros on purpose.
    """
    monkeypatch.setattr(hopper, "BLOCKS", blocks)
    for module in (hopper_forward, hopper_backward):
        monkeypatch.setattr(module, "zero_rows", lambda tile, keep: None)
    in_interpreter(row, clean)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter reads no moving slice")
def test_what_padding_holds_stands_in_no_product(monkeypatch):
    """NaN in whatever nobody sees, in cotangents too."""
    monkeypatch.setattr(hopper, "BLOCKS", 3)
    row = pack(128, [Document(40, 8, 10), Document(60, 9)], lead=3)
    in_interpreter(row, TOKEN, hold=np.nan, detect_races=False)


@pytest.mark.parametrize(
    "dtype, value_dtype, width, words",
    [
        ("float32", "float32", 64, "bfloat16 or float16, not float32"),
        ("bfloat16", "float16", 64, "of one type"),
        ("bfloat16", "bfloat16", 192, "128"),
    ],
)
def test_what_it_cannot_serve_it_refuses_with_the_reason(dtype, value_dtype, width, words):
    x, v = (jnp.ones((1, 8, 2, width), name) for name in (dtype, value_dtype))
    with pytest.raises(NotImplementedError, match=words):
        Hopper().attention(x, x, v, Intervals(*[jnp.zeros((1, 8), jnp.int32)] * 4))


def test_rows_too_long_for_a_plan_are_refused():
    """Begin and end of what is seen share 32 bits."""
    x = jax.ShapeDtypeStruct((1, MOST_KEYS + 1, 1, 64), jnp.bfloat16)
    seen = Intervals(*[jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)] * 4)
    with pytest.raises(NotImplementedError, match="keys a row"):
        jax.eval_shape(Hopper().attention, x, x, x, seen)


def test_the_block_causal_clean_stream_needs_no_mask_inside_its_blocks():
    """Blocks as long as a tile: every clean pair of tiles is full, nothing is masked."""
    meta = pack(32, [Document(32, TILE)])
    bounds = find(stack(meta), stack(meta), BLOCK)
    plan = make_query_plan(bounds, 32, TILE, TILE)
    assert (
        routes(plan.columns, 1)[0].tolist() == [1, 2, 3, 4] and not np.asarray(plan.unclean).any()
    )
