"""Renders one chat template, as a process of its own: memory and time of a template end with it.

Run by `bdjax.chat_template` as a script, with the bytes of memory that it may take and the seconds
after which it ends by itself if nobody is left to end it. It opens no file once it is ready. It
reads JSON lines: {"template", "begin", "end"} first, then requests; each is answered by
{"text": ..} or {"error": ..}, after an empty line that says it is ready. It imports nothing of
bdjax: importing JAX would cost every start seconds.
"""

import codecs
import json
import pprint  # noqa: F401
import resource
import signal
import sys
import textwrap  # noqa: F401
import time
import unicodedata  # noqa: F401
from datetime import datetime
from typing import Any

import jinja2
import jinja2.debug
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_CHARACTERS = 2**23
# Those of input, output and messages, which are open: none can be opened beside them.
_FILES = 3


class Generation(Extension):
    """`{% generation %} .. {% endgeneration %}`: what it encloses, between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body in a scope of its own, as Hugging Face's tag has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = (self.environment.begin, self.environment.end)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in marks)
        return nodes.Scope([begin, *body, end]).set_lineno(line)


def raise_exception(message: object) -> None:
    """What a template calls for messages that it does not take."""
    raise jinja2.TemplateError(str(message))


def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON that is not escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def environment(begin: str, end: str) -> ImmutableSandboxedEnvironment:
    """The sandbox, set up as chat templates expect it; begin, end: around a generation."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.extend(begin=begin, end=end)
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    # Its only use is to fill pages.
    del made.globals["lipsum"]
    return made


def render(template: jinja2.Template, request: dict[str, Any]) -> dict[str, str]:
    """The answer to one request: the names a template may use, and `date` (ISO; null: today)."""
    date = request.pop("date")
    day = datetime.now() if date is None else datetime.fromisoformat(date)
    pieces, size = [], 0
    try:
        for piece in template.generate(**request, strftime_now=day.strftime):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_CHARACTERS:
                return {"error": f"it writes more than {MOST_CHARACTERS} characters"}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except Exception as error:
        # Whatever a template does wrong: its own errors, and Python's inside its expressions.
        return {"error": str(error) or type(error).__name__}
    return {"text": "".join(pieces)}


def confine(memory: int) -> None:
    """From here on: no more than `memory` bytes, and no file can be opened.

    What Jinja and Python would read later, for filters, string literals and errors, is read before.
    """
    codecs.lookup("unicode_escape")
    time.tzset()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))


def main() -> None:
    """Answers line by line until the input ends."""
    seconds = int(sys.argv[2])
    confine(int(sys.argv[1]))
    # All of Jinja is here: time is the template's from now on.
    print(flush=True)
    signal.alarm(seconds)
    try:
        given = json.loads(sys.stdin.readline())
        template = environment(given["begin"], given["end"]).from_string(given["template"])
        answer = {"text": ""}
    except jinja2.TemplateSyntaxError as error:
        template, answer = None, {"error": f"line {error.lineno}: {error.message}"}
    except (MemoryError, RecursionError) as error:
        template, answer = None, {"error": f"it cannot be read ({type(error).__name__})"}
    print(json.dumps(answer), flush=True)
    signal.alarm(0)
    if template is not None:
        for line in sys.stdin:
            signal.alarm(seconds)
            print(json.dumps(render(template, json.loads(line))), flush=True)
            signal.alarm(0)


if __name__ == "__main__":
    main()
