"""Bytes as tokens: the tokenizer that needs no file and can write any text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Base of the tokenizers: text to ids and back, exact about bytes.

    Padding has no id: `bdjax.data` marks it by segment 0 and writes `eos_id` there.
    """

    @property
    def bos_id(self) -> int:
        """Heads every document."""
        raise NotImplementedError

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        raise NotImplementedError

    @property
    def mask_id(self) -> int:
        """Stands for a token that is not known yet."""
        raise NotImplementedError

    @property
    def cut_id(self) -> int:
        """Heads a piece that goes on with a document that was cut."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Ids are 0..vocab_size-1."""
        raise NotImplementedError

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Each of them ends a text that is being written."""
        return (self.eos_id,)

    @property
    def starts_with_bos(self) -> bool:
        """Whether a prompt begins with BOS, as every document in training does."""
        return True

    def banned_ids(self) -> tuple[int, ...]:
        """What is never drawn: of the ids without text all but those that end one."""
        sizes = self.token_bytes()
        return tuple(i for i in range(self.vocab_size) if not sizes[i] and i not in self.stop_ids)

    def encode(self, text: str | bytes) -> Int[np.ndarray, "T"]:
        """The int32 ids of a text, or of its UTF-8 bytes, without BOS or EOS."""
        raise NotImplementedError

    def encode_all(self, texts: Sequence[str | bytes]) -> list[Int[np.ndarray, "T"]]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of `ids`, without specials."""
        raise NotImplementedError

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """How many bytes of UTF-8 each id stands for (int32)."""
        raise NotImplementedError

    def spelling(self, number: int) -> str | None:
        """The text of a special token, None where it has none."""
        raise NotImplementedError

    def to_json(self) -> str:
        """A tokenizer.json of the library `tokenizers` with the same ids for the same text."""
        raise NotImplementedError

    def control_tokens(self) -> dict[str, int]:
        """The special tokens that a chat template can write, by their spelling; never the mask."""
        raise NotImplementedError

    def keep(self, folder: Path, write: bool) -> "Tokenizer":
        """This tokenizer, with what it needs kept in a run's folder (if `write`): nothing."""
        return self

    def _known(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> Int[np.ndarray, "T"]:
        """`ids` as an array. Raises ValueError for an id outside 0..vocab_size-1."""
        ids = np.asarray(ids, np.int64)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"id {wrong[0]} is not one of this tokenizer's: expected 0..{self.vocab_size - 1}; "
                "decode with the tokenizer that the ids were made with"
            )
        return ids


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of UTF-8, the four ids above them are special.

    `cut_id` stands in place of BOS where a piece goes on with a document that was cut. Padding
    has no id of its own: `bdjax.data` marks it by segment 0 and writes `eos_id` there.
    """

    bos_id: ClassVar[int] = 256
    eos_id: ClassVar[int] = 257
    mask_id: ClassVar[int] = 258
    cut_id: ClassVar[int] = 259
    vocab_size: ClassVar[int] = 260

    def encode(self, text: str | bytes) -> Int[np.ndarray, "T"]:
        """The bytes of `text` as int32 ids, without BOS or EOS. A `str` is encoded as UTF-8.

        Lone surrogates, which UTF-8 has no place for, become their three surrogate bytes, so that
        every `str` has ids.
        """
        data = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of `ids`: specials are dropped, bytes that are not UTF-8 read U+FFFD.

        Raises ValueError for an id outside 0..vocab_size-1.
        """
        ids = self._known(ids)
        return ids[ids < self.bos_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """How many bytes of text each id stands for: 1 for a byte, 0 for a special (int32)."""
        return (np.arange(self.vocab_size) < self.bos_id).astype(np.int32)

    def spelling(self, number: int) -> str | None:
        """The text of a special token, None for a byte."""
        return _SPELLED.get(number)

    def to_json(self) -> str:
        """A byte-level BPE without merges: every byte is its own token, BOS comes first."""
        found = bpe_json(
            vocab=BYTE_OF,
            merges=[],
            added=[added_token(number, text) for number, text in _SPELLED.items()],
            pre_tokenizer=byte_level(use_regex=False),
            post_processor=leading(None, _SPELLED[self.bos_id], self.bos_id),
        )
        return json.dumps(found, ensure_ascii=False, indent=1)

    def control_tokens(self) -> dict[str, int]:
        """BOS and EOS."""
        return {_SPELLED[number]: number for number in (self.bos_id, self.eos_id)}


_SPELLED: Mapping[int, str] = {
    ByteTokenizer.bos_id: "<|bos|>",
    ByteTokenizer.eos_id: "<|eos|>",
    ByteTokenizer.mask_id: "<|mask|>",
    ByteTokenizer.cut_id: "<|cut|>",
}


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """A tokenizer.json's step from bytes to characters, after GPT-2's cut into words or without."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def added_token(number: int, text: str, special: bool = True) -> dict[str, Any]:
    """A tokenizer.json's entry of a token that merges do not make."""
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **rules, "special": special}


def bpe_json(
    *,
    vocab: Mapping[str, int],
    merges: list[list[str]],
    added: list[dict[str, Any]],
    pre_tokenizer: dict[str, Any],
    post_processor: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE. ignore_merges: a word that is a token stays one."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


def leading(post_processor: dict[str, Any] | None, text: str, number: int) -> dict[str, Any]:
    """A tokenizer.json's post-processor that puts the token before every text, after the given."""
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    sequence = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    template = {
        "type": "TemplateProcessing",
        "single": [first, sequence[0]],
        "pair": [first, *sequence],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }
    if post_processor is None:
        return template
    return {"type": "Sequence", "processors": [post_processor, template]}


def _alphabet() -> dict[str, int]:
    """Character -> byte: visible bytes of Latin-1 are themselves, the others 256, 257 .."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


# How byte-level tokenizers write bytes as characters.
BYTE_OF: Mapping[str, int] = _alphabet()
