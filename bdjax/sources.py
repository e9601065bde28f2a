"""Where a run's documents come from, and how they share rows: the config of the data."""

import math
import random
import zlib
from dataclasses import dataclass

from bdjax import corpus, reading
from bdjax.corpus import Document
from bdjax.data import Tail


@dataclass(frozen=True, kw_only=True)
class Source:
    """Base of the corpora."""

    def documents(self) -> list[Document]:
        """All documents, before the split."""
        raise NotImplementedError

    def weights(self) -> tuple[float, ...]:
        """Each part's share of the training tokens, up to a common factor: one part."""
        return (1.0,)

    @property
    def chats(self) -> bool:
        """Whether some of the documents are conversations, which need a chat template."""
        return False


@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """The running Python's own standard library: the corpus that needs no download."""

    def documents(self) -> list[Document]:
        """Its Python files, without tests and encodings, each content once."""
        return corpus.standard_library()


@dataclass(frozen=True, kw_only=True)
class Sums(Source):
    """Chats with known answers: sums a + b of numbers up to `largest`, `questions` in each chat.

    One sum in `one_in` is held out, by a hash: it is asked where `held_out` is set and nowhere
    else. Every sum of a side opens one chat; what follows is drawn from that side.
    """

    largest: int = 29
    questions: int = 1
    one_in: int = 16
    held_out: bool = False

    def __post_init__(self):
        for name, least, example in (("largest", 9, 29), ("questions", 1, 1), ("one_in", 2, 16)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least {least}; type {name}={example}"
                )

    @property
    def chats(self) -> bool:
        """Yes."""
        return True

    def documents(self) -> list[Document]:
        """The conversations; the same every time."""
        numbers = range(self.largest + 1)
        sums = [
            f"{a} + {b}"
            for a in numbers
            for b in numbers
            if (zlib.crc32(f"{a} + {b}".encode()) % self.one_in == 0) is self.held_out
        ]
        draw = random.Random(0)
        return [corpus.sums([asked, *draw.choices(sums, k=self.questions - 1)]) for asked in sums]


@dataclass(frozen=True, kw_only=True)
class TextFiles(Source):
    """UTF-8 text files, one document each; entries may be globs such as "books/*.txt.gz".

    first, last: take the bytes between these two fractions of each file, in whole characters.
    `TextFiles(paths=p, last=0.9)` and `TextFiles(paths=p, first=0.9)` share a file without overlap.
    """

    paths: tuple[str, ...]
    first: float = 0.0
    last: float = 1.0

    def __post_init__(self):
        if not 0 <= self.first < self.last <= 1:
            raise ValueError(
                f"first={self.first}, last={self.last} must be fractions with 0 <= first < last "
                "<= 1; type first=0.0 last=0.9"
            )

    def documents(self) -> list[Document]:
        """The files' contents; errors name the file."""
        return reading.read_text_files(self.paths, self.first, self.last)


@dataclass(frozen=True, kw_only=True)
class JsonLines(Source):
    """One document per line: the text under `field`; globs, .gz and .zst as for `TextFiles`."""

    paths: tuple[str, ...]
    field: str = "text"

    def documents(self) -> list[Document]:
        """The lines' texts; errors name file and line."""
        return reading.read_json_lines(self.paths, self.field)


@dataclass(frozen=True, kw_only=True)
class ChatLines(Source):
    """Conversations to fine-tune on, one per line of JSON; globs, .gz and .zst as for `TextFiles`.

    A line is {"messages": [{"role": .., "content": ..}, ..]}, with the roles system, user,
    assistant and tool, or {"prompt": .., "response": ..}. The run's chat template turns them into
    text (`TrainConfig.chat_template`). Answers alone are trained: each is a document of its own
    behind everything it answers, as the sampler sees it, and is never cut (`bdjax.chat`).
    """

    paths: tuple[str, ...]

    @property
    def chats(self) -> bool:
        """Yes."""
        return True

    def documents(self) -> list[Document]:
        """The conversations; errors name file and line."""
        return reading.read_conversations(self.paths)


@dataclass(frozen=True, kw_only=True)
class Parquet(Source):
    """One document per row: the text in `column`; paths may be globs. pip install 'bdjax[data]'."""

    paths: tuple[str, ...]
    column: str = "text"

    def documents(self) -> list[Document]:
        """The rows' texts; errors name file and row."""
        return reading.read_parquet(self.paths, self.column)


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A part of a mixture; `weight` is relative to those of the other parts."""

    source: Source
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be above 0; type weight=1.0")
        if isinstance(self.source, Mixture):
            raise ValueError("source=Mixture inside a Mixture; list its parts in the outer one")


@dataclass(frozen=True, kw_only=True)
class Mixture(Source):
    """Several sources; each part's weight is its share of the training tokens.

    A small part is repeated as often as its weight asks for. Evaluation reads every held-out
    document of every part once, so its number does not depend on the weights.
    """

    parts: tuple[Weighted, ...]

    def __post_init__(self):
        if not self.parts:
            raise ValueError("parts is empty; type parts=(Weighted(source=..., weight=1.0), ...)")

    def documents(self) -> list[Document]:
        """The documents of all parts, one part after the other."""
        return [
            document._replace(part=number)
            for number, part in enumerate(self.parts)
            for document in part.source.documents()
        ]

    def weights(self) -> tuple[float, ...]:
        """The parts' weights."""
        return tuple(part.weight for part in self.parts)

    @property
    def chats(self) -> bool:
        """Whether a part has conversations."""
        return any(part.source.chats for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from.

    aligned: documents start on multiples of the run's largest block. tail: what stands between a
    document's end and its block's. held_out: the documents to evaluate on; without it,
    `held_out_fraction` of the source's documents, chosen by content, are kept for that. batch_size:
    rows of a step over all processes. lanes: parts that a batch is made of, each from a stream of
    its own; processes share them, so there must be as many as processes (None: up to 8). move_cuts:
    cut documents longer than a row at other places in every epoch.
    """

    source: Source = StandardLibrary()
    row_length: int = 256
    batch_size: int = 8
    aligned: bool = True
    tail: Tail = Tail.FILL
    held_out: Source | None = None
    held_out_fraction: float = 0.05
    lanes: int | None = None
    move_cuts: bool = True

    def __post_init__(self):
        if self.row_length < 2:
            raise ValueError(
                f"data.row_length={self.row_length} has no room for BOS and a token; type "
                "data.row_length=256"
            )
        if self.batch_size < 1:
            raise ValueError(
                f"data.batch_size={self.batch_size} must be at least 1; type data.batch_size=8"
            )
        if self.lanes is not None and (self.lanes < 1 or self.batch_size % self.lanes):
            raise ValueError(
                f"data.lanes={self.lanes} does not divide data.batch_size={self.batch_size}; type "
                f"data.lanes={math.gcd(max(self.lanes, 1), self.batch_size)}"
            )
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"data.held_out_fraction={self.held_out_fraction} must lie between 0 and 1; type "
                "data.held_out_fraction=0.05"
            )

    @property
    def chats(self) -> bool:
        """Whether conversations are trained or held out, which needs a chat template."""
        return self.source.chats or (self.held_out is not None and self.held_out.chats)

    def documents(self) -> tuple[list[Document], list[Document]]:
        """Training and held-out documents, conversations not encoded yet.

        Raises ValueError when a side is empty, for a mixture a side of one of its parts, and when
        a held-out text is a training text too.
        """
        found = self.source.documents()
        if self.held_out is None:
            parts = range(len(self.source.weights()))
            sides = [
                corpus.split_by_hash([d for d in found if d.part == part], self.held_out_fraction)
                for part in parts
            ]
            train, held_out = zip(*sides, strict=True)
            return [d for side in train for d in side], [d for side in held_out for d in side]
        held_out = self.held_out.documents()
        names = {document.data: document.name for document in found if document.data}
        for document in held_out:
            if document.data in names:
                raise ValueError(
                    f"data.held_out: {document.name} has the same text as the training document "
                    f"{names[document.data]}; leave it out of data.source"
                )
        return found, held_out
