"""Chats: what a template writes, which tokens are the answer, and what a template cannot do."""

import json
import re
import resource
import warnings
from dataclasses import replace
from datetime import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from chat_cases import LETTERS, MODELS, TALKS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_trainer import tiny_config

import bdjax
from bdjax import presets
from bdjax.chat import Chat, encode_conversations
from bdjax.chat_template import TEMPLATE_NAME, ChatTemplate, Renderer, TemplateError
from bdjax.config import config_from_json
from bdjax.corpus import Document
from bdjax.data import PackingConfig, Tail, evaluation_batches
from bdjax.embedding import TokenEmbedding
from bdjax.loss import row_losses, token_losses, total
from bdjax.messages import BEGIN, END, ConversationError, read_messages
from bdjax.objective import Batch, training_row
from bdjax.overrides import to_json
from bdjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
HI = [{"role": "user", "content": "Hi"}]


def renderer(text, **options):
    return Renderer(text, bos="<|bos|>", eos="<|eos|>", **options)


@pytest.fixture(scope="module")
def chat():
    with renderer(LETTERS) as started:
        yield Chat(TOKENIZER, started)


def turns(*contents):
    return [
        {"role": ("user", "assistant")[n % 2], "content": content}
        for n, content in enumerate(contents)
    ]


def text(ids):
    """Bytes as they are, specials by their spelling."""
    names = {number: name for name, number in TOKENIZER.control_tokens().items()}
    return "".join(names.get(i) or chr(i) for i in ids.tolist())


def test_an_answer_goes_from_the_prompt_to_its_end_of_turn(chat):
    # The template trims messages and writes a newline after each end of turn.
    talk = turns("1+1?", " 2 ", "and 3?", "5", "thanks")
    first, second = chat.example(talk[:2]), chat.example(talk[:4])
    assert text(first.prompt) == "U: 1+1?\nA: " and text(first.answer) == "2<|eos|>"
    assert text(second.prompt) == "U: 1+1?\nA: 2<|eos|>\nU: and 3?\nA: "
    assert text(second.answer) == "5<|eos|>"
    # What the model is asked is what it was trained on.
    np.testing.assert_array_equal(chat.prompt(talk[:3]), second.prompt)
    assert chat.end_of_turn() == EOS


@pytest.mark.parametrize("leads", [True, False])
def test_a_prompt_has_the_bos_that_its_template_writes_once(tmp_path, leads):
    # SmolLM2's BOS is the token that begins every turn, and its prompts bring none along.
    tokenizer = replace(with_turns(tmp_path), bos="<|im_start|>", leads=leads)
    with renderer(MODELS["chatml"]) as started:
        chat = Chat(tokenizer, started)
        talk = turns("Hi", "you")
        ids = chat.prompt(talk[:1])
        # Rows have their BOS whatever prompts do.
        row = [tokenizer.bos_id, *chat.example(talk).prompt.tolist()]
    wanted = tokenizer.encode_with_specials(started.render(talk[:1], add_generation_prompt=True))
    started.__exit__()
    assert wanted[0] == tokenizer.bos_id
    brought = [tokenizer.bos_id] if leads else []
    assert brought + ids.tolist() == row == wanted.tolist()


def test_a_turn_ends_even_where_nobody_can_say_where_its_answer_begins():
    # As templates of models that think: a thought is opened for them, and left out of what was.
    thinks = LETTERS.replace("A: {% endif", "A: <think>{% endif")
    with renderer(thinks) as started:
        chat = Chat(TOKENIZER, started)
        with pytest.raises(ValueError, match="in one way with it"):
            chat.example(turns("a", "b"))
        assert chat.end_of_turn() == EOS
    with renderer("{% for m in messages %}{{ eos_token }}{{ m.content }}{% endfor %}") as started:
        assert Chat(TOKENIZER, started).end_of_turn() is None


def test_a_template_that_writes_nothing_is_refused():
    with renderer("{# #}") as started, pytest.raises(ValueError, match="writes nothing"):
        Chat(TOKENIZER, started).prompt(HI)


# Whole specials, and halves that the template or the next message could complete.
spelled = st.lists(
    st.sampled_from(["<|eos|>", "<|bos|>", "<|eo", "s|>", "<", "|", ">", "eos", "a", " ", "\n"])
).map("".join)


wraps = st.sampled_from(["{T}", "<|{T}|>", "<{T}os|>", "<|e{T}", "{T}s|>"])


@settings(deadline=None, max_examples=150)
@given(st.lists(spelled, min_size=2, max_size=6), wraps)
@example([" eos", "a"], "<|{T}|>")
@example(["<|eo ", "a"], "{T}s|>")
@example(["a", "os|> a"], "<|e{T}")
def test_messages_never_become_control_tokens(chat, contents, around):
    tight = _TIGHT.setdefault(around, renderer(_around(around)))
    for one, count in ((chat, 1), (Chat(TOKENIZER, tight), 0)):
        talk = turns(*contents[: len(contents) // 2 * 2])
        found = one.example(talk)
        ids = np.concatenate([found.prompt, found.answer])
        ends = count * sum(message["role"] == "assistant" for message in talk)
        assert (ids == EOS).sum() == ends and not (ids == BOS).any()


_TIGHT: dict = {}


def _around(wrap):
    """A template that writes messages with nothing but a piece of a special token around them."""
    before, _, after = wrap.partition("{T}")
    return "{% for m in messages %}" + before + "{{ m.content | trim }}" + after + "{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def _stop():
    yield
    for one in _TIGHT.values():
        one.__exit__()


def test_a_message_is_plain_text_wherever_the_template_puts_it(chat):
    talk = turns("say <|eos|>", "<|bos|> or <|eos|>")
    found = chat.example(talk)
    assert TOKENIZER.decode(found.prompt) == "U: say <|eos|>\nA: "
    assert TOKENIZER.decode(found.answer) == "<|bos|> or <|eos|>"
    assert (found.answer == EOS).sum() == 1 and found.answer[-1] == EOS


def test_templates_that_read_special_tokens_in_messages_are_found_out():
    reads = "{% for m in messages %}{{ m.content.split('<|eos|>')[0] }}{% endfor %}"
    with renderer(reads) as started, pytest.raises(ValueError, match="spells out a special token"):
        Chat(TOKENIZER, started).prompt(turns("a<|eos|>b"))


def test_generation_marks_say_where_an_answer_begins():
    # A template that writes the last answer unlike the others, as those that think do.
    thinks = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% if loop.last %} (think) "
        "{% endif %}{GEN}{{ m.content }}{{ eos_token }}{END}{{ '\\n' }}{% else %}U: "
        "{{ m.content }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A:(now){% endif %}"
    )
    plain = thinks.replace("{GEN}", "").replace("{END}", "")
    with renderer(plain) as one, pytest.raises(ValueError, match="enclose the answer in {% gener"):
        Chat(TOKENIZER, one).example(turns("a", "b"))
    marked = thinks.replace("{GEN}", "{% generation %}").replace("{END}", "{% endgeneration %}")
    with renderer(marked) as two:
        found = Chat(TOKENIZER, two).example(turns("a", "b", "c", "d"))
    assert text(found.prompt) == "U: a\nA:b<|eos|>\nU: c\nA: (think) "
    assert text(found.answer) == "d<|eos|>"


ATTACKS = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "long text": "{{ messages[0].content * 10**10 }}",
    "width": "{{ '%0999999999d' % (messages|length) }}",
    "padding": "{{ messages[0].content.center(10**10) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "much output": "{% for a in range(9999) %}{% for b in range(9999) %}0123456789{% endfor %}"
    "{% endfor %}",
    "power": "{{ 10 ** (messages|length * 10 ** 10) }}",
    "folded": "{{ 10 ** (10 ** 10) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['x'] }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages)[0].x.y }}",
    "change": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_with_a_sentence(name):
    def attacked():
        with renderer(ATTACKS[name], seconds=1.5, name="evil.jinja") as started:
            return started.render(HI)

    with pytest.raises(TemplateError, match="^evil.jinja: ") as refusal:
        attacked()
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200


def test_nothing_can_be_read_of_the_process():
    for leak in ("{{ ''.__class__ }}", "{{ ''|attr('__class__') }}", "{{ strftime_now.__self__ }}"):
        try:
            with renderer(leak) as started:
                assert started.render(HI) == ""
        except TemplateError as error:
            assert "unsafe" in str(error)


def test_a_renderer_goes_on_after_a_call_that_was_ended():
    slow = (
        "{% if messages[0].content == 'slow' %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
    )
    with renderer(slow, seconds=1.0) as started:
        with pytest.raises(TemplateError, match="takes more than 1 seconds"):
            started.render([{"role": "user", "content": "slow"}])
        assert started.render(HI) == "ok"
        with pytest.raises(TemplateError):
            started.render([{"role": "user", "content": "slow"}])


def test_large_messages_pass_both_ways():
    with renderer("{{ messages[0].content }}") as started:
        long = "é𝄞" * 300_000
        assert started.render([{"role": "user", "content": long}]) == long


def test_a_template_opens_no_file_and_needs_none():
    """What Jinja and Python read late, they have read before."""
    late = r"{{ messages|pprint }} {{ 'a b c'|wordwrap(3) }} {{ '\N{BULLET}\u00e9' }}"
    late += "{{ {'a': [1.5, 'b']}|tojson(indent=2)|urlencode }} {{ strftime_now('%H') }}"
    with renderer(late + "{{ messages[0].content.none.none }}") as started:
        limits = resource.prlimit(started._process.pid, resource.RLIMIT_NOFILE)
        assert limits == (3, 3)
        with pytest.raises(TemplateError, match="has no attribute 'none'"):
            started.render(HI)
        with pytest.raises(TemplateError, match="has no attribute 'none'"):
            started.render(HI)
    with renderer(late) as started:
        hour = datetime.now().strftime("%H")
        said = started.render(HI)
        assert said.startswith("[{'content': 'Hi', 'role': 'user'}] a b\nc \u2022\u00e9%7B")
        assert said[-2:] in (hour, datetime.now().strftime("%H"))


def test_faults_of_a_template_are_sentences(tmp_path):
    with pytest.raises(TemplateError, match="the chat template: line 1: "), renderer("{% for %}"):
        pass
    with pytest.raises(ValueError, match="none.jinja cannot be read .*type the path of"):
        _ = ChatTemplate(path=str(tmp_path / "none.jinja")).text
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="latin.jinja is no chat template: it is not UTF-8"):
        _ = ChatTemplate(path=str(tmp_path / "latin.jinja")).text
    (tmp_path / "a.jinja").write_text("x")
    with pytest.raises(ValueError, match="is not the chat template that the config names"):
        ChatTemplate(path=str(tmp_path / "a.jinja"), sha256="0")
    with pytest.raises(ValueError, match="date='today' is no day"):
        ChatTemplate(path=str(tmp_path / "a.jinja"), date="today")
    kept = ChatTemplate(path=str(tmp_path / "a.jinja")).keep(tmp_path / "run", write=True)
    assert (tmp_path / "run" / TEMPLATE_NAME).read_text() == "x" and kept.sha256
    (tmp_path / "b.jinja").write_text("y")
    with pytest.raises(ValueError, match="the run in .* has another chat template"):
        ChatTemplate(path=str(tmp_path / "b.jinja")).keep(tmp_path / "run", write=False)


def test_the_day_is_the_configs(tmp_path):
    path = tmp_path / "a.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }}")
    with ChatTemplate(path=str(path)).renderer(bos="", eos="", date="2024-07-26") as started:
        assert started.render(HI) == "26 Jul 2024"


@pytest.mark.parametrize(
    "record, message",
    [
        ([], "it is a list"),
        ({"text": "a"}, "it has neither messages nor prompt and response; it has text"),
        ({"messages": []}, "messages must be a list such as"),
        ({"messages": ["a"]}, "message 1 is a str"),
        ({"messages": [{"content": "a"}]}, "message 1 has the role None"),
        ({"messages": [*HI, {"role": "bot", "content": "a"}]}, "message 2 has the role 'bot'; exp"),
        ({"messages": [{"role": "user"}]}, r"message 1 \(user\) has NoneType as its content"),
        ({"prompt": "a", "response": 3}, r"message 2 \(assistant\) has int"),
        ({"prompt": "\ufdd0", "response": ""}, "message 1 holds the noncharacter U.FDD0"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        read_messages(record)
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n\n" + json.dumps(record))
    with pytest.raises(ConversationError, match=f"chat.jsonl, line 3: {message}"):
        bdjax.ChatLines(paths=(str(file),)).documents()


@pytest.mark.parametrize(
    "data, message", [(b"\xff", "line 1 is not UTF-8"), (b"{", "line 1 is no JSON")]
)
def test_what_is_no_line_of_a_conversation_is_the_same_error(tmp_path, data, message):
    # For the command line, whose exit code for it is 2.
    file = tmp_path / "chat.jsonl"
    file.write_bytes(data)
    with pytest.raises(ConversationError, match=f"chat.jsonl, {message}"):
        bdjax.ChatLines(paths=(str(file),)).documents()


def test_a_template_that_refuses_an_order_is_quoted_with_file_and_line(tmp_path):
    file = tmp_path / "chat.jsonl"
    wrong = {"messages": [{"role": "assistant", "content": "a"}, *HI]}
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(wrong) + "\n")
    path = tmp_path / "strict.jinja"
    path.write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    documents = bdjax.ChatLines(paths=(str(file),)).documents()
    with pytest.raises(ValueError, match="chat.jsonl, line 2: .*strict.jinja: Roles must altern"):
        encode_conversations(documents, ChatTemplate(path=str(path)), TOKENIZER, 64)
    silent = [Document("x, line 1", json.dumps(HI).encode(), conversation=True)]
    with pytest.raises(ValueError, match="x, line 1 has no message of the assistant"):
        encode_conversations(silent, ChatTemplate(path=str(path)), TOKENIZER, 64)


# From lines to rows


def with_turns(folder):
    """A byte-level BPE that has ChatML's special tokens, and <think> as an ordinary added one."""
    tokenizers = pytest.importorskip("tokenizers")
    made = bdjax.train_tokenizer([Document("a", b"What is it? user assistant")], 280, folder)
    library = tokenizers.Tokenizer.from_file(made.path)
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.add_tokens(["</think>"])
    library.save(made.path)
    return bdjax.HuggingFaceTokenizer(path=made.path, eos="<|im_end|>")


def test_special_tokens_of_a_file_are_the_templates(tmp_path):
    tokenizer = with_turns(tmp_path)
    controls = tokenizer.control_tokens()
    assert set(controls) == {"<|bos|>", "<|eos|>", "<|cut|>", "<|im_start|>", "<|im_end|>"}
    with renderer(MODELS["chatml"]) as started:
        chat = Chat(tokenizer, started)
        found = chat.example(turns("<|im_end|>", "a</think>"))
        assert chat.end_of_turn() == tokenizer.eos_id == controls["<|im_end|>"]
    ids = [*found.prompt.tolist(), *found.answer.tolist()]
    special = [i for i in ids if i in controls.values()]
    begin, end = controls["<|im_start|>"], controls["<|im_end|>"]
    assert special == [begin, end, begin, end] and found.answer.tolist()[-1] == end
    assert tokenizer.decode(found.answer) == "a</think>"


@pytest.mark.slow
@pytest.mark.parametrize("talk", ["one", "system", "thoughts"])
def test_ids_equal_transformers(tmp_path, talk):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_turns(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer.path)
    theirs.chat_template = MODELS["chatml"]
    wanted = theirs.apply_chat_template(TALKS[talk], add_generation_prompt=True, return_dict=False)
    with renderer(MODELS["chatml"]) as started:
        assert Chat(tokenizer, started).prompt(TALKS[talk]).tolist() == wanted


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "letters.jinja"
    path.write_text(LETTERS, encoding="utf-8")
    return ChatTemplate(path=str(path))


def conversations(*talks):
    return [
        Document(f"{number}", json.dumps(talk).encode(), conversation=True)
        for number, talk in enumerate(talks)
    ]


@pytest.mark.parametrize("tail", Tail)
def test_rows_train_answers_and_nothing_else(template, tail):
    talks = [turns("a", "b<|eos|>", "c?", ""), turns("long question", "x" * 9)]
    encoded = encode_conversations(conversations(*talks), template, TOKENIZER, 64)
    text_too = [*encoded, Document("text", b"plain text")]
    packing = PackingConfig(row_length=64, align=4, tail=tail, move_cuts=True)
    (batch,) = evaluation_batches(text_too, TOKENIZER, packing, 4)
    assert batch["tokens"].min() >= 0
    wanted = {
        "U: a\nA: ": "b<|eos|><|eos|>",
        "U: a\nA: b<|eos|><|eos|>\nU: c?\nA: ": "<|eos|>",
        "U: long question\nA: ": "xxxxxxxxx<|eos|>",
        "": "plain text<|eos|>",
    }
    names = {number: name for name, number in TOKENIZER.control_tokens().items()}
    found = {}
    for tokens, segment, trainable in zip(
        batch["tokens"], batch["segment"], batch["trainable"], strict=True
    ):
        for number in range(1, segment.max() + 1):
            (where,) = np.nonzero(segment == number)
            ids, scored = tokens[where], trainable[where]
            assert ids[0] == BOS and not scored[0]
            # A prompt, then an answer: trainable tokens end the document.
            assert (np.diff(scored.astype(int)) >= 0).all()
            prompt, answer = (
                "".join(names.get(i) or chr(i) for i in part)
                for part in (ids[~scored], ids[scored])
            )
            found[prompt.removeprefix("<|bos|>")] = answer
            if tail is Tail.FILL:
                assert len(where) % 4 == 0
    if tail is Tail.FILL:
        # More of the same up to the block's end.
        found = {
            prompt: re.sub(r"(<\|eos\|>)+$", r"\1", answer) for prompt, answer in found.items()
        }
        wanted["U: a\nA: "] = "b<|eos|>"
    assert found == wanted


def test_what_fits_no_row_is_counted(template):
    talks = conversations(turns("a", "b"), turns("a", "b" * 30))
    with pytest.warns(UserWarning, match="1 of 2 answers need more than data.row_length=16 .* 40"):
        (kept,) = encode_conversations(talks, template, TOKENIZER, 16)
    assert text(kept.tokens[1]) == "b<|eos|>"
    with pytest.raises(ValueError, match="1 of 1 answers .* type data.row_length=40 or more"):
        encode_conversations(talks[1:], template, TOKENIZER, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = encode_conversations(talks[1:], template, TOKENIZER, 40)
    (batch,) = evaluation_batches(fits, TOKENIZER, PackingConfig(row_length=40), 1)
    assert batch["segment"].tolist() == [[1] * 40]
    with pytest.raises(ValueError, match="too many for a row of 36; type data.row_length="):
        next(evaluation_batches(fits, TOKENIZER, PackingConfig(row_length=36), 1))
    with pytest.raises(ValueError, match="is a conversation that is not encoded yet"):
        next(evaluation_batches(talks, TOKENIZER, PackingConfig(row_length=36), 1))


def test_a_config_splits_by_conversation_and_needs_a_template(template, tmp_path):
    lines = [{"messages": turns(f"q{n}", "a", "b", "c")} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "text.txt").write_text("some text " * 9)
    chats = bdjax.ChatLines(paths=(str(tmp_path / "chats.jsonl"),))
    config = tiny_config(tmp_path)
    data = replace(config.data, source=chats, held_out=None, held_out_fraction=0.3)
    with pytest.raises(ValueError, match="no chat template; type chat_template=ChatTemplate"):
        replace(config, data=data)
    config = replace(config, data=data, chat_template=template)
    sides = config.documents()
    names = [{document.name for document in side} for side in sides]
    assert all(names) and not names[0] & names[1]
    assert [len(side) for side in sides] == [2 * len(side) for side in names]
    text = bdjax.TextFiles(paths=(str(tmp_path / "text.txt"),))
    mixed = bdjax.Mixture(parts=(bdjax.Weighted(source=chats), bdjax.Weighted(source=text)))
    whole = replace(config, data=replace(data, source=mixed, held_out=chats))
    with pytest.raises(ValueError, match="has the same text as the training document"):
        whole.documents()
    # What is stored is read again, and every line of its text is an override.
    assert config_from_json(to_json(config)) == config
    asked = [f"chat_template.path={template.path}", "chat_template=ChatTemplate"]
    asked += ["model.lora=LoraConfig", "model.lora.targets=wq,wv", "start_from=runs/a"]
    changed = bdjax.apply_overrides(tiny_config(tmp_path), asked)
    assert changed.chat_template == template and changed.model.lora.targets == ("wq", "wv")


def test_sums_are_right_and_held_out_ones_are_asked_nowhere_else():
    sides = [bdjax.Sums(questions=3, held_out=side).documents() for side in (False, True)]
    asked: list[set[str]] = []
    for side in sides:
        messages = [json.loads(document.data) for document in side]
        for talk in messages:
            for question, answered in zip(talk[::2], talk[1::2], strict=True):
                numbers = map(int, question["content"].split(" + "))
                assert sum(numbers) == int(answered["content"])
        asked.append({message["content"] for talk in messages for message in talk[::2]})
        assert {talk[0]["content"] for talk in messages} == asked[-1]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 900 and len(asked[1]) > 20
    with pytest.raises(ValueError, match="largest=0 must be at least 9; type largest=29"):
        bdjax.Sums(largest=0)


# What is masked and scored


@pytest.fixture(scope="module")
def rows(template):
    """A batch of two packed rows: chats and a text, answers in the middle of blocks."""
    talks = [turns("a", "bcd", "e?", ""), turns("hm", "xyz"), turns("q" * 9, "r")]
    encoded = encode_conversations(conversations(*talks), template, TOKENIZER, 64)
    packing = PackingConfig(row_length=64, align=8)
    (batch,) = evaluation_batches([*encoded, Document("t", b"text")], TOKENIZER, packing, 2)
    return Batch(*(jnp.asarray(batch[name]) for name in Batch._fields))


RECIPES = {
    "default": presets.default(mask_id=TOKENIZER.mask_id, block_size=8),
    "sdar": presets.sdar(mask_id=TOKENIZER.mask_id, block_size=8),
    "fast_dllm_v2": presets.fast_dllm_v2(mask_id=TOKENIZER.mask_id, block_size=8),
    "mdlm": presets.mdlm(mask_id=TOKENIZER.mask_id, row_length=64),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sdar", "mdlm")]


@pytest.mark.parametrize("name", ["default", "fast_dllm_v2", *SLOW])
def test_prompts_are_neither_masked_nor_scored(rows, name):
    objective = RECIPES[name].objective
    answers = np.asarray(rows.trainable)
    draw = jax.jit(training_row, static_argnums=0)
    for seed in range(5):
        row = draw(objective, rows, 0, jax.random.key(seed))
        shown = np.asarray(row.tokens)[:, -objective.views * 64 :].reshape(2, -1, 64)
        hidden = shown == TOKENIZER.mask_id
        assert (hidden <= answers[:, None]).all() and hidden.any()
        scored = np.asarray(row.diffusion.scored).reshape(2, -1, 64)
        weight = np.asarray(row.diffusion.weight).reshape(2, -1, 64)
        assert (scored <= hidden).all() and (weight[~scored] == 0).all()
        if row.ar is not None:
            named = np.roll(answers, -1, axis=1)
            assert (np.asarray(row.ar.scored) <= named).all()


def test_the_loss_by_hand(rows):
    # Exact counts: block b of c answer tokens has n of them masked, each weighs c / n.
    objective = RECIPES["default"].objective
    model = tiny.model(embedding=TokenEmbedding(vocab_size=264, width=tiny.WIDTH, dtype="float32"))
    model = replace(model, readout=replace(model.readout, vocab_size=264, banned=()))
    params = model.init(jax.random.key(0))

    @jax.jit
    def losses(rows):
        row = training_row(objective, rows, 0, jax.random.key(3))
        found = total(objective, row_losses(model, params, row))
        return row, token_losses(model, params, row), found

    row, per_token, found = losses(rows)
    nll, ar = (np.asarray(x, np.float64) for x in per_token)
    tokens, answers = np.asarray(rows.tokens), np.asarray(rows.trainable)
    hidden = np.asarray(row.tokens)[:, 64:] == TOKENIZER.mask_id
    segment, block = np.asarray(rows.segment), np.asarray(rows.position) // 8
    bound = 0.0
    for r in range(2):
        for document in range(1, segment[r].max() + 1):
            for b in range(8):
                inside = (segment[r] == document) & (block[r] == b)
                c, n = (inside & answers[r]).sum(), (inside & hidden[r]).sum()
                assert (n >= 1) == (c >= 1)
                bound += c / n * nll[r][inside & hidden[r]].sum() if n else 0.0
    after = np.roll(answers, -1, axis=1) & (np.arange(64) < 63)
    wanted = bound / answers.sum() + objective.ar_weight * ar[after].sum() / after.sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # Prompts are context: another one is another loss.
    asked = (segment > 0) & ~answers & (np.asarray(rows.position) > 0)
    other = rows._replace(tokens=jnp.where(asked, 65, tokens))
    assert abs(losses(other)[2] - found) > 1e-3


# Against transformers


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_equals_transformers(model, talk, prompt):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = TALKS[talk]
    try:
        wanted, _ = render_jinja_template(
            conversations=[messages],
            chat_template=MODELS[model],
            add_generation_prompt=prompt,
            bos_token="<|bos|>",
            eos_token="<|eos|>",
        )
    except Exception as error:
        wanted = [f"the chat template: {error}"]
    with renderer(MODELS[model]) as started:
        try:
            found = started.render(messages, add_generation_prompt=prompt)
        except TemplateError as error:
            found = str(error)
    assert [found.replace(BEGIN, "").replace(END, "")] == wanted
