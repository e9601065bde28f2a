"""Conversations -> token ids: one document per answer, which says where its answer begins.

    [system, user, assistant, user, assistant]  ->  [system, user]                   [assistant]
                                                    [system, user, assistant, user]  [assistant]

Each answer is a document of its own, and nothing follows it: what comes next in a conversation
would stand in the block that ends the answer, where a noisy block sees it both ways and the sampler
has nothing yet. Prompt and answer are encoded apart, as they are when the model is asked.

The template's special tokens are control tokens. Those spelled out in a message are plain text:
they get a mark before the template sees them, which breaks them and is taken out again.
"""

import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from bdjax.chat_template import ChatTemplate, Renderer
from bdjax.corpus import Document
from bdjax.messages import BEGIN, BREAK, END, ConversationError, Message
from bdjax.tokenizer import Tokenizer


class Example(NamedTuple):
    """One answer and what it answers, as token ids without BOS."""

    prompt: Int[np.ndarray, "P"]
    answer: Int[np.ndarray, "A"]


class Chat:
    """A tokenizer with a template at work: messages to ids."""

    def __init__(self, tokenizer: Tokenizer, renderer: Renderer):
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._controls = tokenizer.control_tokens()
        # The longest first: one may begin with another.
        spellings = sorted(self._controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._beginnings = {text[:n] for text in spellings for n in range(1, len(text))}
        self._endings = {text[n:] for text in spellings for n in range(1, len(text))}
        self._longest = max(map(len, spellings), default=0)

    def prompt(self, messages: Sequence[Message]) -> Int[np.ndarray, "P"]:
        """The ids of a conversation that the model is to go on with, without the BOS that prompts
        bring along: none where the tokenizer starts without it. There one is the template's own,
        as of SmolLM2, whose BOS begins every turn.

        Raises ConversationError for messages that the template refuses or makes nothing of.
        """
        ids = self._encode(_unmarked(self._render(messages, prompt=True)))
        if not ids.size:
            raise ConversationError(
                "the template writes nothing for these messages; take another, such as the model's "
                "own chat_template.jinja"
            )
        return self._headless(ids) if self._tokenizer.starts_with_bos else ids

    def example(self, messages: Sequence[Message]) -> Example:
        """The last message, the assistant's, as the answer to those before it.

        It ends with the template's end of turn; what the template writes after that is nobody's.
        Raises ConversationError when the template refuses the messages, or writes the same ones
        differently before an answer and with it.
        """
        marked = self._render(messages, prompt=False)
        whole = _unmarked(marked)
        if BEGIN in marked:
            start = len(_unmarked(marked[: marked.rindex(BEGIN)]))
        else:
            before = _unmarked(self._render(messages[:-1], prompt=True))
            if not whole.startswith(before):
                raise ConversationError(
                    "the template writes the messages before an answer in one way with it and in "
                    "another without; enclose the answer in {% generation %} and "
                    "{% endgeneration %} in the template"
                )
            start = len(before)
        ends = [found.end() for found in self._control.finditer(whole, start)]
        stop = ends[-1] if ends and not whole[ends[-1] :].strip() else len(whole)
        prompt = self._headless(self._encode(whole[:start]))
        return Example(prompt, self._encode(whole[start:stop]))

    def end_of_turn(self) -> int | None:
        """The control token with which the template ends an answer, if it has one."""
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        # Not by `example`: where a template opens answers with a thought that it leaves out of old
        # ones, nobody can say where one begins, and it ends all the same.
        whole = _unmarked(self._render(turn, prompt=False))
        ends = list(self._control.finditer(whole))
        if not ends or whole[ends[-1].end() :].strip():
            return None
        return self._controls[ends[-1].group()]

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        """The template's text, in which control tokens are its own."""
        plain = self._renderer.render(messages, add_generation_prompt=prompt)
        broken = [self._broken(message) for message in messages]
        if broken == list(messages):
            return plain
        found = self._renderer.render(broken, add_generation_prompt=prompt)
        if found.replace(BREAK, "") != plain:
            raise ConversationError(
                "a message spells out a special token and the template reads it as one: what it "
                "writes would depend on that; take the token out of the message"
            )
        return found

    def _broken(self, value: Any) -> Any:
        """A message with marks in what spells a special token, or a part of one at its ends."""
        if isinstance(value, dict):
            return {
                name: inner if name == "role" else self._broken(inner)
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [self._broken(inner) for inner in value]
        return self._break(value) if isinstance(value, str) else value

    def _break(self, text: str) -> str:
        body = text.strip()
        if not body or not self._controls:
            return text
        lead = text[: text.index(body)]
        trail = text[len(lead) + len(body) :]
        cuts = {found.start() + 1 for found in self._control.finditer(body)}
        # The template's own text may go on with what a message begins, begin what it ends, and do
        # both around a short one.
        sizes = range(1, min(self._longest, len(body)) + 1)
        cuts |= {len(body) - n + 1 for n in sizes if body[-n:] in self._beginnings}
        cuts |= {n - 1 for n in sizes if body[:n] in self._endings}
        if any(body in text for text in self._controls):
            cuts.add(1)
        places = [0, *sorted(cuts), len(body)]
        pieces = [body[a:b] for a, b in zip(places, places[1:], strict=False)]
        return lead + BREAK.join(pieces) + trail

    def _encode(self, text: str) -> Int[np.ndarray, "T"]:
        """The ids of rendered text: control tokens by their spelling, everything else as text."""
        ids, end = [], 0
        for found in [*self._control.finditer(text), None]:
            piece = text[end : len(text) if found is None else found.start()].replace(BREAK, "")
            if piece:
                ids.append(self._tokenizer.encode(piece))
            if found is not None:
                ids.append(np.array([self._controls[found.group()]], np.int32))
                end = found.end()
        return np.concatenate(ids) if ids else np.zeros(0, np.int32)

    def _headless(self, ids: Int[np.ndarray, "T"]) -> Int[np.ndarray, "P"]:
        """Without the template's BOS, where one is brought along, as rows do."""
        return ids[1:] if ids[:1].tolist() == [self._tokenizer.bos_id] else ids


def _unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def open_template(template: ChatTemplate, tokenizer: Tokenizer, date: str | None) -> Renderer:
    """The template's renderer with the tokenizer's texts of BOS and EOS; date: None for today."""
    bos, eos = (text_of(tokenizer, number) for number in (tokenizer.bos_id, tokenizer.eos_id))
    return template.renderer(bos=bos, eos=eos, date=date)


def text_of(tokenizer: Tokenizer, number: int) -> str:
    """How templates spell a control token; nothing where they cannot."""
    texts = [text for text, other in tokenizer.control_tokens().items() if other == number]
    return texts[0] if texts else ""


def encode_conversations(
    documents: Sequence[Document], template: ChatTemplate, tokenizer: Tokenizer, row_length: int
) -> list[Document]:
    """`documents`, each conversation replaced by one encoded document per answer.

    An answer that fits no row together with all that it answers is left out, and a warning says
    how many were: cutting the prompt would teach answers to questions that nobody asked.

    Raises ConversationError, with file and line, for a conversation without an answer and for one
    that the template refuses; ValueError when no answer fits.
    """
    found: list[Document] = []
    answers, long = 0, []
    with open_template(template, tokenizer, template.date) as renderer:
        chat = Chat(tokenizer, renderer)
        for document in documents:
            if not document.conversation:
                found.append(document)
                continue
            for example in _examples(chat, document):
                answers += 1
                size = 1 + example.prompt.size + example.answer.size
                size += example.answer[-1:].tolist() != [tokenizer.eos_id]
                if size > row_length:
                    long.append(size)
                else:
                    found.append(document._replace(conversation=False, tokens=example))
    if long:
        said = (
            f"{len(long)} of {answers} answers need more than data.row_length={row_length} tokens "
            f"with what they answer, the longest {max(long)}"
        )
        if len(long) == answers:
            raise ValueError(f"{said}; type data.row_length={max(long)} or more")
        warnings.warn(f"{said}: they are left out", stacklevel=2)
    return found


def _examples(chat: Chat, document: Document) -> list[Example]:
    messages = json.loads(document.data)
    ends = [n for n, message in enumerate(messages, 1) if message["role"] == "assistant"]
    if not ends:
        raise ConversationError(
            f"{document.name} has no message of the assistant to learn; leave the line out"
        )
    try:
        return [chat.example(messages[:end]) for end in ends]
    except ConversationError as error:
        raise ConversationError(f"{document.name}: {error}") from error
