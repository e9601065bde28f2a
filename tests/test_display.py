"""Text of a model reaches the terminal as text, whatever it holds."""

import io
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bdjax import plots
from bdjax.display import SLOT, Denoising, clean_text

ATTACKS = {
    "\x1b[31mred\x1b[0m": "red",
    "\x1b]0;title\x07after": "after",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x1bPq#0\x1b\\sixel": "sixel",
    "\x9b2Jgone": "gone",
    "\x1b]52;c;Zm9v": "",
    "\x1b]0;open\nnext line": "\nnext line",
    "\x1bc\x1b(0reset": "reset",
    "over\rwrite\x08\x7f": "overwrite",
    "\u202eabc\u2066": "abc",
    "bell\x07": "bell",
    "a\tb\nc": "a\tb\nc",
    "\x1b": "",
    "lone \ud800": "lone \ufffd",
    "[bold]kept[/bold] :smile:": "[bold]kept[/bold] :smile:",
    "日本語 é ␣": "日本語 é ␣",
}


@pytest.mark.parametrize("text", ATTACKS)
def test_clean_text(text):
    assert clean_text(text) == ATTACKS[text]


@given(st.text(alphabet=st.characters() | st.sampled_from("\x1b\x9b\x9d[]0;mJ\\\x07\n\t")))
def test_no_control_character_survives_and_cleaning_twice_is_cleaning_once(text):
    cleaned = clean_text(text)
    assert not {c for c in cleaned if unicodedata.category(c) in ("Cc", "Cs")} - set("\n\t")
    assert clean_text(cleaned) == cleaned
    cleaned.encode("utf-8")


def plain(updates):
    out = io.StringIO()
    with Denoising(Console(file=out, force_terminal=False)) as view:
        for arguments in updates:
            view.update(*arguments)
    return out.getvalue()


def test_plain_output_is_each_piece_once_when_it_is_final():
    assert plain([]) == ""
    assert plain([("P:", ["a", None, "c"]), ("P:", ["a", "b", "c"])]) == "P:abc\n"
    assert plain([("P:", ["x", None], 0), ("P:", ["a", "b"], 2)]) == "P:ab\n"
    assert plain([("P:", ["a", None])]) == f"P:a{SLOT}\n"
    assert plain([("\x1b[2JP[b]", ["\x1b", "[31m", "[/b]"])]) == "P[b][31m[/b]\n"


def terminal(updates, height=6):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=20, height=height, color_system="standard"
    )
    with Denoising(console) as view:
        for arguments in updates:
            view.update(*arguments)
    return out.getvalue()


def test_the_live_view_marks_fresh_tokens_and_open_slots():
    out = terminal([("P:", ["a", None]), ("P:", ["a", "b"])])
    assert "\x1b[1;32ma" in out and "\x1b[2m·" in out and "\x1b[1;32mb" in out
    final = out[out.rindex("P:") :]
    assert "\x1b[1;32m" not in final and re.sub(r"\x1b\[[0-9;?]*\w", "", final) == "P:ab\n"


def test_the_live_view_lets_no_escape_of_the_text_through():
    quiet = terminal([("P:", ["X", "Y"])])
    loud = terminal([("P:", ["\x1b[2J\x1b]0;t\x07X", "\x9b1mY\r"])])
    assert loud == quiet
    assert "[red]" in terminal([("", ["[red]"])])


def test_a_long_text_shows_its_end():
    lines = [f"line{i}\n" for i in range(50)]
    out = terminal([("", lines)], height=6)
    live, final = out[: out.index("line49")], out[out.index("line49") + 6 :]
    assert "line46" in live and "line40" not in live
    assert "line0\n" in final and "line49" in final


def test_curves_are_drawn_also_when_one_leaves_the_picture(tmp_path):
    lines = {"up": ([1, 2, 3], [2.0, 1.0, 9.0]), "down": ([1, 2, 3], [3.0, 2.0, 1.5])}
    plots.curves(lines, tmp_path / "c.png", across="step", up="nats", line=(1.2, "there"))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no curve"):
        plots.curves({}, tmp_path / "d.png", across="step", up="nats")
