"""The messages of a conversation: what is read from files and terminals, checked."""

import json
from typing import Any

ROLES = ("system", "user", "assistant", "tool")

# Noncharacters of Unicode, which no text needs: they mark places in what a template writes. BREAK
# stands inside the spelling of a special token that is no such token, BEGIN and END around what
# `{% generation %}` encloses.
BREAK, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"

Message = dict[str, Any]


class ConversationError(ValueError):
    """Messages that are none, or that a template refuses; the text says which and why."""


def read_messages(record: object) -> list[Message]:
    """The messages of one JSON object: {"messages": [..]}, or {"prompt": .., "response": ..}.

    Raises ConversationError for any other shape, an unknown role, or content that is no text.
    """
    if not isinstance(record, dict):
        raise ConversationError(
            f"it is a {type(record).__name__}; expected an object with messages"
        )
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "response" in record:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
    else:
        raise ConversationError(
            "it has neither messages nor prompt and response; it has "
            f"{', '.join(map(str, record)) or 'nothing'}"
        )
    check_messages(messages)
    return messages


def check_messages(messages: object) -> None:
    """Refuses what is no list of messages with a known role and a text each.

    Raises ConversationError, with the message's number from 1.
    """
    if not isinstance(messages, list) or not messages:
        raise ConversationError(
            'messages must be a list such as [{"role": "user", "content": "Hi"}]'
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ConversationError(
                f"message {number} is a {type(message).__name__}; expected an object"
            )
        role = message.get("role")
        if role not in ROLES:
            raise ConversationError(
                f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)}"
            )
        content = message.get("content")
        calls = content is None and bool(message.get("tool_calls"))
        if not (isinstance(content, str) or calls):
            raise ConversationError(
                f"message {number} ({role}) has {type(content).__name__} as its content; expected "
                "a string"
            )
        for mark in (BREAK, BEGIN, END):
            if mark in json.dumps(message, ensure_ascii=False):
                raise ConversationError(
                    f"message {number} holds the noncharacter U+{ord(mark):04X}; take it out"
                )
