"""Laws of the Witten-Bell baseline."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdjax.ngram import bits_per_byte, probabilities

TRAIN = [b"the cat sat on the mat", b"", b"that rat \xff\x00", b"a"]

# Three letters, so that contexts repeat and the counts matter.
documents = st.lists(st.binary(max_size=12).map(lambda b: bytes(97 + c % 3 for c in b)), max_size=4)


def continuations(train, longest):
    """context -> next byte -> count, for all contexts shorter than `longest`, in plain loops."""
    counts = defaultdict(lambda: defaultdict(int))
    for document in train:
        for place, byte in enumerate(document):
            for length in range(min(place, longest - 1) + 1):
                counts[document[place - length : place]][byte] += 1
    return counts


def slow_probability(counts, context, byte):
    """The recursion as it is written in the module's docstring."""
    shorter = slow_probability(counts, context[1:], byte) if context else 1 / 256
    after = counts.get(context)
    if after is None:
        return shorter
    return (after.get(byte, 0) + len(after) * shorter) / (sum(after.values()) + len(after))


@given(train=documents.filter(any), held_out=documents.filter(any), order=st.integers(1, 8))
@settings(deadline=None, max_examples=50)
def test_equals_dictionaries(train, held_out, order):
    counts = continuations(train, order)
    expected = [
        slow_probability(counts, document[max(0, place - order + 1) : place], byte)
        for document in held_out
        for place, byte in enumerate(document)
    ]
    np.testing.assert_allclose(probabilities(train, held_out, (order,))[order], expected)


@pytest.mark.parametrize("context", [b"", b"t", b"th", b"the ca", b"xq", b"\xff", b"at on the m"])
def test_next_byte_sums_to_one(context):
    continued = [context + bytes([byte]) for byte in range(256)]
    for p in probabilities(TRAIN, continued, (1, 3, 5, 8)).values():
        assert p.reshape(256, -1)[:, -1].sum() == pytest.approx(1)


def test_documents_do_not_see_each_other():
    alone = [probabilities(TRAIN, [d], (5,))[5] for d in (b"the", b"cat")]
    together = probabilities(TRAIN, [b"the", b"", b"cat"], (5,))[5]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    # "tr" stands in no training document, only where two of them meet.
    np.testing.assert_array_equal(
        probabilities([b"t", b"r", b"x"], [b"tr"], (2,))[2],
        probabilities([b"t", b"r", b"x"], [b"tr"], (1,))[1],
    )


def test_bits_are_the_mean_over_bytes():
    held_out = [b"the rat", b"sat"]
    p = probabilities(TRAIN, held_out, (2, 4))
    bits = bits_per_byte(TRAIN, held_out, (4, 2))
    assert bits == {n: pytest.approx(-np.log2(p[n]).sum() / 10) for n in (2, 4)}


def test_context_helps_and_repetition_is_cheap():
    text = b"def f(x):\n    return x\n" * 50
    bits = bits_per_byte([text], [text], (1, 3, 5))
    assert bits[1] > bits[3] > bits[5] and bits[5] < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([b"a"], [b"a"], (0,)), r"orders=\(0,\) must lie in 1..8"),
        (([b"a"], [b"a"], (3, 9)), r"orders=\(3, 9\)"),
        (([b"a"], [b"a"], ()), r"orders=\(\)"),
        (([b""], [b"a"]), "train holds no byte"),
        (([b"a"], []), "held_out holds no byte"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        bits_per_byte(*arguments)
