"""Laws of tokenizer, corpus and packing: no byte lost, none doubled, none moved."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdjax.corpus import Document, describe, split_by_hash, standard_library
from bdjax.data import (
    PackingConfig,
    Tail,
    _Epochs,
    _Pieces,
    describe_rows,
    evaluation_batches,
    merge_states,
    padding_share,
    training_batches,
)
from bdjax.reading import read_text_files
from bdjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS, CUT = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.cut_id

texts = st.lists(st.binary(max_size=40), min_size=1, max_size=6).filter(any)
packings = st.builds(
    lambda align, blocks, tail, moves: PackingConfig(
        row_length=align * blocks, align=align, tail=tail, move_cuts=moves
    ),
    st.integers(1, 5),
    st.integers(2, 6),
    st.sampled_from(Tail),
    st.booleans(),
)


def as_documents(texts):
    return [Document(f"{number}.txt", text) for number, text in enumerate(texts)]


def numbered(count, length=6):
    """Documents of `length` bytes, each different."""
    return as_documents([f"{number:0{length}d}".encode() for number in range(count)])


def pieces(batches):
    """(start in the row, tokens) of every piece: batch by batch, row by row, by segment."""
    for batch in batches:
        for tokens, segment in zip(batch["tokens"], batch["segment"], strict=True):
            for number in range(1, segment.max() + 1):
                (where,) = np.nonzero(segment == number)
                yield where[0], tokens[where]


def contents(batches):
    """The bytes of every piece that holds some."""
    texts = (tokens[tokens < 256].astype(np.uint8).tobytes() for _, tokens in pieces(batches))
    return [text for text in texts if text]


# Tokenizer


@given(st.text())
def test_text_survives_the_tokenizer(text):
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32 and (ids < 256).all()
    assert TOKENIZER.decode([BOS, *ids.tolist(), EOS, TOKENIZER.mask_id, CUT]) == text
    assert TOKENIZER.token_bytes()[ids].sum() == len(text.encode())


def test_tokenizer_ids():
    assert (BOS, EOS, TOKENIZER.mask_id, TOKENIZER.vocab_size) == (256, 257, 258, 260)
    assert TOKENIZER.token_bytes().tolist() == [1] * 256 + [0] * 4
    assert TOKENIZER.encode("\ud800").tolist() == [0xED, 0xA0, 0x80]
    assert TOKENIZER.decode(TOKENIZER.encode(b"a\xffb")) == "a\ufffdb"
    for wrong in (-1, 260):
        with pytest.raises(ValueError, match=rf"id {wrong} .* 0\.\.259"):
            TOKENIZER.decode([97, wrong])


# Corpus


def test_files_are_read_in_order_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    documents = read_text_files([tmp_path / "b.txt", str(tmp_path / "*.txt")])
    assert [d.data.decode() for d in documents] == ["b.txt", "a.txt", "c[1].txt"]
    assert [d.data for d in read_text_files(tmp_path / "c[1].txt")] == [b"c[1].txt"]
    assert describe(documents) == "3 files, 0.00 MB"


def test_file_refusals(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3.*iconv"):
        read_text_files(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*missing\.txt'"):
        read_text_files([tmp_path / "latin.txt", tmp_path / "missing.txt"])
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*\*\.md'"):
        read_text_files(str(tmp_path / "*.md"))
    with pytest.raises(FileNotFoundError, match=r"is a folder; type '.*\*\*/\*\.txt'"):
        read_text_files(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty corpus: 1 files"):
        read_text_files(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty corpus: 0 files"):
        read_text_files([])


def test_standard_library():
    documents = standard_library()
    names = [d.name for d in documents]
    assert names == sorted(names) and {"os.py", "json/decoder.py"} <= set(names)
    assert len({d.data for d in documents}) == len(documents) > 300
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "encodings", "idlelib", "site-packages"})


def test_split_ignores_order_and_names_and_moves_nothing():
    documents = numbered(400)
    train, held_out = split_by_hash(documents, 0.1)
    assert sorted(train + held_out) == sorted(documents) and 20 < len(held_out) < 60
    assert split_by_hash(documents[::-1], 0.1) == (train[::-1], held_out[::-1])
    for side, grown in zip((train, held_out), split_by_hash(numbered(500), 0.1), strict=True):
        assert set(side) <= set(grown)
    renamed = [Document("x", d.data) for d in documents]
    assert [d.data for d in split_by_hash(renamed, 0.1)[1]] == [d.data for d in held_out]


def test_split_refusals():
    documents = numbered(2)
    with pytest.raises(ValueError, match="held_out_fraction=5.0 must lie between 0 and 1"):
        split_by_hash(documents, 5.0)
    with pytest.raises(ValueError, match="held-out side.*is empty: 2 documents") as refusal:
        split_by_hash(documents, 1e-9)
    # The message's own advice works.
    advice = float(str(refusal.value).split("up to ")[1].split(",")[0])
    assert all(split_by_hash(documents, advice - 1e-3))
    with pytest.raises(ValueError, match="training side.*cut the text into several files"):
        split_by_hash(documents[:1], 1 - 1e-9)


# Packing


@given(texts, packings, st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_every_byte_once_and_in_order(texts, packing, batch_size):
    batches = list(evaluation_batches(as_documents(texts), TOKENIZER, packing, batch_size))
    shape = (batch_size, packing.row_length)
    assert all(array.shape == shape for batch in batches for array in batch.values())
    assert b"".join(contents(batches)) == b"".join(texts)
    # Documents can be told apart: each begins with BOS and ends with the EOS of its last piece.
    ended, text = [], []
    for _, tokens in pieces(batches):
        assert tokens[0] == (CUT if text else BOS)
        text.append(bytes(tokens[tokens < 256].tolist()))
        if tokens[-1] == EOS:
            ended.append(b"".join(text))
            text = []
    assert not text and ended == [text for text in texts if text]


@given(texts, packings)
@settings(deadline=None, max_examples=30)
def test_row_rules(texts, packing):
    documents = as_documents(texts)
    batches = [
        *evaluation_batches(documents, TOKENIZER, packing, 2),
        *islice(training_batches(documents, TOKENIZER, packing, 2, seed=0), 3),
    ]
    for batch in batches:
        tokens, segment, position = batch["tokens"], batch["segment"], batch["position"]
        assert {array.dtype.name for array in (tokens, segment, position)} == {"int32"}
        assert (tokens[segment == 0] == EOS).all() and (position[segment == 0] == 0).all()
        for row in segment:
            seen = row[row > 0]
            assert (np.diff(seen) >= 0).all()
            assert set(seen.tolist()) == set(range(1, row.max() + 1))
        heads = (tokens == BOS) | (tokens == CUT)
        np.testing.assert_array_equal(heads, (segment > 0) & (position == 0))
        np.testing.assert_array_equal(batch["trainable"], (segment > 0) & ~heads)
        steps = np.diff(position, axis=1)[(np.diff(segment, axis=1) == 0) & (segment[:, 1:] > 0)]
        assert (steps == 1).all()
    for start, tokens in pieces(batches):
        assert start % packing.align == 0
        filled = np.count_nonzero(tokens == EOS)
        if filled == 0:
            # Cut: a whole row, or the beginning of a document whose cuts move.
            assert len(tokens) == packing.row_length or (tokens[0] == BOS and packing.move_cuts)
        elif packing.tail is Tail.SHORT:
            assert filled == 1 and tokens[-1] == EOS
        else:
            assert filled <= packing.align and (tokens[-filled:] == EOS).all()
            assert len(tokens) % packing.align == 0


@pytest.mark.parametrize(
    ("tail", "tokens", "segment"),
    [
        (Tail.FILL, ["BabcEEEE", "BdeEEEEE"], ["11111111", "11110000"]),
        (Tail.SHORT, ["BabcEEEE", "BdeEEEEE"], ["11111000", "11110000"]),
    ],
)
def test_picture_in_the_docstring(tail, tokens, segment):
    packing = PackingConfig(row_length=8, align=4, tail=tail)
    (batch,) = evaluation_batches(as_documents([b"abc", b"de"]), TOKENIZER, packing, 2)
    letters = {BOS: "B", EOS: "E"}
    shown = ["".join(letters.get(t, chr(t % 256)) for t in row) for row in batch["tokens"].tolist()]
    assert shown == tokens
    assert ["".join(map(str, row)) for row in batch["segment"].tolist()] == segment


def test_padding_is_counted():
    packing = PackingConfig(row_length=8)
    batches = list(evaluation_batches(as_documents([b"abc", b"de"]), TOKENIZER, packing, 4))
    assert padding_share(batches) == (3 + 4 + 2 * 8) / 32
    with pytest.raises(ValueError, match="0 batches"):
        padding_share([])


@pytest.mark.parametrize("done", [0, 1, 7, 150])
def test_resume_equals_no_interruption(done):
    """With as many processes or with others: 4 save, 2 go on."""

    def start(rows=None):
        packing = PackingConfig(row_length=12, move_cuts=True)
        documents = numbered(97) + numbered(3, length=40)
        return training_batches(documents, TOKENIZER, packing, 4, seed=5, rows=rows, lanes=4)

    straight = start()
    four = [start([row]) for row in range(4)]
    for _ in range(done):
        wanted = next(straight)
        assert_joined([next(process) for process in four], wanted)
    state = json.loads(json.dumps(merge_states([process.get_state() for process in four])))
    two = [start([0, 1]), start([2, 3])]
    for process in two:
        process.set_state(state)
    # 100 batches of 4 rows: several epochs and several packed groups.
    for _ in range(100):
        assert_joined([next(process) for process in two], next(straight))


def assert_joined(parts, whole):
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@given(texts, packings, st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_evaluation_rows_of_processes_are_those_of_the_batch(texts, packing, depth):
    documents, size = as_documents(texts), 2 * depth
    whole = evaluation_batches(documents, TOKENIZER, packing, size)
    halves = [
        evaluation_batches(
            documents, TOKENIZER, packing, size, rows=range(i * depth, (i + 1) * depth)
        )
        for i in range(2)
    ]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert_joined(parts, batch)


@given(texts, packings, st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_an_epoch_holds_every_byte_once_wherever_it_is_cut(texts, packing, epoch):
    source = _Pieces(as_documents(texts), TOKENIZER, packing)
    epochs = _Epochs(source, seed=7)
    size = len(source)
    found = {}
    for index in range(epoch * size, (epoch + 1) * size):
        tokens = epochs[index]["tokens"]
        assert len(tokens) <= packing.row_length and len(tokens) != 1
        if tokens.size:
            found.setdefault(tokens[0] == CUT, []).append(tokens[tokens < 256].tobytes())
    # Pieces that begin or go on with a document, in any order, are all of its bytes.
    every = sorted(np.frombuffer(b"".join(sum(found.values(), [])), np.int32).tolist())
    assert every == sorted(b"".join(texts))
    assert len(found[False]) == sum(map(bool, texts))


def test_cuts_move_from_epoch_to_epoch():
    packing = PackingConfig(row_length=16, move_cuts=True)
    text = bytes(range(250))
    source = _Pieces(as_documents([text]), TOKENIZER, packing)
    epochs, size, firsts = _Epochs(source, seed=7), len(source), []
    for epoch in range(200):
        all_pieces = [epochs[index]["tokens"] for index in range(epoch * size, (epoch + 1) * size)]
        (head,) = [tokens for tokens in all_pieces if tokens.size and tokens[0] == BOS]
        firsts.append(len(head) - 1)
        joined = sorted((tokens for tokens in all_pieces if tokens.size), key=lambda x: x[1])
        assert bytes(np.concatenate([x[x < 256] for x in joined]).tolist()) == text
    # Uniform over 1 .. 15: 13 expected of each, standard deviation 3.5.
    counts = np.bincount(firsts, minlength=16)
    assert counts[0] == 0 and counts[1:].min() >= 1 and counts.max() <= 30


def test_epochs_are_whole_and_differ():
    count = 1024
    stream = training_batches(
        numbered(count), TOKENIZER, PackingConfig(row_length=8), 64, seed=0, lanes=1
    )
    # A document fills a row and the rows packed at once divide the epoch, which is 16 batches.
    first, second = (contents(islice(stream, count // 64)) for _ in range(2))
    assert sorted(first) == sorted(second) == [d.data for d in numbered(count)]
    assert first != second
    packing = PackingConfig(row_length=8)
    other = training_batches(numbered(count), TOKENIZER, packing, 64, seed=1, lanes=1)
    assert contents(islice(other, count // 64)) not in (first, second)


def test_refusals():
    documents, packing = numbered(1), PackingConfig(row_length=8)
    with pytest.raises(ValueError, match="row_length=250 .* align=16; type row_length=256"):
        PackingConfig(row_length=250, align=16)
    with pytest.raises(ValueError, match="row_length=3 .* align=16; type row_length=16"):
        PackingConfig(row_length=3, align=16)
    with pytest.raises(ValueError, match="row_length=1 has no room"):
        PackingConfig(row_length=1)
    with pytest.raises(ValueError, match="align=0 must be at least 1"):
        PackingConfig(row_length=8, align=0)
    with pytest.raises(ValueError, match="empty corpus: 1 documents hold 0 tokens"):
        training_batches([Document("a", b"")], TOKENIZER, packing, 1, seed=0)
    with pytest.raises(ValueError, match="empty corpus: 0 documents"):
        evaluation_batches([], TOKENIZER, packing, 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluation_batches(documents, TOKENIZER, packing, 0)
    with pytest.raises(ValueError, match="seed=-1"):
        training_batches(documents, TOKENIZER, packing, 1, seed=-1)
    with pytest.raises(ValueError, match="lanes=3 does not divide .*batch_size=8; type .*lanes=1"):
        training_batches(documents, TOKENIZER, packing, 8, seed=0, lanes=3)
    with pytest.raises(ValueError, match="2 lanes of 4 rows cannot .* 2 of 8 rows; type .*lanes=4"):
        training_batches(documents, TOKENIZER, packing, 8, seed=0, lanes=2, rows=[2, 3])
    training_batches(documents, TOKENIZER, packing, 8, seed=0, lanes=4, rows=[2, 3])
    with pytest.raises(ValueError, match="2 lanes of 4 rows .*type .*lanes=8"):
        training_batches(documents, TOKENIZER, packing, 8, seed=0, lanes=2, rows=[1, 2])
    with pytest.raises(ValueError, match=r"rows=\[9\] must be some of 0\.\.7"):
        training_batches(documents, TOKENIZER, packing, 8, seed=0, rows=[9])


def test_states_of_other_lanes_are_refused():
    def start(**options):
        packing = PackingConfig(row_length=8)
        return training_batches(numbered(9), TOKENIZER, packing, 4, seed=0, **options)

    half, other = start(rows=[0, 1]), start(rows=[2, 3])
    with pytest.raises(ValueError, match="lacks the lanes 2, 3"):
        start().set_state(half.get_state())
    with pytest.raises(ValueError, match="has 4 lanes, and this run has 2; type data.lanes=4"):
        start(lanes=2).set_state(start().get_state())
    again = start(rows=[0, 1])
    assert merge_states([half.get_state(), again.get_state(), other.get_state()])["total"] == 4
    next(again)
    with pytest.raises(ValueError, match="disagree on lane 0 of 4"):
        merge_states([half.get_state(), again.get_state()])


def test_rows_are_described():
    packing = PackingConfig(row_length=8)
    documents = as_documents([b"abcdefghij", b"kl"])
    (batch,) = evaluation_batches(documents, TOKENIZER, packing, 3)
    said = describe_rows(batch, TOKENIZER)
    assert said == "first 3 rows of 8 tokens: 29.2% padding, 3 pieces, 1 go on after a cut"
