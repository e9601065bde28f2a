"""Laws of the mixture: exact shares, every part in its own order, nothing but the index decides."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdjax.corpus import Document
from bdjax.data import PackingConfig, Tail, evaluation_batches, training_batches
from bdjax.mixture import Mixed, part_of
from bdjax.sources import DataConfig, Mixture, StandardLibrary, TextFiles, Weighted
from bdjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PACKING = PackingConfig(row_length=16, align=4, tail=Tail.SHORT)
shares = st.lists(st.fractions(Fraction(1, 50), 20), min_size=1, max_size=5)


@given(shares)
@settings(deadline=None, max_examples=50)
def test_every_part_is_walked_without_gap_and_never_far_from_its_share(shares):
    counts = Counter()
    for index in range(300):
        part, place = part_of(index, shares)
        assert place == counts[part]
        counts[part] += 1
        for number, share in enumerate(shares):
            wanted = (index + 1) * share / sum(shares)
            assert abs(counts[number] - wanted) < len(shares)


def test_a_late_index_is_exact():
    # In floats, 10^17 and 10^17 + 1 are the same number.
    for index in range(10**17, 10**17 + 9):
        part, place = part_of(index, [Fraction(1, 3), Fraction(2, 3)])
        assert (part, place) == ((0, index // 3) if index % 3 == 2 else (1, index - index // 3))


def documents():
    """Part 0: long texts of "a"; part 1: short ones of "b"; part 2: middling of "c"."""
    sizes = ((0, 7, 90), (1, 30, 3), (2, 12, 20))
    return [
        Document(f"{part}.{n}", b"abc"[part : part + 1] * size, part)
        for part, count, size in sizes
        for n in range(count)
    ]


def stream(weights, rows=None, lanes=None, seed=3):
    return training_batches(documents(), TOKENIZER, PACKING, 8, seed, rows, lanes, weights)


@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("weights", [(1.0, 2.5, 0.5), (21.0, 4.0, 6.0), (1e-3, 1e-3, 1e-3)])
def test_tokens_converge_to_the_weights(weights, lanes):
    batches = islice(stream(weights, lanes=lanes), 250)
    rows = np.concatenate([batch["tokens"] for batch in batches])
    # A text of n letters is n + 1 tokens with its EOS.
    found = np.array([(rows == byte).sum() for byte in b"abc"]) * np.array(
        [91 / 90, 4 / 3, 21 / 20]
    )
    np.testing.assert_allclose(found / found.sum(), np.array(weights) / sum(weights), atol=0.012)


def test_processes_share_one_mixture_and_a_resumed_one_goes_on():
    weights = (1.0, 2.0, 3.0)
    whole, first, second = stream(weights), stream(weights, range(4)), stream(weights, range(4, 8))
    for _ in range(9):
        batch = next(whole)
        np.testing.assert_array_equal(batch["tokens"][:4], next(first)["tokens"])
        np.testing.assert_array_equal(batch["tokens"][4:], next(second)["tokens"])
    again = stream(weights)
    again.set_state(whole.get_state())
    for _ in range(5):
        np.testing.assert_array_equal(next(again)["tokens"], next(whole)["tokens"])


@given(shares, st.integers(1, 5))
def test_strides_hold_each_entry_of_each_source_once(shares, stride):
    sources = [[(part, place) for place in range(400)] for part in range(len(shares))]
    found = [
        [entry for entry, _ in zip(Mixed(sources, shares, first, stride), range(60), strict=False)]
        for first in range(stride)
    ]
    for part in range(len(shares)):
        places = sorted(place for entries in found for p, place in entries if p == part)
        assert places == list(range(len(places)))
        assert len({sum(p == part for p, _ in entries) for entries in found}) == 1


def test_one_part_is_no_mixture():
    alone = [d._replace(part=0) for d in documents()]
    plain = training_batches(alone, TOKENIZER, PACKING, 4, 3)
    weighted = training_batches(alone, TOKENIZER, PACKING, 4, 3, weights=(7.0,))
    for one, other in zip(islice(plain, 20), weighted, strict=False):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_a_part_without_a_weight_is_refused():
    with pytest.raises(ValueError, match=r"part 1 have no weight: weights=\(1\.0,\) has 1"):
        training_batches(documents(), TOKENIZER, PACKING, 4, 3)


def test_a_mixtures_documents_are_those_of_its_parts_and_each_is_split(tmp_path):
    for number in range(40):
        (tmp_path / f"{number % 2}.{number}.txt").write_text(f"document {number}")
    parts = [TextFiles(paths=(str(tmp_path / f"{part}.*.txt"),)) for part in range(2)]
    mixture = Mixture(parts=(Weighted(source=parts[0]), Weighted(source=parts[1], weight=3.0)))
    assert mixture.weights() == (1.0, 3.0)
    sides = DataConfig(source=mixture, held_out_fraction=0.2).documents()
    for place, part in enumerate(parts):
        alone = DataConfig(source=part, held_out_fraction=0.2).documents()
        for side, one in zip(sides, alone, strict=True):
            assert [d._replace(part=0) for d in side if d.part == place] == one
    rows = list(evaluation_batches(sides[1], TOKENIZER, PACKING, 4))
    written = np.concatenate([b["tokens"][b["trainable"]] for b in rows])
    assert bytes(written[written < 256].tolist()) == b"".join(d.data for d in sides[1])


def test_mixtures_that_cannot_work_are_refused():
    part = Weighted(source=StandardLibrary())
    with pytest.raises(ValueError, match="parts is empty"):
        Mixture(parts=())
    with pytest.raises(ValueError, match="Mixture inside a Mixture"):
        Weighted(source=Mixture(parts=(part,)))
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be above 0; type weight="):
            Weighted(source=StandardLibrary(), weight=weight)
