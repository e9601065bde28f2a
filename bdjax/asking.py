"""Asking a model: a conversation in the terminal, and many prompts from a file.

What people and files say goes through the model's chat template (`bdjax.chat`); what the model says
is streamed block by block, as it is committed, and passes `clean_text` first.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from jaxtyping import Int

from bdjax.chat import Chat, open_template
from bdjax.chat_template import ChatTemplate, Renderer
from bdjax.display import clean_text
from bdjax.generation import Generation, LanguageModel, Snapshot, generate, prompt_ids
from bdjax.messages import ConversationError, Message, check_messages
from bdjax.tokenizer import Tokenizer

Question = str | list[Message]


class Conversation:
    """A model, its chat template at work, and the messages so far; use as a context manager.

    template: a Jinja file in place of the run's own. max_length: of prompt and answer together, by
    default the training rows' length. `options` are those of `generate`.

    Raises ValueError where the run has no template and none is given.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        template: str | Path | None = None,
        max_length: int | None = None,
        **options,
    ):
        config = language_model.config
        self._model = language_model
        self._length = config.data.row_length if max_length is None else max_length
        self._options = options
        self._size = config.block_size(options.get("block_size"))
        self._renderer = _renderer(language_model, template)
        self._chat = Chat(config.tokenizer, self._renderer)
        self.messages: list[Message] = []

    def __enter__(self) -> "Conversation":
        self._renderer.__enter__()
        self._stop = _stops(self._chat, self._model.config.tokenizer)
        return self

    def __exit__(self, *exception) -> None:
        self._renderer.__exit__(*exception)

    def ask(self, text: str, show: Callable[[str], None] = lambda text: None) -> int:
        """Answers `text`, which joins the messages with its answer; how many old ones had to go.

        show: called with all that is committed so far, whenever there is more; an interrupt there
        leaves that much as the answer. Raises ValueError, and forgets `text`, when it does not fit.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        check_messages(asked)
        ids, kept = self._fitting(asked)
        shown = ""

        def watch(snapshot: Snapshot) -> None:
            nonlocal shown
            tokens = committed(snapshot, self._size, self._stop)
            found = self._model.config.tokenizer.decode(tokens).rstrip("\ufffd")
            if len(found) > len(shown):
                shown = found
                show(shown)

        try:
            (answer,) = generate(
                self._model,
                [ids.tolist()],
                max_length=self._length,
                stop=self._stop,
                watch=watch,
                **self._options,
            )
        except KeyboardInterrupt:
            self.messages = [*kept, {"role": "assistant", "content": shown}]
            raise
        self.messages = [*kept, {"role": "assistant", "content": answer.text}]
        show(answer.text)
        return len(asked) - len(kept)

    def _fitting(self, messages: list[Message]) -> tuple[Int[np.ndarray, "P"], list[Message]]:
        """The prompt's ids, and the messages in it: without the oldest ones if it must be."""
        kept = list(messages)
        # BOS, and one block to answer in. Where a text is one block, as long as a row, half of it.
        room = 1 + min(self._size, self._length // 2)
        while True:
            ids = self._chat.prompt(kept)
            if ids.size + room <= self._length:
                return ids, kept
            first = 1 if kept[0]["role"] == "system" else 0
            if len(kept) - first < 3:
                raise ValueError(
                    f"that is {ids.size} tokens, and with the answer {self._length} are the most; "
                    f"say less, or type --max-length {2 * ids.size + 2}"
                )
            del kept[first : first + 2]


def converse(
    language_model: LanguageModel,
    *,
    read: Callable[[str], str] = lambda prompt: input(prompt),
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    **options,
) -> None:
    """A conversation in the terminal, until end of input or a second Ctrl-C.

    Ctrl-C ends an answer, which stays as far as it came. `options` are those of `Conversation`.
    Raises ValueError as it does.
    """
    ending = False
    with Conversation(language_model, **options) as conversation:
        while True:
            try:
                text = read("> ")
            except EOFError:
                break
            except KeyboardInterrupt:
                if ending:
                    break
                ending = True
                write("\n[Ctrl-C once more, or Ctrl-D, to leave]\n")
                continue
            if not text.strip():
                continue
            ending, out = False, ""

            def show(found: str) -> None:
                nonlocal out
                clean = clean_text(found)
                # What is out stays: a control sequence that was cut in two may have changed.
                write(clean[len(out) :])
                out = max(out, clean, key=len)

            try:
                gone = conversation.ask(text, show)
                note = f"\n[the oldest {gone} messages no longer fit]\n" if gone else "\n"
            except KeyboardInterrupt:
                ending, note = True, "\n[stopped]\n"
            except ValueError as error:
                note = f"[{clean_text(str(error))}]\n"
            write(note)
    write("\n")


def read_questions(path: str | Path) -> list[Question]:
    """Prompts from a file, one a line: text, or, if its name ends in .jsonl, JSON.

    A JSON line is a string, {"prompt": ..} or {"messages": ..}; lines of white space alone are
    passed over. Raises ConversationError, with file and line, for a line that is none of these and
    for a text that UTF-8 cannot hold; and for a file without a prompt or that cannot be read.
    """
    path = Path(path)
    try:
        # A byte order mark and the carriage returns of other systems are no text.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ConversationError(
            f"there is no file {path}; type --prompts with a file that has a prompt a line"
        ) from error
    except OSError as error:
        raise ConversationError(
            f"{path} cannot be read ({error.strerror}); type --prompts with a file that has a "
            "prompt a line"
        ) from error
    except UnicodeDecodeError as error:
        raise ConversationError(
            f"{path} is not UTF-8 (byte {error.start}); re-encode it, for example iconv -f LATIN1 "
            f"-t UTF-8 {path}"
        ) from error
    found: list[Question] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if line.strip():
            try:
                question = line
                if path.suffix == ".jsonl":
                    question = _question(json.loads(line))
                json.dumps(question, ensure_ascii=False).encode()
                found.append(question)
            except ConversationError as error:
                raise ConversationError(f"{path}, line {number}: {error}") from error
            except UnicodeEncodeError as error:
                raise ConversationError(
                    f"{path}, line {number} has a lone surrogate, which no UTF-8 can hold; leave "
                    "the line out"
                ) from error
            except (ValueError, RecursionError) as error:
                raise ConversationError(
                    f"{path}, line {number} is no JSON ({error}); expected a string, "
                    '{"prompt": ..} or {"messages": ..}'
                ) from error
    if not found:
        raise ConversationError(f"{path} holds no prompt; write one a line")
    return found


def answer(
    language_model: LanguageModel,
    questions: Sequence[Question],
    *,
    rows: int = 8,
    template: str | Path | None = None,
    **options,
) -> Iterator[Generation]:
    """One generation per question, in order, `rows` of them at a time.

    Messages are written by the run's chat template, or by the Jinja file `template`, and answered
    up to the end of turn; a text is gone on with. `options` are those of `generate`. Raises
    ValueError for fewer rows than one, and as `generate` does: for any prompt before the first one
    is answered.
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1; type --rows 8")
    prompts: list[str | list[int]] = []
    with ExitStack() as stack:
        chat = None
        for question in questions:
            if isinstance(question, str):
                prompts.append(question)
                continue
            if chat is None:
                renderer = stack.enter_context(_renderer(language_model, template))
                chat = Chat(language_model.config.tokenizer, renderer)
                options["stop"] = _stops(chat, language_model.config.tokenizer)
            prompts.append(chat.prompt(question).tolist())
    checked = prompt_ids(language_model, prompts, options.get("max_length"))
    for first in range(0, len(prompts), rows):
        yield from generate(language_model, checked[first : first + rows], **options)


def committed(snapshot: Snapshot, size: int, stop: Sequence[int]) -> Int[np.ndarray, "T"]:
    """Row 0's tokens after its prompt in blocks of `size` that are whole, up to a stop token."""
    begin, limit = int(snapshot.prompt[0]), int(snapshot.limit[0])
    open_slots = np.flatnonzero(~snapshot.filled[0, begin:limit])
    end = limit if not len(open_slots) else (begin + int(open_slots[0])) // size * size
    tokens = snapshot.tokens[0, begin : max(begin, end)]
    stops = np.flatnonzero(np.isin(tokens, stop))
    return tokens[: stops[0]] if len(stops) else tokens


def _question(record: object) -> Question:
    if isinstance(record, str):
        return record
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return record["prompt"]
    if isinstance(record, dict) and "messages" in record:
        check_messages(record["messages"])
        return record["messages"]
    raise ConversationError('expected a string, {"prompt": ..} or {"messages": ..}')


def _renderer(language_model: LanguageModel, template: str | Path | None) -> Renderer:
    config = language_model.config
    found = config.chat_template if template is None else ChatTemplate(path=str(template))
    if found is None:
        raise ValueError(
            f"the model {config.name} has no chat template, so nobody knows how it is spoken to; "
            "type --chat-template with a Jinja file, such as a model's chat_template.jinja"
        )
    return open_template(found, config.tokenizer, None)


def _stops(chat: Chat, tokenizer: Tokenizer) -> list[int]:
    """EOS, and the template's end of turn."""
    end = chat.end_of_turn()
    return [tokenizer.eos_id] if end in (None, tokenizer.eos_id) else [tokenizer.eos_id, end]
