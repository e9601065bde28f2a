"""Documents -> rows: pieces that start with BOS, packed by Grain; no corruption, no jax.

Each document, closed by EOS, is cut into pieces that fit a row; every piece starts with a BOS of
its own and counts positions from there. With row_length=8, align=4 and "abc", "de" as documents:

    Tail.FILL    tokens    B a b c E E E E   B d e E . . . .      E: EOS, B: BOS, .: padding
                 segment   1 1 1 1 1 1 1 1   1 1 1 1 0 0 0 0
    Tail.SHORT   tokens    B a b c E . . .   B d e E . . . .
                 segment   1 1 1 1 1 0 0 0   1 1 1 1 0 0 0 0
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int

from bdjax.corpus import Document
from bdjax.tokenizer import ByteTokenizer

# Rows open at once in training. A full-length piece takes a row of its own, so it takes many open
# rows before several document ends meet and share one. Restoring packs this many rows again.
_OPEN_ROWS = 64


class RowBatch(TypedDict):
    """B rows of L tokens.

    segment: 1, 2, 3 .. for the documents of a row, ascending; 0 marks padding, whose token is EOS.
    position: 0 .. within the document's piece; 0 in padding. trainable: the tokens whose prediction
    is scored, which is all but BOS and padding; EOS that fills a tail counts.
    """

    tokens: Int[np.ndarray, "B L"]
    segment: Int[np.ndarray, "B L"]
    position: Int[np.ndarray, "B L"]
    trainable: Bool[np.ndarray, "B L"]


class Tail(Enum):
    """What follows a document's EOS up to the next multiple of `align`.

    FILL: further EOS tokens of the same document, trainable. SHORT: padding, so that the document's
    last block is short.
    """

    FILL = "fill"
    SHORT = "short"


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How documents share rows of `row_length` tokens.

    Every document starts at a multiple of `align` in its row; `tail` says what its end looks like.

    Raises ValueError for a row too short for BOS and one token, and unless align divides
    row_length.
    """

    row_length: int
    align: int = 1
    tail: Tail = Tail.FILL

    def __post_init__(self):
        if self.row_length < 2:
            raise ValueError(
                f"row_length={self.row_length} has no room for BOS and a token; type at least 2"
            )
        if self.align < 1:
            raise ValueError(
                f"align={self.align} must be at least 1; type align=1 for no alignment"
            )
        if self.row_length % self.align:
            nearest = max(1, round(self.row_length / self.align)) * self.align
            raise ValueError(
                f"row_length={self.row_length} is not a multiple of align={self.align}; "
                f"type row_length={nearest}"
            )


def training_batches(
    documents: Sequence[Document],
    tokenizer: ByteTokenizer,
    packing: PackingConfig,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless `RowBatch`es of (batch_size, row_length); `get_state` and `set_state` resume it.

    Every epoch shuffles all pieces anew; of that one stream, process p of P takes each piece whose
    index is p mod P, so `batch_size` is the number of rows of one process. Same arguments, same
    batches.

    Raises ValueError for an empty corpus, a batch_size below 1, a negative seed, and a
    process_index outside 0..process_count-1.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; type seed=0")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must be in 0..{process_count - 1} "
            f"(process_count={process_count})"
        )
    stream = grain.MapDataset.source(_Epochs(_Pieces(documents, tokenizer, packing), seed))
    shard = stream.slice(slice(process_index, None, process_count))
    rows = _pack(shard, packing, open_rows=_OPEN_ROWS, shuffle_seed=seed)
    return iter(_batch(rows, tokenizer, batch_size))


def evaluation_batches(
    documents: Sequence[Document],
    tokenizer: ByteTokenizer,
    packing: PackingConfig,
    batch_size: int,
) -> Iterator[RowBatch]:
    """Every byte exactly once: read row after row, the batches hold the documents in order.

    The last batch is filled up to `batch_size` with empty rows (segment 0 throughout).

    Raises ValueError for an empty corpus and a batch_size below 1.
    """
    pieces = grain.MapDataset.source(_Pieces(documents, tokenizer, packing))
    # One open row keeps the order, at the price of some padding where a document ends.
    rows = _pack(pieces, packing, open_rows=1, shuffle_seed=None)
    return iter(_batch(rows, tokenizer, batch_size))


def padding_share(batches: Iterable[RowBatch]) -> float:
    """The share of padding (segment 0) among all tokens of `batches`, which must end.

    Raises ValueError when there is no batch.
    """
    counts = [(np.count_nonzero(batch["segment"] == 0), batch["segment"].size) for batch in batches]
    if not counts:
        raise ValueError("padding_share of 0 batches; give at least one")
    padding, total = np.sum(counts, axis=0)
    return float(padding / total)


class _Pieces:
    """Random access to the pieces of tokenised documents: a Grain source.

    Raises ValueError when no document holds a token.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: ByteTokenizer, packing: PackingConfig
    ):
        encoded = [ids for d in documents if (ids := tokenizer.encode(d.data)).size]
        if not encoded:
            raise ValueError(
                f"empty corpus: {len(documents)} documents hold 0 tokens; "
                "give at least one document with text"
            )
        end = np.array([tokenizer.eos_id], np.int32)
        self._tokens = np.concatenate([part for ids in encoded for part in (ids, end)])
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id
        self._align = packing.align if packing.tail is Tail.FILL else 1
        # Cut every document from its start on; BOS takes one place of each piece.
        stops = np.cumsum([ids.size + 1 for ids in encoded])
        starts = np.concatenate([[0], stops[:-1]])
        room = packing.row_length - 1
        cuts = [np.arange(a, b, room) for a, b in zip(starts, stops, strict=True)]
        self._bounds = np.concatenate([*cuts, stops[-1:]])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int | np.integer) -> dict[str, Int[np.ndarray, "T"]]:
        start, stop = self._bounds[index], self._bounds[index + 1]
        length = 1 + stop - start
        # Only a last piece can need filling: all others are whole rows.
        tokens = np.full(-(-length // self._align) * self._align, self._eos_id, np.int32)
        tokens[0] = self._bos_id
        tokens[1:length] = self._tokens[start:stop]
        return {"tokens": tokens}


class _Epochs:
    """Endless random access to pieces, in a new order each epoch: a Grain source.

    An entry is a function of (seed, index) alone. Grain's own shuffle is not used because its
    cipher walks a large domain: 5 ms per entry where only a handful are shuffled (0.2.18).
    """

    def __init__(self, pieces: _Pieces, seed: int):
        self._pieces = pieces
        self._seed = seed
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        epoch, place = divmod(index, len(self._pieces))
        if epoch != self._epoch:
            # Only a cache: the order of an epoch never depends on what was read before.
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(len(self._pieces))
        return self._pieces[self._order[place]]


def _pack(
    pieces: grain.MapDataset, packing: PackingConfig, open_rows: int, shuffle_seed: int | None
) -> grain.IterDataset:
    """Pieces -> rows, first fit into `open_rows` rows at a time; each such group is shuffled."""
    # The pieces are in memory: Grain's reader threads would only cost time and order nothing.
    return grain.experimental.FirstFitPackIterDataset(
        pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": packing.row_length},
        pack_alignment_struct={"tokens": packing.align},
        num_packing_bins=open_rows,
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )


def _batch(rows: grain.IterDataset, tokenizer: ByteTokenizer, batch_size: int) -> grain.IterDataset:
    """Rows -> `RowBatch`es; missing rows of the last batch are empty."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    stack = partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return rows.batch(batch_size, batch_fn=stack).map(partial(_row_batch, tokenizer.eos_id))


def _row_batch(padding_id: int, packed: dict[str, Int[np.ndarray, "B L"]]) -> RowBatch:
    """Grain's names -> ours."""
    segment, position = packed["tokens_segment_ids"], packed["tokens_positions"]
    return RowBatch(
        tokens=np.where(segment > 0, packed["tokens"], np.int32(padding_id)),
        segment=segment,
        position=position,
        # Position 0 is BOS or padding, and nothing else.
        trainable=position > 0,
    )
