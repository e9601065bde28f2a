"""Laws of the sources: which bytes of which files a run reads, and on which side they stand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdjax.overrides import apply_overrides, from_json, to_json
from bdjax.reading import read_text_files
from bdjax.sources import DataConfig, StandardLibrary, TextFiles

CLASSES = {cls.__name__: cls for cls in (DataConfig, StandardLibrary, TextFiles)}


def test_the_first_nine_tenths_of_shakespeare_are_nanogpts_training_text(tmp_path):
    path = tmp_path / "input.txt"
    text = np.random.default_rng(0).integers(32, 127, 1_115_394).astype(np.uint8).tobytes()
    path.write_bytes(text)
    paths = (str(path),)
    config = DataConfig(
        source=TextFiles(paths=paths, last=0.9), held_out=TextFiles(paths=paths, first=0.9)
    )
    (train,), (held_out,) = config.documents()
    assert (len(train.data), len(held_out.data)) == (1_003_854, 111_540)
    assert train.data + held_out.data == text


@settings(deadline=None, max_examples=60)
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_parts_are_whole_characters_and_together_the_file(tmp_path_factory, text, a, b):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes((text + "é𝄞" * 40).encode())
    cuts = sorted({0.0, a, b, 1.0})
    parts = []
    for low, high in zip(cuts[:-1], cuts[1:], strict=True):
        try:
            (part,) = read_text_files(path, low, high)
        except ValueError as error:
            assert "hold 0 bytes between the fractions" in str(error)
        else:
            parts.append(part.data.decode())
    assert "".join(parts).encode() == path.read_bytes()


@pytest.mark.parametrize("first, last", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)])
def test_fractions_out_of_order_are_refused(first, last):
    with pytest.raises(ValueError, match=rf"first={first}, last={last} must be .* type first=0"):
        TextFiles(paths=("a.txt",), first=first, last=last)


def test_a_part_without_a_byte_is_an_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"0 bytes between the fractions 0\.0 and 0\.5"):
        TextFiles(paths=(str(tmp_path / "a.txt"),), last=0.5).documents()


def test_a_held_out_text_that_is_trained_on_is_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same")
    source, held_out = (TextFiles(paths=(str(tmp_path / n),)) for n in ("a.txt", "b.txt"))
    with pytest.raises(ValueError, match=r"held_out: .*b\.txt has the same text as .*a\.txt"):
        DataConfig(source=source, held_out=held_out).documents()


def test_a_held_out_source_is_chosen_by_key():
    config = apply_overrides(DataConfig(), ["held_out=TextFiles", "held_out.paths=a.txt,b.txt"])
    assert config.held_out == TextFiles(paths=("a.txt", "b.txt"))
    assert from_json(to_json(config), CLASSES) == config
    assert from_json(to_json(DataConfig()), CLASSES) == DataConfig()
