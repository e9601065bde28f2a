"""A conversation streams what is committed and keeps what was said; files are answered in rows."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from chat_cases import LETTERS
from test_trainer import texts, tiny_config

import bdjax
from bdjax.asking import Conversation, answer, committed, converse, read_questions
from bdjax.chat_template import ChatTemplate
from bdjax.cli import main
from bdjax.generation import Snapshot
from bdjax.messages import ConversationError

OPTIONS = {"max_new_tokens": 12, "temperature": 0.0, "max_length": 64}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs of one step: "chat" with a template, "plain" without."""
    folder = tmp_path_factory.mktemp("asking")
    (folder / "letters.jinja").write_text(LETTERS, encoding="utf-8")
    config = tiny_config(texts(folder / "texts"), steps=1)
    template = ChatTemplate(path=str(folder / "letters.jinja"))
    bdjax.train(replace(config, chat_template=template), folder / "chat", say=lambda text: None)
    # The run keeps a copy.
    (folder / "letters.jinja").rename(folder / "elsewhere.jinja")
    bdjax.save(
        replace(bdjax.load(folder / "chat"), config=config),
        folder / "plain",
    )
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    return bdjax.load(home / "chat")


class Terminal:
    """Scripted input, None for Ctrl-C; `stop_at` interrupts while an answer is written."""

    def __init__(self, *lines, stop_at=None):
        self.lines, self.stop_at, self.out = list(lines), stop_at, []

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is None:
            raise KeyboardInterrupt
        return line

    def write(self, text):
        self.out.append(text)
        if text and self.stop_at is not None and not text.startswith(("\n", "[")):
            self.stop_at = None
            raise KeyboardInterrupt


def talk(loaded, *lines, **more):
    terminal = Terminal(*lines, stop_at=more.pop("stop_at", None))
    converse(loaded, read=terminal.read, write=terminal.write, **OPTIONS | more)
    return terminal


def test_what_is_shown_grows_to_the_answer_and_joins_the_conversation(loaded):
    shown = []
    with Conversation(loaded, **OPTIONS) as conversation:
        assert conversation.ask("Hi", shown.append) == 0
        assert all(b.startswith(a) for a, b in zip(shown, shown[1:], strict=False))
        first = conversation.messages
        assert [m["role"] for m in first] == ["user", "assistant"]
        assert shown[-1] == first[1]["content"]
        conversation.ask("and?")
        assert conversation.messages[:2] == first and len(conversation.messages) == 4
    # The same as asking once, with what was said.
    (once,) = answer(loaded, [conversation.messages[:3]], **OPTIONS)
    assert once.text == conversation.messages[3]["content"]


def test_a_conversation_that_is_too_long_forgets_its_oldest_turns(loaded):
    with Conversation(loaded, **OPTIONS) as conversation:
        with pytest.raises(ValueError, match="and with the answer 64 are the most; say less"):
            conversation.ask("x" * 60)
        assert conversation.messages == []
        conversation.ask("a" * 30)
        assert conversation.ask("b" * 30) == 2
        assert [m["content"][:1] for m in conversation.messages[::2]] == ["b"]


def test_a_model_that_writes_a_text_as_one_block_can_be_talked_to(loaded, monkeypatch):
    # As LLaDA and Dream, whose block is as long as a row.
    length = loaded.config.data.row_length
    asked = []

    def answered(model, prompts, **options):
        asked.extend(prompts)
        return [SimpleNamespace(text="yes")]

    monkeypatch.setattr("bdjax.asking.generate", answered)
    with Conversation(loaded, block_size=length) as conversation:
        conversation.ask("Hi")
        assert len(asked) == 1 and conversation.messages[-1]["content"] == "yes"
        with pytest.raises(ValueError, match="say less, or type --max-length (.*)") as raised:
            conversation.ask("x" * length)
    # What is to be typed is enough.
    typed = int(str(raised.value).split()[-1])
    with Conversation(loaded, block_size=length, max_length=typed) as conversation:
        conversation.ask("x" * length)


def test_interrupts_end_the_answer_and_then_the_program(loaded):
    stopped = talk(loaded, "Hi", None, "never read", stop_at=1)
    assert "\n[stopped]\n" in stopped.out and stopped.lines == ["never read"]
    twice = talk(loaded, None, None, "never read")
    assert "Ctrl-C once more" in "".join(twice.out) and twice.lines == ["never read"]
    again = talk(loaded, None, "   ", "Hi", None, "x" * 60)
    assert not again.lines and "say less" in "".join(again.out)


def test_the_terminal_is_safe(loaded, monkeypatch):
    evil = "\x1b]0;title\x07\x1b[2Jtext"
    monkeypatch.setattr(Conversation, "ask", lambda self, text, show: show(evil) or 0)
    assert "".join(talk(loaded, "Hi").out) == "text\n\n"


def test_committed_are_whole_blocks_up_to_a_stop():
    def seen(filled, stop=(9,)):
        tokens = np.array([[1, 2, 3, 4, 5, 9, 7, 8]], np.int32)
        mask = np.array([[c == "x" for c in filled]])
        found = Snapshot(tokens, mask, np.array([8]), np.array([2]))
        return committed(found, 4, stop).tolist()

    assert seen("xx------") == seen("xxx-----") == seen("xx-x----") == []
    assert seen("xxxx----") == seen("xxxx-xxx") == [3, 4]
    assert seen("xxxxxxxx") == [3, 4, 5]
    assert seen("xxxxxxxx", ()) == [3, 4, 5, 9, 7, 8]


def test_files_of_prompts(tmp_path):
    def read(name, text):
        (tmp_path / name).write_bytes(text)
        return read_questions(tmp_path / name)

    assert read("a.txt", b"one\n\n  two\n{\n") == ["one", "  two", "{"]
    talked = {"messages": [{"role": "user", "content": "x"}]}
    lines = "\n".join(map(json.dumps, ["a", {"prompt": "b"}, talked])).encode()
    assert read("a.jsonl", lines) == ["a", "b", talked["messages"]]
    assert read("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\n") == ["one", "two"]
    assert read("a.jsonl", b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))[1] == "b"
    for text, message in (
        (b"[1]", r"a.jsonl, line 1: expected a string, {\"prompt\""),
        (b'"a"\n{', "a.jsonl, line 2 is no JSON"),
        (rb'"a\ud800"', "a.jsonl, line 1 has a lone surrogate"),
        (rb'{"messages": [{"role": "user", "content": "\udfff"}]}', "line 1 has a lone surrogate"),
        (b'{"messages": [{"role": "bot"}]}', "line 1: message 1 has the role 'bot'"),
        (b"\n \n", "a.jsonl holds no prompt; write one a line"),
        (b"\xff", "a.jsonl is not UTF-8"),
    ):
        with pytest.raises(ConversationError, match=message):
            read("a.jsonl", text)
    for place in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConversationError, match="(no file|cannot be read).*; type --prompts"):
            read_questions(place)


def test_a_prompt_that_does_not_fit_is_told_before_any_is_answered(loaded):
    questions = ["a"] * 9 + ["x" * 99]
    with pytest.raises(ValueError, match="prompt 9 has 100 tokens with BOS"):
        next(answer(loaded, questions, rows=2, **OPTIONS))


@pytest.mark.slow
def test_rows_at_a_time_change_nothing(loaded):
    questions = ["the", [{"role": "user", "content": "Hi"}], "cat", "a"]
    whole = [x.tokens.tolist() for x in answer(loaded, questions, rows=4, **OPTIONS)]
    parts = [x.tokens.tolist() for x in answer(loaded, questions, rows=3, **OPTIONS)]
    assert whole == parts
    with pytest.raises(ValueError, match="rows=0 must be at least 1; type --rows 8"):
        next(answer(loaded, questions, rows=0))


def test_the_command_line(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (home / "p.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + '\n"the"\n'
    )
    sampled = "--tokens 12 --temperature 0 --max-length 64"
    assert main(f"sample chat --prompts p.jsonl --json {sampled}".split()) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1]["prompt"] == "the" and rows[0]["prompt"][0]["content"] == "Hi"
    lines = iter(["Hi"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _end())
    assert main(f"sample chat --chat {sampled}".split()) == 0
    assert rows[0]["text"] in capsys.readouterr().out
    for flags in ("--chat", "--prompts p.jsonl"):
        assert main(f"sample plain {flags}".split()) == 1
        said = capsys.readouterr().err
        assert "has no chat template" in said and "type --chat-template" in said
    assert main(f"sample chat --prompts p.jsonl {sampled}".split()) == 0
    assert f"{rows[0]['text']}\n\nthe{rows[1]['text']}" in capsys.readouterr().out
    # A template laid beside the tokenizer is the run's own.
    assert bdjax.load("plain").config.chat_template is None
    (home / "plain" / "chat_template.jinja").write_text(LETTERS, encoding="utf-8")
    assert bdjax.load("plain").config.chat_template.text == LETTERS
    (home / "plain" / "chat_template.jinja").unlink()
    assert main(["sample", "chat", "--chat", "--prompt", "Hi"]) == 1
    assert "--chat and --prompts go without --prompt" in capsys.readouterr().err
    found = main(f"sample plain --chat --chat-template elsewhere.jinja {sampled}".split())
    assert found == 0


def _end():
    raise EOFError


def test_an_unknown_role_is_exit_code_2_and_leaves_nothing_behind(home, tmp_path, capsys):
    record = {"messages": [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]}
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(record))
    (tmp_path / "config.py").write_text(
        "from dataclasses import replace\n"
        "import bdjax\n"
        "def get_config(start):\n"
        f"    chats = bdjax.ChatLines(paths=({str(file)!r},))\n"
        "    return replace(start, data=replace(start.data, source=chats))\n"
    )
    run = tmp_path / "run"
    start = ["--start", str(home / "chat"), "--run", str(run)]
    for words in (
        ["train", str(tmp_path / "config.py"), *start],
        ["sample", str(home / "chat"), "--prompts", str(file)],
    ):
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.strip().splitlines()) == 1
        assert "chats.jsonl, line 1: message 2 has the role 'bot'; expected one of" in said.err
    assert not run.exists()
