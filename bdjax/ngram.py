"""Byte n-grams with interpolated Witten-Bell backoff: what a model of a few bytes' context reaches.

    p_n(c | h) = (count(h c) + T(h) p_{n-1}(c | h')) / (count(h) + T(h)),    p_0 = 1 / 256

h: the n-1 bytes before c; h': h without its oldest byte; count(h): how often any byte follows h;
T(h): how many different bytes do. An h never seen leaves p_{n-1} as it is. (Witten and Bell 1991,
method C, interpolated as in Chen and Goodman 1998.)
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

# A gram is packed into the bytes of one uint64.
_LONGEST = 8
_BYTE = np.uint64(8)


def bits_per_byte(
    train: Sequence[bytes], held_out: Sequence[bytes], orders: Sequence[int] = (3, 5)
) -> dict[int, float]:
    """order -> mean of -log2 p over all bytes of `held_out`; order 3 is the trigram.

    Raises ValueError as `probabilities` does.
    """
    scored = probabilities(train, held_out, orders)
    return {order: float(-np.log2(p).mean()) for order, p in scored.items()}


def probabilities(
    train: Sequence[bytes], held_out: Sequence[bytes], orders: Sequence[int] = (3, 5)
) -> dict[int, Float[np.ndarray, "N"]]:
    """order -> the probability of each of the N bytes of `held_out`, document after document.

    Each document is a stream of its own: at its start only the context that exists is used.

    Raises ValueError when either text holds no byte, and for orders outside 1..8.
    """
    wrong = [order for order in orders if not 1 <= order <= _LONGEST]
    if wrong or not orders:
        raise ValueError(f"orders={tuple(orders)} must lie in 1..{_LONGEST}; type orders=(3, 5)")
    for name, documents in (("train", train), ("held_out", held_out)):
        if not any(documents):
            raise ValueError(f"{name} holds no byte in {len(documents)} documents; give it text")

    seen, scored = _Grams(train), _Grams(held_out)
    p = np.full(len(scored.keys), 1 / 256)
    result = {}
    for order in range(1, max(orders) + 1):
        where = scored.whole
        p[where] = _interpolate(seen.keys[seen.whole], scored.keys[where], p[where])
        if order in orders:
            result[order] = p.copy()
        if order < max(orders):
            seen.lengthen()
            scored.lengthen()
    return result


def _interpolate(
    seen: UInt64[np.ndarray, "S"], scored: UInt64[np.ndarray, "N"], shorter: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """One step of the recursion: p_{n-1} of the `scored` grams -> p_n, counting grams in `seen`."""
    if not len(seen):
        return shorter
    grams, gram_counts = np.unique(seen, return_counts=True)
    # The context is a gram's upper bytes, so sorted grams lie context by context.
    contexts, first, kinds = np.unique(grams >> _BYTE, return_index=True, return_counts=True)
    totals = np.add.reduceat(gram_counts, first)
    count = _look_up(grams, gram_counts, scored)
    total = _look_up(contexts, totals, scored >> _BYTE)
    kind = _look_up(contexts, kinds, scored >> _BYTE)
    # A context never seen has total = kind = 0 and backs off whole.
    return np.where(total > 0, (count + kind * shorter) / np.maximum(total + kind, 1), shorter)


def _look_up(
    keys: UInt64[np.ndarray, "K"], values: Int[np.ndarray, "K"], wanted: UInt64[np.ndarray, "N"]
) -> Int[np.ndarray, "N"]:
    """values[i] where keys[i] == wanted, keys ascending; 0 where there is no such key."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


class _Grams:
    """The gram that ends at each byte of some documents, of a length that grows from 1.

    keys: the gram's bytes, its last byte lowest. whole: whether the gram lies in one document.
    """

    keys: UInt64[np.ndarray, "N"]
    whole: Bool[np.ndarray, "N"]

    def __init__(self, documents: Sequence[bytes]):
        self._length = 1
        self._bytes = np.frombuffer(b"".join(documents), np.uint8).astype(np.uint64)
        sizes = [len(document) for document in documents]
        starts = np.cumsum([0, *sizes[:-1]])
        self._offset = np.arange(len(self._bytes)) - np.repeat(starts, sizes)
        self.keys = self._bytes.copy()
        self.whole = self._offset >= 0

    def lengthen(self) -> None:
        """Grams one byte longer, at their front."""
        self.keys[self._length :] |= self._bytes[: -self._length] << self._length * _BYTE
        self.whole = self._offset >= self._length
        self._length += 1
