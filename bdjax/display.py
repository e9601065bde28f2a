"""A text on the terminal while it is denoised.

Generated text is untrusted: whatever reaches the terminal has passed `clean_text`, and rich never
reads it as markup.
"""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

SLOT = "·"

# Whole sequences first, so that their parameters go with them (ECMA-48): CSI, then the strings
# (OSC, DCS, SOS, PM, APC) up to their end or the line's, then what is left of ESC.
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
# C0 without tab and newline, DEL, C1, and the marks that reorder a line (Unicode UAX 9).
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def clean_text(text: str) -> str:
    """`text` without anything that drives a terminal: control sequences, control characters
    (newline and tab stay) and marks that reverse the writing direction. A lone surrogate, which
    cannot be printed, becomes U+FFFD.
    """
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _SEQUENCES.sub("", text)))


class Denoising:
    """A view of one text: committed tokens, fresh ones highlighted, open slots as dots.

    On a terminal it redraws itself and leaves the finished text behind; elsewhere it prints text
    once, when it is final. Use as a context manager.
    """

    def __init__(self, console: Console | None = None):
        self._console = Console() if console is None else console
        self._prompt = ""
        self._pieces: list[str | None] = []
        self._printed: int | None = None  # pieces printed so far; None before the prompt is
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Denoising":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live is not None:
            self._live.stop()
            if self._pieces or self._prompt:
                self._console.print(self._text(fresh=frozenset()), soft_wrap=True)
        elif self._printed is not None:
            self._print(len(self._pieces))
            self._write("\n")

    def update(
        self, prompt: str, pieces: Sequence[str | None], finished: int | None = None
    ) -> None:
        """Shows `prompt` and one piece of text per slot after it; None is a slot still open.

        `finished`: how many leading pieces will not change again (whole blocks, for a policy that
        takes tokens back); without it, those before the first open slot. Only plain output needs
        to know.
        """
        before = self._pieces
        self._prompt, self._pieces = prompt, list(pieces)
        if self._live is not None:
            fresh = frozenset(
                i
                for i, piece in enumerate(pieces)
                if piece is not None and (i >= len(before) or before[i] is None)
            )
            self._live.update(self._tail(self._text(fresh)), refresh=True)
            return
        if finished is None:
            finished = pieces.index(None) if None in pieces else len(pieces)
        self._print(finished)

    def _text(self, fresh: frozenset[int]) -> Text:
        text = Text(clean_text(self._prompt), style="dim")
        shown = Text(no_wrap=False)
        shown.append_text(text)
        for i, piece in enumerate(self._pieces):
            if piece is None:
                shown.append(SLOT, style="dim")
            else:
                shown.append(clean_text(piece), style="bold green" if i in fresh else "")
        return shown

    def _tail(self, text: Text) -> Text:
        """The last lines that fit the terminal: Live can redraw no more than one screen."""
        lines = text.wrap(self._console, self._console.width)
        return Text("\n").join(lines[-max(1, self._console.height - 1) :])

    def _print(self, finished: int) -> None:
        """Writes the prompt once, and the pieces up to `finished` that are not out yet."""
        if self._printed is None:
            self._write(clean_text(self._prompt))
            self._printed = 0
        for piece in self._pieces[self._printed : finished]:
            self._write(SLOT if piece is None else clean_text(piece))
        self._printed = max(self._printed, finished)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class Reading:
    """A bar of bytes read or written, on a terminal, which goes away at the end; elsewhere nothing.

    Use as a context manager.
    """

    def __init__(self, verb: str = "reading", console: Console | None = None):
        console = Console(stderr=True) if console is None else console
        self._progress = Progress(
            TextColumn(verb),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(verb, total=None, visible=False)

    def __enter__(self) -> "Reading":
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes are through."""
        self._progress.update(self._task, completed=done, total=total, visible=True)
