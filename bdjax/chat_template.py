"""Chat templates: a Jinja file that turns messages into text, rendered where it can do no harm.

A template comes with a model that somebody else made. It is rendered by `template_process` in
Jinja's immutable sandbox, in a process with little memory that is ended when it takes too long.
Needs jinja2 (`pip install 'bdjax[hf]'`).
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date as calendar
from functools import cached_property
from pathlib import Path
from typing import Any

from bdjax.messages import BEGIN, END, ConversationError, Message
from bdjax.run_files import keep_file

TEMPLATE_NAME = "chat_template.jinja"

_MEMORY = 512 * 2**20
# A process that starts imports Jinja, from a disk that may be slow.
_START_SECONDS = 60.0
_SECONDS = 10.0


class TemplateError(ConversationError):
    """A template that refuses its messages, fails, or takes more than it may."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The Jinja file by which a model turns messages into text.

    date: the day, ISO, that templates read with `strftime_now` while training: rows must not depend
    on when a run is resumed. `sha256`: that of the file, if only this very file will do. `source`:
    its content where there is no file; `path` then serves messages.

    Raises ValueError for a file that is missing, is not UTF-8 or has another sha256, and for a date
    that is none.
    """

    # Two places of one file are one template: `sha256` decides.
    path: str = field(compare=False)
    sha256: str | None = None
    date: str = "2025-01-01"
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        try:
            calendar.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(
                f"chat_template.date={self.date!r} is no day; type chat_template.date=2025-01-01"
            ) from error
        if self.sha256 not in (None, self._digest):
            raise ValueError(
                f"{self.path} is not the chat template that the config names: its sha256 is "
                f"{self._digest}, expected {self.sha256}; put the file back, or type "
                "chat_template.sha256=none for a new run"
            )

    @cached_property
    def text(self) -> str:
        """The template itself."""
        if self.source is not None:
            return self.source
        try:
            return Path(self.path).read_bytes().decode()
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be read ({error.strerror}); type the path of a Jinja file, "
                "such as a model's chat_template.jinja"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no chat template: it is not UTF-8") from error

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def keep(self, folder: Path, write: bool) -> "ChatTemplate":
        """This template with its `sha256`; if `write`, its file is copied into `folder`.

        Raises ValueError when the folder has another template.
        """
        copy = folder / TEMPLATE_NAME
        keep_file(copy, self.text.encode(), self.path, "chat_template", write)
        path = self.path if self.source is None else str(copy)
        return replace(self, path=path, source=None, sha256=self._digest)

    def renderer(self, *, bos: str, eos: str, date: str | None) -> "Renderer":
        """What renders it, with these texts of BOS and EOS; date: None for today."""
        return Renderer(self.text, bos=bos, eos=eos, date=date, name=self.path)


class Renderer:
    """A template ready to render, in a process of its own; use as a context manager.

    date: what `strftime_now` tells (None: today). seconds: longest time of one call, after which
    the process is ended. Raises TemplateError for a template that is no Jinja, ValueError without
    the library.
    """

    def __init__(
        self,
        text: str,
        *,
        bos: str = "",
        eos: str = "",
        date: str | None = None,
        name: str = "the chat template",
        seconds: float = _SECONDS,
    ):
        self._names = {"bos_token": bos, "eos_token": eos, "date": date}
        self._name = name
        self._seconds = seconds
        self._text = text
        self._process: subprocess.Popen | None = None
        self._read = b""

    def __enter__(self) -> "Renderer":
        self._start()
        return self

    def __exit__(self, *exception) -> None:
        self._end()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of the messages; BEGIN and END enclose generations.

        Raises TemplateError, with what the template says where it refuses them.
        """
        if self._process is None:
            self._start()
        request = self._names | {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._ask(request, self._seconds)

    def _start(self) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise ValueError("a chat template needs jinja2; type pip install 'bdjax[hf]'")
        script = Path(__file__).with_name("template_process.py")
        self._read = b""
        self._process = subprocess.Popen(
            # Isolated: neither the user's environment nor this folder's modules come in.
            [sys.executable, "-I", str(script), str(_MEMORY), str(int(self._seconds) + 10)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C in a terminal is for the chat, not for its template.
            start_new_session=True,
        )
        self._exchange(b"", _START_SECONDS)
        self._ask({"template": self._text, "begin": BEGIN, "end": END}, self._seconds)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process = None

    def _ask(self, request: Any, seconds: float) -> str:
        """One line out, one line in; without an answer the process is ended."""
        try:
            line = self._exchange(json.dumps(request).encode() + b"\n", seconds)
            answer = json.loads(line)
        except TimeoutError as error:
            self._end()
            raise TemplateError(f"{self._name}: it takes more than {seconds:g} seconds") from error
        except (OSError, ValueError) as error:
            self._end()
            raise TemplateError(f"{self._name}: it ended the process that renders it") from error
        except BaseException:
            # Half an answer would be the next one's.
            self._end()
            raise
        if "error" in answer:
            raise TemplateError(f"{self._name}: {answer['error']}")
        return answer["text"]

    def _exchange(self, data: bytes, seconds: float) -> bytes:
        assert self._process is not None
        out, into = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(out, False)
        end = time.monotonic() + seconds
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            readable, writable, _ = select.select([into], [out] if data else [], [], left)
            if writable:
                data = data[os.write(out, data) :]
            if readable:
                found = os.read(into, 2**16)
                if not found:
                    raise OSError("its output has ended")
                self._read += found
        line, _, self._read = self._read.partition(b"\n")
        return line
