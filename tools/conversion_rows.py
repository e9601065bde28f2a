"""Held-out text as windows that every measurement of a conversion scores: the same bytes each time.

Documents are cut into pieces of `length` - 1 tokens. BOS stands before each, is seen and never
scored. A piece is cut to a multiple of WIDEST tokens with its BOS, so that blocks of all sizes up
to WIDEST are full and no end-of-text token is asked for: all nats counted are those of text. Of
every source the same windows are taken, drawn from all of it at random, up to a number of tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from bdjax import JsonLines, Tokenizer
from bdjax.data import RowBatch

WIDEST = 16

Windows = Sequence[Int[np.ndarray, "T"]]


def sources(mix: Path, side: str) -> dict[str, Path]:
    """The files mix/<side>/<source>.jsonl[.gz|.zst] by the names of their sources.

    Raises FileNotFoundError where there is none.
    """
    found = {path.name.partition(".")[0]: path for path in sorted((mix / side).glob("*.jsonl*"))}
    if not found:
        raise FileNotFoundError(
            f"{mix / side} holds no .jsonl file; type --mix with another folder"
        )
    return found


def windows(path: Path, tokenizer: Tokenizer, length: int, tokens: int) -> Windows:
    """Windows of at most `length` tokens with BOS, about `tokens` scored ones in all."""
    documents = JsonLines(paths=(str(path),)).documents()
    room = length - 1
    pieces = [
        ids[start : start + room]
        for ids in tokenizer.encode_all([document.data for document in documents])
        for start in range(0, len(ids), room)
    ]
    head = np.array([tokenizer.bos_id], np.int32)
    whole = [
        np.concatenate([head, piece[: (len(piece) + 1) // WIDEST * WIDEST - 1]])
        for piece in pieces
        if len(piece) + 1 >= WIDEST
    ]
    found, left = [], tokens
    for number in np.random.default_rng(0).permutation(len(whole)):
        if left <= 0:
            break
        found.append(whole[number])
        left -= len(whole[number]) - 1
    return found


def held_out(mix: Path, tokenizer: Tokenizer, length: int, tokens: int) -> dict[str, Windows]:
    """The windows of every source of the mix's held-out side.

    Raises ValueError for a source without one, and for a `length` in which none has room.
    """
    if length < WIDEST:
        raise ValueError(
            f"rows of {length} tokens hold no window of {WIDEST}; type --row-length 1024"
        )
    found = {
        name: windows(path, tokenizer, length, tokens)
        for name, path in sources(mix, "heldout").items()
    }
    for name, texts in found.items():
        if not texts:
            raise ValueError(
                f"{mix / 'heldout'} has no text of {WIDEST - 1} tokens or more of {name}; take its "
                "files out of the mix"
            )
    return found


def fingerprint(found: Mapping[str, Windows]) -> str:
    """Of sources and tokens: equal ones make numbers comparable."""
    digest = hashlib.sha256()
    for name, texts in found.items():
        digest.update(name.encode())
        for ids in texts:
            digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def rows(texts: Windows, length: int, batch_size: int, padding: int) -> list[RowBatch]:
    """Windows one after another in rows of `length`; the last batch gets empty rows."""
    packed: list[list[np.ndarray]] = [[]]
    for ids in texts:
        if sum(map(len, packed[-1])) + len(ids) > length:
            packed.append([])
        packed[-1].append(ids)
    count = -(-len(packed) // batch_size) * batch_size
    tokens = np.full((count, length), padding, np.int32)
    segment, position = np.zeros((2, count, length), np.int32)
    for number, row in enumerate(packed):
        at = 0
        for ordinal, ids in enumerate(row, 1):
            here = number, slice(at, at + len(ids))
            tokens[here], segment[here], position[here] = ids, ordinal, np.arange(len(ids))
            at += len(ids)
    whole = RowBatch(tokens=tokens, segment=segment, position=position, trainable=position > 0)
    return [
        RowBatch(**{name: x[start : start + batch_size] for name, x in whole.items()})
        for start in range(0, count, batch_size)
    ]
