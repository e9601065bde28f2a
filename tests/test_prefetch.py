"""Laws of making batches ahead: nothing changes but the waiting."""

import json
import threading
import time
from itertools import islice

import numpy as np
import pytest

from bdjax.corpus import Document
from bdjax.data import PackingConfig, training_batches
from bdjax.prefetch import Prefetched
from bdjax.tokenizer import ByteTokenizer

DOCUMENTS = [Document(str(n), b"%d " % n * (1 + n % 17)) for n in range(60)]


def batches():
    packing = PackingConfig(row_length=12, align=4, move_cuts=True)
    return training_batches(DOCUMENTS, ByteTokenizer(), packing, 4, seed=0)


class Counter:
    """0, 1, 2 .. and then an error; its state is the next number."""

    def __init__(self, end=None):
        self.number, self.end = 0, end

    def __next__(self):
        if self.number == self.end:
            raise OSError("the disk is gone")
        self.number += 1
        return self.number - 1

    def get_state(self):
        return self.number


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_and_states_are_those_of_the_source(depth):
    straight = batches()
    with Prefetched(batches(), depth) as ahead:
        assert ahead.get_state() == straight.get_state()
        for _ in range(150):
            np.testing.assert_equal(next(ahead), next(straight))
            assert ahead.get_state() == straight.get_state()
        state = json.loads(json.dumps(ahead.get_state()))
    resumed = batches()
    resumed.set_state(state)
    with Prefetched(resumed, depth) as again:
        for _ in range(50):
            np.testing.assert_equal(next(again), next(straight))


def settled(source):
    """What the source has made once it makes nothing more."""
    before = None
    while before != source.number:
        before = source.number
        time.sleep(0.05)
    return before


@pytest.mark.parametrize("depth", [1, 4])
def test_so_many_are_made_ahead_and_no_more(depth):
    source = Counter()
    with Prefetched(source, depth) as ahead:
        for delivered in range(1, 4):
            next(ahead)
            assert settled(source) == delivered + depth
            assert ahead.get_state() == delivered
    assert not any(thread.name == "bdjax-prefetch" for thread in threading.enumerate())
    assert list(ahead) == []


def test_an_error_comes_in_its_place_and_ends_it():
    ahead = Prefetched(Counter(end=3), 8)
    assert list(islice(ahead, 3)) == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert ahead.get_state() == 3 and list(ahead) == []
    with pytest.raises(ValueError, match="depth=0 must be at least 1; type depth=2"):
        Prefetched(Counter(), 0)


def test_the_end_of_the_source_is_the_end():
    class Ends(Counter):
        def __next__(self):
            if self.number == 2:
                raise StopIteration
            return super().__next__()

    with Prefetched(Ends(), 2) as ahead:
        assert list(ahead) == [0, 1]


def test_leaving_early_does_not_hang():
    with Prefetched(Counter(), 2):
        pass
    with pytest.raises(KeyError), Prefetched(Counter(), 2) as ahead:
        next(ahead)
        raise KeyError
