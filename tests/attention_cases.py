"""The laws of attention under interval masks, as a class that every implementation inherits.

The reference is a masked softmax in numpy float64 whose mask comes straight from `visible`, pair by
pair; intervals are what the implementation under test gets. An implementation's test class sets
`impl` (and, for a chip's kernel, sizes that it serves).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import CleanMode, Intervals, Meta, dense_mask, intervals, merge
from pallas_kernels.merge import EMPTY

TOKEN, BLOCK = CleanMode


class Document(NamedTuple):
    """A packed document: its length, its block size and the padding after it."""

    length: int
    block: int
    gap: int = 0


def pack(length: int, documents: list[Document], lead: int = 0) -> Meta:
    """The clean stream (length,) of packed documents; `lead` tokens of padding come first."""
    segment, position, block = (np.zeros(length, np.int32) for _ in range(3))
    at = lead
    for number, document in enumerate(documents):
        inside = slice(at, min(at + document.length, length))
        count = max(0, inside.stop - inside.start)
        segment[inside] = number + 1
        position[inside] = np.arange(count)
        block[inside] = np.arange(count) // document.block
        at += document.length + document.gap
    return Meta(np.zeros(length, np.int32), segment, block, position)


def stack(*rows: Meta) -> Meta:
    """Rows as a batch."""
    return Meta(*(np.stack(fields) for fields in zip(*rows, strict=True)))


def with_views(clean: Meta, views: int) -> Meta:
    """[clean; view 1; ...; view `views`] along the last axis."""
    streams = [clean._replace(stream=clean.stream + view) for view in range(views + 1)]
    return Meta(*(np.concatenate(fields, axis=-1) for fields in zip(*streams, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Queries and keys with their mask integers, heads and cotangents; float64 unless rounded."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d_out: np.ndarray
    d_lse: np.ndarray
    query: Meta
    key: Meta
    clean: CleanMode

    @property
    def seen(self) -> np.ndarray:
        """Who sees whom, from the predicate."""
        return np.asarray(dense_mask(self.query, self.key, self.clean))

    @property
    def intervals(self) -> Intervals:
        """What the implementation is given instead."""
        return find(self.query, self.key, self.clean)


find = jax.jit(intervals, static_argnums=2)


def make_case(query: Meta, key: Meta, clean: CleanMode, *, heads, kv_heads, width, seed=0) -> Case:
    """Random arrays for given integers; every number is exact in float32."""
    rng = np.random.default_rng(seed)
    batch, queries = query.stream.shape
    keys = key.stream.shape[1]

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    return Case(
        q=draw(batch, queries, heads, width),
        k=draw(batch, keys, kv_heads, width),
        v=draw(batch, keys, kv_heads, width),
        d_out=draw(batch, queries, heads, width),
        d_lse=draw(batch, queries, heads),
        query=query,
        key=key,
        clean=clean,
    )


def in_type(case: Case, dtype: str) -> Case:
    """The case with its arrays rounded to a type: what error is left is the kernel's own."""
    names = ("q", "k", "v", "d_out")
    return replace(
        case, **{n: np.asarray(jnp.asarray(getattr(case, n), dtype), np.float64) for n in names}
    )


class Result(NamedTuple):
    """Outputs and the gradients of <d_out, out> + <d_lse, lse>."""

    out: np.ndarray
    lse: np.ndarray
    d_q: np.ndarray
    d_k: np.ndarray
    d_v: np.ndarray


def reference(q, k, v, d_out, d_lse, seen) -> Result:
    """Masked softmax attention and its gradients in float64; rows without keys are zero."""
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = k.repeat(group, axis=2), v.repeat(group, axis=2)
    scale = q.shape[3] ** -0.5
    scores = np.einsum("btnh,bsnh->bnts", q, wide_k) * scale
    scores = np.where(seen[:, None], scores, -np.inf)
    top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    share = weights / np.where(some, total, 1)
    lse = np.where(some, top + np.log(np.where(some, total, 1)), EMPTY)[..., 0]
    out = np.einsum("bnts,bsnh->btnh", share, wide_v)
    d_share = np.einsum("btnh,bsnh->bnts", d_out, wide_v)
    inner = (share * d_share).sum(axis=-1, keepdims=True)
    d_scores = share * (d_share - inner + d_lse.transpose(0, 2, 1)[..., None]) * scale
    d_k = np.einsum("bnts,btnh->bsnh", d_scores, q)
    d_v = np.einsum("bnts,btnh->bsnh", share, d_out)

    def grouped(x):
        return x.reshape(*k.shape[:3], group, -1).sum(axis=3)

    d_q = np.einsum("bnts,bsnh->btnh", d_scores, wide_k)
    return Result(out, lse.transpose(0, 2, 1), d_q, grouped(d_k), grouped(d_v))


@partial(jax.jit, static_argnums=0)
def run_jit(impl, q, k, v, bounds, d_out, d_lse):
    """Outputs and gradients of an implementation, compiled once per shape."""
    both, pull = jax.vjp(lambda q, k, v: impl.attention(q, k, v, bounds), q, k, v)
    return Result(*both, *pull((d_out.astype(q.dtype), d_lse)))


@partial(jax.jit, static_argnums=0)
def prefix_jit(impl, q, cache_k, cache_v, layer, bounds):
    """One layer of a stacked cache."""
    return impl.prefix_attention(q, cache_k, cache_v, layer, bounds)


@jax.jit
def merge_jit(parts, d_out, d_lse):
    """The merge of two parts and the cotangents of both."""
    both, pull = jax.vjp(merge, *parts)
    return both, pull((d_out, d_lse))


def assert_close(
    actual, expected, tolerance: float, what: str = "", by_norms: bool = False
) -> None:
    """Largest error at most `tolerance` of the largest expected entry (at least of 1), or, by
    norms, |actual - expected| at most `tolerance` of |expected|: the measure for 16 bits."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), what
    size = np.linalg.norm if by_norms else (lambda x: np.abs(x).max(initial=0.0))
    scale, error = max(size(expected), 0.0 if by_norms else 1.0), size(actual - expected)
    assert error <= tolerance * scale, f"{what}: error {error} at scale {scale}"


class AttentionCases:
    """Inherit and set `impl`. Lengths count the tokens of a joined row and divide by 12."""

    impl = None
    length = 48
    width = 8
    window = (10, 29)  # queries and keys where they differ
    groups = (1, 2, 4)  # query heads per KV head
    halves = ("bfloat16", "float16")
    dtype = "float32"  # of inputs, where a case names none
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
    may_refuse = False  # whether NotImplementedError skips (a kernel with fixed shapes)

    # What the cases are made of.

    def row(self, documents: list[Document], *others: list[Document], views=1, lead=0) -> Meta:
        """A batch of two joined rows; lengths are given for a stream of 24 and scaled."""
        stream = self.length // (views + 1)

        def scaled(docs):
            return pack(
                stream,
                [Document(d.length * stream // 24, d.block, d.gap * stream // 24) for d in docs],
                lead,
            )

        rows = [scaled(docs) for docs in (documents, *(others or [documents]))]
        return with_views(stack(*rows), views)

    def case(self, meta: Meta, clean: CleanMode, group: int = 2, seed: int = 0) -> Case:
        """Self-attention of a joined row with four query heads."""
        drawn = make_case(
            meta, meta, clean, heads=4, kv_heads=4 // group, width=self.width, seed=seed
        )
        return in_type(drawn, self.dtype)

    def window_case(self, clean: CleanMode = BLOCK) -> Case:
        """A canvas and a finished block (short, unaligned) against a longer clean prefix."""
        queries, keys = self.window
        half = queries // 2
        prefix = pack(keys, [Document(keys - 3, half)])
        prefix = prefix._replace(segment=np.where(prefix.block > 2, 0, prefix.segment))
        block = np.repeat([2, 3], [half, queries - half]).astype(np.int32)
        order = 2 * half + np.arange(queries, dtype=np.int32)
        stream = (block == 3).astype(np.int32)
        query = Meta(stream, stream * 0 + 1, block, order)
        idle = query._replace(segment=query.segment * (np.arange(queries) < half + 2))
        drawn = make_case(
            stack(query, idle),
            stack(prefix, prefix),
            clean,
            heads=4,
            kv_heads=2,
            width=self.width,
        )
        return in_type(drawn, self.dtype)

    @property
    def close(self) -> float:
        """The tolerance of `dtype`."""
        return self.tolerance[self.dtype]

    # How they run.

    def call(self, function, *arguments):
        """The implementation's answer; its refusal skips if it may refuse."""
        try:
            return function(self.impl, *arguments)
        except NotImplementedError as reason:
            if not self.may_refuse:
                raise
            pytest.skip(str(reason))

    def run(self, case: Case, dtype: str | None = None, bounds: Intervals | None = None) -> Result:
        """Outputs and gradients; `bounds` replaces the case's intervals."""
        dtype = dtype or self.dtype
        arrays = (jnp.asarray(x, dtype) for x in (case.q, case.k, case.v))
        bounds = case.intervals if bounds is None else bounds
        d_out, d_lse = (jnp.asarray(x, jnp.float32) for x in (case.d_out, case.d_lse))
        result = self.call(run_jit, *arrays, bounds, d_out, d_lse)
        assert result.out.dtype == result.d_k.dtype == jnp.dtype(dtype)
        assert result.lse.dtype == jnp.float32
        return result

    def check(self, case: Case, dtype: str | None = None) -> Result:
        """The law itself: outputs and gradients equal the float64 reference."""
        dtype = dtype or self.dtype
        rounded = in_type(case, dtype)
        result = self.run(rounded, dtype)
        seen = case.seen
        expected = reference(rounded.q, rounded.k, rounded.v, rounded.d_out, rounded.d_lse, seen)
        empty = ~seen.any(axis=-1)
        assert (np.asarray(result.lse)[empty] == np.float32(EMPTY)).all()
        for name in Result._fields:
            got, want = np.asarray(getattr(result, name), np.float64), getattr(expected, name)
            if name == "lse":
                got, want = got[~empty], want[~empty]
            by_norms = dtype != "float32"
            assert_close(got, want, self.tolerance[dtype], name, by_norms)
        return result

    def near(self, actual, expected, tolerance: float, what: str) -> None:
        """`assert_close` by the measure of the class's type."""
        assert_close(actual, expected, tolerance, what, self.dtype != "float32")

    # The laws.

    @pytest.mark.parametrize("clean", CleanMode)
    def test_packed_short_documents_with_unaligned_blocks(self, clean):
        """Documents whose blocks end anywhere, of different block sizes, with padding between."""
        first = [Document(7, 3, 1), Document(2, 4), Document(5, 2, 2), Document(7, 5)]
        second = [Document(1, 1), Document(1, 8, 3), Document(19, 7)]
        self.check(self.case(self.row(first, second), clean))

    @pytest.mark.parametrize("clean", CleanMode)
    @pytest.mark.parametrize("block", [1, 24])
    def test_blocks_of_one_token_and_of_the_whole_row(self, block, clean):
        meta = self.row([Document(24, block)])
        if block == 24:
            meta = meta._replace(block=meta.block * 0)
        self.check(self.case(meta, clean))

    @pytest.mark.parametrize("clean", CleanMode)
    @pytest.mark.parametrize("views", [2, 3])
    def test_several_views_share_the_clean_stream(self, views, clean):
        meta = self.row([Document(14, 3), Document(10, 4)], [Document(24, 5)], views=views)
        self.check(self.case(meta, clean))

    def test_clean_stream_alone(self):
        """No noisy tokens: causal attention inside documents."""
        self.check(self.case(self.row([Document(24, 4)], [Document(5, 2), Document(9, 2)]), TOKEN))
        meta = pack(self.length, [Document(self.length // 3, 4), Document(self.length // 2, 4)])
        self.check(self.case(stack(meta, meta), TOKEN))

    @pytest.mark.parametrize("group", [1, 2, 4])
    def test_grouped_queries(self, group):
        if group not in self.groups:
            pytest.skip(f"serves groups of {self.groups}")
        meta = self.row([Document(11, 4), Document(13, 3)])
        self.check(self.case(meta, TOKEN, group=group))

    @pytest.mark.parametrize("clean", CleanMode)
    def test_queries_and_keys_of_different_number(self, clean):
        self.check(self.window_case(clean))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, dtype):
        """Inputs rounded first; the error left is the kernel's own."""
        if dtype not in self.halves:
            pytest.skip(f"serves {self.halves}")
        meta = self.row([Document(11, 4), Document(13, 3)], [Document(24, 8)])
        self.check(self.case(meta, TOKEN), dtype)

    def test_vmap_is_a_loop(self):
        case = self.case(self.row([Document(7, 3), Document(17, 4)]), TOKEN)
        other = self.case(self.row([Document(24, 5)]), BLOCK, seed=1)
        names = ("q", "k", "v", "intervals", "d_out", "d_lse")
        arguments = [
            jax.tree.map(
                lambda *x, dtype="float32" if name == "d_lse" else self.dtype: jnp.stack(
                    [y if y.dtype == jnp.int32 else jnp.asarray(y, dtype) for y in x]
                ),
                *(getattr(c, name) for c in (case, other)),
            )
            for name in names
        ]
        both = self.call(lambda impl: jax.vmap(partial(run_jit, impl))(*arguments))
        for i, one in enumerate((case, other)):
            for name, a, b in zip(Result._fields, both, self.run(one), strict=True):
                assert_close(a[i], np.asarray(b, np.float64), 1e-6, name)

    def test_rows_that_see_nothing_are_zero_with_zero_gradients(self):
        """Padding: outputs and all gradients are exact zeros whatever the cotangents are."""
        meta = self.row([Document(3, 2, 6), Document(4, 2)], [], lead=4)
        case = self.case(meta, BLOCK)
        result = self.check(case)
        empty, unseen = ~case.seen.any(axis=-1), ~case.seen.any(axis=-2)
        assert empty[1].all() and 0 < empty[0].sum() < empty[0].size
        assert (np.asarray(result.out)[empty] == 0).all()
        assert (np.asarray(result.d_q)[empty] == 0).all()
        assert (np.asarray(result.d_k)[unseen] == 0).all()
        assert (np.asarray(result.d_v)[unseen] == 0).all()
        d_out = np.where(empty[..., None, None], np.nan, case.d_out)
        loud = replace(case, d_out=d_out, d_lse=np.where(empty[..., None], np.nan, case.d_lse))
        for name, a, b in zip(Result._fields, result, self.run(loud), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b)), name

    @pytest.mark.parametrize("rows, queries, keys", [(1, 0, 6), (1, 6, 0), (0, 6, 6)])
    def test_no_rows_no_queries_or_no_keys(self, rows, queries, keys):
        """Nothing in, nothing seen: zeros of the right shape and type, gradients too."""
        q, d_out = (jnp.ones((rows, queries, 4, self.width), self.dtype) for _ in range(2))
        k, d_lse = jnp.ones((rows, keys, 2, self.width), self.dtype), jnp.ones(q.shape[:3])
        bounds = Intervals(*[jnp.zeros((rows, queries), jnp.int32)] * 4)
        found = self.call(run_jit, q, k, k, bounds, d_out, d_lse)
        cache = jnp.ones((2, rows, 2, keys, self.width), self.dtype)
        window = self.call(prefix_jit, q, cache, cache, jnp.asarray(1), bounds)
        for out, lse in (found[:2], window):
            assert out.shape == q.shape and (np.asarray(out) == 0).all()
            assert lse.shape == q.shape[:3] and (np.asarray(lse) == np.float32(EMPTY)).all()
        for gradient, of in zip(found[2:], (q, k, k), strict=True):
            assert gradient.shape == of.shape and (np.asarray(gradient) == 0).all()

    def test_large_scores_do_not_overflow(self):
        """Scores of several hundred: the softmax is shifted by its maximum."""
        case = self.case(self.row([Document(24, 6)]), TOKEN)
        case = replace(case, q=case.q * 64, d_out=case.d_out / 64, d_lse=case.d_lse / 64)
        expected = reference(case.q, case.k, case.v, case.d_out, case.d_lse, case.seen)
        result = self.run(case)
        assert np.abs(expected.lse).max() > 100
        self.near(result.out, expected.out, max(2e-3, 4 * self.close), "out")
        assert_close(result.lse, expected.lse, 1e-5, "lse")
        self.near(result.d_k, expected.d_k, max(2e-3, 4 * self.close), "d_k")

    def test_what_padding_holds_has_no_influence(self):
        """NaN in keys and values that nobody sees and in queries that see nothing reaches nothing:
        no bit of outputs and gradients differs from zeros there."""
        case = self.case(self.row([Document(6, 4, 7), Document(8, 3)], lead=2), TOKEN)
        unseen, empty = ~case.seen.any(axis=1), ~case.seen.any(axis=2)
        assert unseen.any() and empty.any()

        def holding(x):
            def put(array, where):
                return np.where(where[..., None, None], x, array)

            return replace(case, q=put(case.q, empty), k=put(case.k, unseen), v=put(case.v, unseen))

        quiet, noisy = self.run(holding(0.0)), self.run(holding(np.nan))
        for name, a, b in zip(Result._fields, quiet, noisy, strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b)), name

    def test_a_nan_that_is_seen_stays_seen(self):
        """Nothing hides a NaN in a visible value: it reaches all who see it and no other row."""
        case = self.case(self.row([Document(10, 4), Document(14, 3)]), TOKEN)
        at = 5 * self.length // 48
        value = case.v.copy()
        value[0, at] = np.nan
        out = np.asarray(self.run(replace(case, v=value)).out)
        reached, sees = np.isnan(out).any(axis=(2, 3)), case.seen[0, :, at]
        assert sees.any() and reached[0][sees].all() and not reached[1].any()

    def test_repeatable_bit_by_bit(self):
        case = self.case(self.row([Document(7, 3), Document(17, 4)]), TOKEN, seed=3)
        for name, a, b in zip(Result._fields, self.run(case), self.run(case), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name

    @pytest.mark.parametrize("cut", ["streams", "middle"])
    def test_merge_of_a_split_is_the_whole(self, cut):
        """Values, log-sum-exps and gradients of two disjoint key sets merge into those of all."""
        case = self.case(self.row([Document(9, 4, 2), Document(11, 3)], [Document(24, 6)]), TOKEN)
        bounds = case.intervals
        if cut == "streams":
            parts = [bounds._replace(b1=bounds.b0), bounds._replace(a1=bounds.a0)]
        else:
            at = self.length // 2 - 5
            parts = [
                Intervals(*(jnp.clip(x, 0, at) for x in bounds)),
                Intervals(*(jnp.clip(x, at, self.length) for x in bounds)),
            ]
        expected = reference(case.q, case.k, case.v, case.d_out, case.d_lse, case.seen)
        results = [self.run(case, bounds=part) for part in parts]
        d_out, d_lse = (jnp.asarray(x, jnp.float32) for x in (case.d_out, case.d_lse))
        halves = [x for r in results for x in (r.out.astype(jnp.float32), r.lse)]
        (out, lse), (d_out_1, d_lse_1, d_out_2, d_lse_2) = merge_jit(halves, d_out, d_lse)
        some = case.seen.any(axis=-1)
        self.near(out, expected.out, self.close, "out")
        self.near(np.asarray(lse)[some], expected.lse[some], self.close, "lse")
        assert (np.asarray(lse)[~some] == np.float32(EMPTY)).all()
        pulled = [
            self.run(replace(case, d_out=np.asarray(a), d_lse=np.asarray(b)), bounds=part)
            for part, a, b in zip(parts, (d_out_1, d_out_2), (d_lse_1, d_lse_2), strict=True)
        ]
        for name in ("d_q", "d_k", "d_v"):
            both = sum(np.asarray(getattr(r, name), np.float64) for r in pulled)
            self.near(both, getattr(expected, name), 2 * self.close, name)

    def test_prefix_attention_reads_one_layer_of_a_stacked_cache(self):
        """The layer index is data; other layers, and NaN past the length, have no influence."""
        case = self.window_case(TOKEN)
        rng = np.random.default_rng(1)
        unseen = ~case.seen.any(axis=1)[..., None, None]
        for layer in (0, 2):
            keys, values = (np.where(unseen, np.nan, x).swapaxes(1, 2) for x in (case.k, case.v))
            cache_k, cache_v = (rng.normal(0, 100, (3, *keys.shape)) for _ in range(2))
            cache_k[layer], cache_v[layer] = keys, values
            arrays = (jnp.asarray(x, self.dtype) for x in (case.q, cache_k, cache_v))
            out, lse = self.call(prefix_jit, *arrays, jnp.asarray(layer), case.intervals)
            expected = reference(case.q, case.k, case.v, case.d_out, case.d_lse, case.seen)
            some = case.seen.any(axis=-1)
            self.near(out, expected.out, self.close, "out")
            self.near(np.asarray(lse)[some], expected.lse[some], self.close, "lse")
            assert (np.asarray(lse)[~some] == np.float32(EMPTY)).all()

    def test_inside_shard_map_over_batch_and_heads(self):
        """Each device works on its rows and heads alone; trip counts may differ between them."""
        if jax.device_count() < 4:
            pytest.skip("needs four devices")
        case = self.case(self.row([Document(24, 3)], [Document(5, 2), Document(4, 4)]), TOKEN)
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
        heads, rows = P("data", None, "tensor", None), Intervals(*[P("data")] * 4)
        flat = P("data", None, "tensor")
        specs = (heads, heads, heads, rows, heads, flat)
        arguments = (case.q, case.k, case.v, case.intervals, case.d_out, case.d_lse)
        arguments = jax.tree.map(
            lambda x, spec: jax.device_put(
                x if x.dtype == jnp.int32 else jnp.asarray(x, self.dtype),
                NamedSharding(mesh, spec),
            ),
            arguments,
            specs,
        )

        def sharded(impl, *arguments):
            function = jax.shard_map(
                partial(run_jit, impl),
                mesh=mesh,
                in_specs=specs,
                out_specs=Result(heads, flat, heads, heads, heads),
                check_vma=False,
            )
            return jax.jit(function)(*arguments)

        result = self.call(sharded, *arguments)
        expected = reference(case.q, case.k, case.v, case.d_out, case.d_lse, case.seen)
        some = case.seen.any(axis=-1)
        for name in Result._fields:
            got, want = np.asarray(getattr(result, name), np.float64), getattr(expected, name)
            if name == "lse":
                got, want = got[some], want[some]
            self.near(got, want, self.close, name)
