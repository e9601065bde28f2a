"""Which part of a mixture an entry of the stream comes from: exact, and with random access."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


def part_of(index: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """(part, place): entry `index` of the mixture is entry `place` of `part`.

    Of the first n entries, floor(n s) belong to a part of share s, the rest to the others: a
    Sturmian word. The entries of the rest are numbered anew and divided in the same way. Every
    part's entries are numbered 0, 1, 2 .. without a gap, and after n of the whole its count is
    within one per part of n times its share. The shares need not sum to 1.
    """
    left = sum(shares)
    for part, share in enumerate(shares[:-1]):
        before = math.floor(index * share / left)
        if math.floor((index + 1) * share / left) > before:
            return part, before
        index, left = index - before, left - share
    return len(shares) - 1, index


class Mixed:
    """Endless random access to several endless sources, or to every `stride`th entry of each.

    A Grain source; an entry is a function of its index, the shares and the sources alone. Of
    `stride` of these with `first` = 0, 1 .. every one has the same shares, and together they hold
    each entry of each source once.
    """

    def __init__(
        self, sources: Sequence[Any], shares: Sequence[Fraction], first: int = 0, stride: int = 1
    ):
        self._sources, self._shares = sources, shares
        self._first, self._stride = first, stride

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Any:
        part, place = part_of(index, self._shares)
        return self._sources[part][self._first + place * self._stride]
