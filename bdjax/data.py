"""Documents -> rows: pieces that start with BOS, packed by Grain; no corruption, no jax.

Each document, closed by EOS, is cut into pieces that fit a row; every piece counts positions from
its head, which is BOS at a document's start and CUT where a document goes on. An encoded chat fits
a row and is never cut. With row_length=8, align=4 and "abc", "de", "0123456789" as documents:

    Tail.FILL    tokens    B a b c E E E E   B d e E . . . .      E: EOS, B: BOS, C: CUT, .: padding
                 segment   1 1 1 1 1 1 1 1   1 1 1 1 0 0 0 0
    Tail.SHORT   tokens    B a b c E . . .   B d e E . . . .      B 0 1 2 3 4 5 6   C 7 8 9 E . . .
                 segment   1 1 1 1 1 0 0 0   1 1 1 1 0 0 0 0      1 1 1 1 1 1 1 1   1 1 1 1 1 0 0 0

The stream of training pieces is dealt to a fixed number of lanes, each of which fills its own rows
of every batch: a batch is a function of (seed, step), however many processes share the lanes.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from functools import partial
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int

from bdjax.corpus import Document
from bdjax.mixture import Mixed
from bdjax.tokenizer import Tokenizer

# Rows open at once in training, over all lanes. A full-length piece takes a row of its own, so it
# takes many open rows before several document ends meet and share one. Restoring packs this many
# rows again.
_OPEN_ROWS = 64

# Lanes that a batch has unless it is told otherwise, at most: each costs a packer's time per batch.
_LANES = 8


class RowBatch(TypedDict):
    """B rows of L tokens.

    segment: 1, 2, 3 .. for the documents of a row, ascending; 0 marks padding, whose token is EOS.
    position: 0 .. within the document's piece; 0 in padding. trainable: the tokens whose prediction
    is scored, which is all but BOS, CUT, padding and chats' prompts; EOS that fills a tail counts.
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
    `move_cuts`: in training, documents longer than a row are cut at other places in every epoch.

    Raises ValueError for a row too short for BOS and one token, and unless align divides
    row_length.
    """

    row_length: int
    align: int = 1
    tail: Tail = Tail.FILL
    move_cuts: bool = False

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


class TrainingBatches(Iterator[RowBatch]):
    """Endless `RowBatch`es of the rows of some of `total` lanes, in the order of their numbers."""

    def __init__(self, lanes: dict[int, Iterator[RowBatch]], total: int):
        self._lanes = lanes
        self._total = total

    def __next__(self) -> RowBatch:
        parts = [next(lane) for lane in self._lanes.values()]
        return RowBatch(**{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})

    def get_state(self) -> dict:
        """Where every lane stands: JSON, without any token."""
        lanes = {str(number): lane.get_state() for number, lane in self._lanes.items()}
        return {"total": self._total, "lanes": lanes}

    def set_state(self, state: dict) -> None:
        """Goes to where `state` was taken, of which it needs the lanes that it has.

        Raises ValueError when one of them is missing or the state is of another number of lanes.
        """
        if state["total"] != self._total:
            raise ValueError(
                f"the saved data state has {state['total']} lanes, and this run has {self._total}; "
                f"type data.lanes={state['total']}"
            )
        missing = [str(number) for number in self._lanes if str(number) not in state["lanes"]]
        if missing:
            raise ValueError(
                f"the saved data state lacks the lanes {', '.join(missing)}: merge the states of "
                "all processes"
            )
        for number, lane in self._lanes.items():
            lane.set_state(state["lanes"][str(number)])


def merge_states(states: Iterable[dict]) -> dict:
    """One state of all lanes from those of several processes, which may hold some of them twice.

    Raises ValueError when two of them disagree.
    """
    merged: dict = {}
    for state in states:
        merged = merged or {"total": state["total"], "lanes": {}}
        for name, lane in state["lanes"].items():
            if merged["total"] != state["total"] or merged["lanes"].setdefault(name, lane) != lane:
                raise ValueError(
                    f"the data states of the processes disagree on lane {name} of "
                    f"{state['total']}: they were not saved at one step"
                )
    return merged


def training_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    packing: PackingConfig,
    batch_size: int,
    seed: int,
    rows: Iterable[int] | None = None,
    lanes: int | None = None,
    weights: Sequence[float] = (1.0,),
) -> TrainingBatches:
    """Endless batches of `batch_size` rows, of which this process asks for `rows` (None: all).

    Part p of the documents gets the share weights[p] / sum(weights) of the tokens, without heads
    and filling, and goes through epochs of its own, in every lane: see `bdjax.mixture`. Every epoch
    shuffles all pieces of a part anew. The stream of pieces is dealt to `lanes` (None: the
    largest divisor of batch_size up to 8), and every lane packs its pieces into batch_size / lanes
    neighbouring rows of each batch. Same arguments, same batches, whatever `rows` are: those of
    all processes together are the batch.

    Raises ValueError for an empty corpus or part, a document of a part without a weight, a
    batch_size below 1, a negative seed, lanes that do not divide batch_size, and rows that share
    a lane with rows of other processes.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; type seed=0")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if lanes is None:
        lanes = max(n for n in range(1, _LANES + 1) if batch_size % n == 0)
    if lanes < 1 or batch_size % lanes:
        raise ValueError(
            f"data.lanes={lanes} does not divide data.batch_size={batch_size}; type "
            f"data.lanes={math.gcd(max(lanes, 1), batch_size)}"
        )
    depth = batch_size // lanes
    asked = sorted(set(range(batch_size) if rows is None else rows))
    if not asked or asked[0] < 0 or asked[-1] >= batch_size:
        raise ValueError(f"rows={asked} must be some of 0..{batch_size - 1}")
    own = sorted({row // depth for row in asked})
    if asked != [lane * depth + row for lane in own for row in range(depth)]:
        ends = [row for row in asked if row - 1 not in asked]
        ends += [row + 1 for row in asked if row + 1 not in asked]
        raise ValueError(
            f"data.lanes={lanes} lanes of {depth} rows cannot be dealt to these processes: this "
            f"one holds {len(asked)} of {batch_size} rows; type data.lanes="
            f"{batch_size // math.gcd(depth, *ends)}"
        )
    parts, shares = _parts(documents, tokenizer, packing, seed, weights)
    open_rows = max(4, _OPEN_ROWS // lanes)

    def lane(number: int) -> Iterator[RowBatch]:
        # A document that had no need of its last piece in an epoch leaves it empty.
        dealt = Mixed(parts, shares, first=number, stride=lanes)
        pieces = grain.MapDataset.source(dealt).filter(_holds_tokens)
        # Lanes that pack as many rows at once would all do so in the same step.
        packed = _pack(pieces, packing, open_rows + number, shuffle_seed=seed)
        return iter(_batch(packed, tokenizer, depth))

    return TrainingBatches({number: lane(number) for number in own}, lanes)


def evaluation_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    packing: PackingConfig,
    batch_size: int,
    rows: Iterable[int] | None = None,
) -> Iterator[RowBatch]:
    """Every byte exactly once: read row after row, the batches hold the documents in order.

    Of each batch this process gets `rows` (None: all). The last batch is filled up to `batch_size`
    with empty rows (segment 0 throughout).

    Raises ValueError for an empty corpus and a batch_size below 1.
    """
    fixed = replace(packing, move_cuts=False)
    found = grain.MapDataset.source(_Pieces(documents, tokenizer, fixed))
    # One open row keeps the order, at the price of some padding where a document ends.
    packed = _pack(found, packing, open_rows=1, shuffle_seed=None)
    batches = iter(_batch(packed, tokenizer, batch_size))
    if rows is None:
        return batches
    own = sorted(set(rows))
    return (RowBatch(**{name: x[own] for name, x in batch.items()}) for batch in batches)


def describe_rows(batch: RowBatch, tokenizer: Tokenizer) -> str:
    """One line on the rows of a batch: how full they are, and how many pieces go on after a cut."""
    heads = (batch["segment"] > 0) & (batch["position"] == 0)
    cut = int((heads & (batch["tokens"] == tokenizer.cut_id)).sum())
    if tokenizer.cut_id == tokenizer.bos_id:
        where = "cuts are marked by BOS"
    else:
        where = f"{cut} go on after a cut"
    rows, length = batch["tokens"].shape
    return (
        f"first {rows} rows of {length} tokens: {padding_share([batch]):.1%} padding, "
        f"{int(heads.sum())} pieces, {where}"
    )


def padding_share(batches: Iterable[RowBatch]) -> float:
    """The share of padding (segment 0) among all tokens of `batches`, which must end.

    Raises ValueError when there is no batch.
    """
    counts = [(np.count_nonzero(batch["segment"] == 0), batch["segment"].size) for batch in batches]
    if not counts:
        raise ValueError("padding_share of 0 batches; give at least one")
    padding, total = np.sum(counts, axis=0)
    return float(padding / total)


def _parts(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    packing: PackingConfig,
    seed: int,
    weights: Sequence[float],
) -> tuple[list["_Epochs"], list[Fraction]]:
    """The endless pieces of every part of the documents, and its share of the pieces."""
    if strange := {document.part for document in documents} - set(range(len(weights))):
        raise ValueError(
            f"documents of part {min(strange)} have no weight: weights={tuple(weights)} has "
            f"{len(weights)}; give weights=source.weights()"
        )
    parts = [
        _Pieces([d for d in documents if d.part == part], tokenizer, packing)
        for part in range(len(weights))
    ]
    # Short pieces have to come more often for the same number of tokens.
    shares = [Fraction(w) / p.mean_length() for w, p in zip(weights, parts, strict=True)]
    return [_Epochs(pieces, seed, part) for part, pieces in enumerate(parts)], shares


class _Pieces:
    """Random access to the pieces of tokenised documents: a Grain source.

    A token that is not to be scored, of a chat's prompt, is there as its complement ~id: one array
    to pack. Raises ValueError when no document holds a token, and for a chat's that fits no row.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, packing: PackingConfig):
        # BOS or CUT takes one place of each piece.
        self.room = packing.row_length - 1
        encoded = [ids for ids in _marked_ids(documents, tokenizer, self.room) if ids.size]
        if not encoded:
            raise ValueError(
                f"empty corpus: {len(documents)} documents hold 0 tokens; "
                "give at least one document with text"
            )
        end = np.array([tokenizer.eos_id], np.int32)
        # An answer whose end of turn is EOS has its end.
        ended = [int(ids[-1] == tokenizer.eos_id) for ids in encoded]
        self._tokens = np.concatenate(
            [part for ids, done in zip(encoded, ended, strict=True) for part in (ids, end[done:])]
        )
        self._tokenizer = tokenizer
        self._align = packing.align if packing.tail is Tail.FILL else 1
        sizes = np.array([ids.size + 1 - done for ids, done in zip(encoded, ended, strict=True)])
        self._stops = np.cumsum(sizes)
        self.moves = packing.move_cuts & (sizes > self.room)
        # Cuts that move may need one piece more.
        self._first = np.concatenate([[0], np.cumsum(-(-sizes // self.room) + self.moves)])

    def __len__(self) -> int:
        """With `move_cuts`, places for the pieces of any epoch; else the number of pieces."""
        return int(self._first[-1])

    def __getitem__(self, index: int | np.integer) -> dict[str, Int[np.ndarray, "T"]]:
        return self.piece(int(index), self.room)

    def mean_length(self) -> Fraction:
        """Tokens of a place on average over an epoch, without heads and filling."""
        return Fraction(self._tokens.size, len(self))

    def document(self, place: int) -> int:
        """Which document has this place."""
        return int(np.searchsorted(self._first, place, side="right")) - 1

    def piece(self, place: int, first: int) -> dict[str, Int[np.ndarray, "T"]]:
        """The piece at a place of a document whose first one has `first` tokens; may be empty."""
        number = self.document(place)
        inside = place - int(self._first[number])
        begin = int(self._stops[number - 1]) if number else 0
        start = begin + (first + (inside - 1) * self.room if inside else 0)
        stop = min(begin + first + inside * self.room, int(self._stops[number]))
        if stop <= start:
            return {"tokens": np.zeros(0, np.int32)}
        length = 1 + stop - start
        # Only a last piece ends with EOS, and with more of it up to a block's end.
        filled = -(-length // self._align) * self._align if stop == self._stops[number] else length
        tokens = np.full(filled, self._tokenizer.eos_id, np.int32)
        tokens[0] = self._tokenizer.cut_id if inside else self._tokenizer.bos_id
        tokens[1:length] = self._tokens[start:stop]
        return {"tokens": tokens}


def _marked_ids(
    documents: Sequence[Document], tokenizer: Tokenizer, room: int
) -> Iterator[Int[np.ndarray, "T"]]:
    """Every document's ids; those of a chat's prompt as ~id. A chat has to fit `room` with EOS."""
    for document in documents:
        if document.conversation:
            raise ValueError(
                f"{document.name} is a conversation that is not encoded yet; take the documents of "
                "TrainConfig.documents()"
            )
    texts = iter(tokenizer.encode_all([d.data for d in documents if d.tokens is None]))
    for document in documents:
        if document.tokens is None:
            yield next(texts)
            continue
        prompt, answer = document.tokens
        # EOS is the answer's own last, or one more.
        if prompt.size + answer.size > room - (answer[-1:] != tokenizer.eos_id).sum():
            raise ValueError(
                f"{document.name} has {prompt.size} + {answer.size} tokens, too many for a row of "
                f"{room + 1}; type data.row_length={prompt.size + answer.size + 2}, or leave it out"
            )
        yield np.concatenate([~prompt, answer])


class _Epochs:
    """Endless random access to pieces, in a new order each epoch: a Grain source.

    An entry is a function of (seed, part, index) alone. Grain's own shuffle is not used because its
    cipher walks a large domain: 5 ms per entry where only a handful are shuffled (0.2.18).
    """

    def __init__(self, pieces: _Pieces, seed: int, part: int = 0):
        self._pieces = pieces
        self._seed, self._part = seed, part
        # Only a cache, of two: lanes cross from one epoch to the next at different times.
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        epoch, place = divmod(index, len(self._pieces))
        order, first = self._orders.get(epoch) or self._shuffle(epoch)
        place = int(order[place])
        return self._pieces.piece(place, int(first[self._pieces.document(place)]))

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng([self._seed, epoch, self._part])
        order = generator.permutation(len(self._pieces))
        room, moves = self._pieces.room, self._pieces.moves
        first = np.where(moves, generator.integers(1, room + 1, moves.size), room)
        if len(self._orders) > 1:
            del self._orders[min(self._orders)]
        self._orders[epoch] = order, first
        return order, first


def _holds_tokens(piece: dict[str, Int[np.ndarray, "T"]]) -> bool:
    return piece["tokens"].size > 0


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


def _batch(rows: grain.IterDataset, tokenizer: Tokenizer, batch_size: int) -> grain.IterDataset:
    """Rows -> `RowBatch`es; missing rows of the last batch are empty."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    stack = partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return rows.batch(batch_size, batch_fn=stack).map(partial(_row_batch, tokenizer.eos_id))


def _row_batch(padding_id: int, packed: dict[str, Int[np.ndarray, "B L"]]) -> RowBatch:
    """Grain's names -> ours."""
    segment, position = packed["tokens_segment_ids"], packed["tokens_positions"]
    marked = packed["tokens"]
    return RowBatch(
        tokens=np.where(segment > 0, np.where(marked < 0, ~marked, marked), np.int32(padding_id)),
        segment=segment,
        position=position,
        # Position 0 is BOS, CUT or padding, and nothing else.
        trainable=(position > 0) & (marked >= 0),
    )
