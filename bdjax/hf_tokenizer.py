"""Byte-level BPE from a tokenizer.json of the Hugging Face library `tokenizers`, and training one.

The library is an extra (`pip install 'bdjax[hf]'`); it is imported where text is encoded.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from bdjax.corpus import Document
from bdjax.run_files import keep_file
from bdjax.tokenizer import BYTE_OF, Tokenizer, leading

FILE_NAME = "tokenizer.json"
# Texts that the library holds at a time.
_AT_ONCE = 1024
SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "mask": "<|mask|>", "cut": "<|cut|>"}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer(Tokenizer):
    """A byte-level BPE from a tokenizer.json; special tokens by their text or their number.

    A number may lie beyond the file's vocabulary, which then grows. Without `cut`, BOS stands where
    a document goes on. Special tokens spelled out in a text are plain text. `sha256`: that of the
    file, if only this very file will do.

    Of imported models: `stops` end a text beside EOS; `leads` False writes no BOS before a prompt;
    `size` ids there are at least, those without a token in the file standing for no text;
    `draws_specials` bans nothing but the mask, so that probabilities are the model's own. `text` is
    the file's content where there is no file; `path` then serves messages.

    A file may normalise text to NFC. What is counted then, by `token_bytes` and in bits per byte,
    are the bytes of the normalised text: the bound covers that text and not how it was spelled.

    Raises ValueError for a file that is missing, is no byte-level BPE or has another sha256, for an
    unknown special token, for a mask that is BOS, EOS or CUT, and without the library.
    """

    # Two places of one file are one tokenizer: `sha256` decides.
    path: str = field(compare=False)
    bos: str | int = SPECIALS["bos"]
    eos: str | int = SPECIALS["eos"]
    mask: str | int = SPECIALS["mask"]
    cut: str | int | None = None
    sha256: str | None = None
    stops: tuple[int, ...] = ()
    leads: bool = True
    size: int = 0
    draws_specials: bool = False
    text: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.sha256 not in (None, self._digest):
            raise ValueError(
                f"{self.path} is not the tokenizer that the config names: its sha256 is "
                f"{self._digest}, expected {self.sha256}; put the file back, or type "
                "tokenizer.sha256=none for a new run"
            )
        if self.mask_id in (self.bos_id, self.eos_id, self.cut_id):
            raise ValueError(
                f"mask={self.mask!r} is BOS, EOS or CUT too; type mask={len(self._pieces)} for an "
                "id of its own"
            )

    @cached_property
    def bos_id(self) -> int:
        """Heads every document."""
        return self._id("bos", self.bos)

    @cached_property
    def eos_id(self) -> int:
        """Ends every document."""
        return self._id("eos", self.eos)

    @cached_property
    def mask_id(self) -> int:
        """Stands for a token that is not known yet."""
        return self._id("mask", self.mask)

    @cached_property
    def cut_id(self) -> int:
        """Heads a piece that goes on with a document."""
        return self.bos_id if self.cut is None else self._id("cut", self.cut)

    @cached_property
    def vocab_size(self) -> int:
        """The file's ids, the special ones beyond them, and `size` if that is more."""
        return max(self.size, 1 + max(len(self._pieces) - 1, *self._special_ids))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """EOS and `stops`."""
        return (self.eos_id, *(i for i in self.stops if i != self.eos_id))

    @property
    def starts_with_bos(self) -> bool:
        """`leads`."""
        return self.leads

    def banned_ids(self) -> tuple[int, ...]:
        """The mask alone if `draws_specials`, else what every tokenizer bans."""
        return (self.mask_id,) if self.draws_specials else super().banned_ids()

    def encode(self, text: str | bytes) -> Int[np.ndarray, "T"]:
        """The int32 ids of a text, or of its UTF-8 bytes, without BOS or EOS.

        Raises ValueError for what is not UTF-8, and for bytes that the file has no token for.
        """
        return self._encoded(self._library, [text])[0]

    def encode_all(self, texts: Sequence[str | bytes]) -> list[Int[np.ndarray, "T"]]:
        """`encode` of every text, on all cores: a corpus takes minutes on one."""
        found = []
        # What the library makes of a text is many times as large as its ids.
        for start in range(0, len(texts), _AT_ONCE):
            found += self._encoded(self._library, texts[start : start + _AT_ONCE])
        return found

    def encode_with_specials(self, text: str) -> Int[np.ndarray, "T"]:
        """As `encode`, but a special token spelled out is that token: for filled chat templates.

        What others wrote should not go through here: it could spell the end of its own turn.
        """
        return self._encoded(self._library_with_specials, [text])[0]

    def normalised(self, text: str) -> str:
        """The text as it is encoded: NFC where the file says so."""
        normalizer = self._library.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _encoded(self, library: Any, texts: Sequence[str | bytes]) -> list[Int[np.ndarray, "T"]]:
        checked = [self._checked(text) for text in texts]
        with _no_panic(self.path):
            found = library.encode_batch_fast(checked, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def _checked(self, text: str | bytes) -> str:
        """The text as `str`. Raises ValueError as `encode`."""
        try:
            text = text.decode() if isinstance(text, bytes) else text.encode().decode()
        except UnicodeError as error:
            raise ValueError(f"the text cannot be encoded: it is not UTF-8 ({error})") from error
        if self._lacking:
            lost = self._lacking.intersection(self.normalised(text).encode())
            if lost:
                raise ValueError(
                    f"the text cannot be encoded: {self.path} has no token for the byte "
                    f"0x{min(lost):02x}; take it out of the text"
                )
        return text

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of `ids`: specials are dropped, bytes that are not UTF-8 read U+FFFD.

        Raises ValueError for an id outside 0..vocab_size-1.
        """
        ids = self._known(ids)
        inside = ids[ids < len(self._pieces)]
        return b"".join(self._pieces[i] for i in inside).decode("utf-8", errors="replace")

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """How many bytes of UTF-8 each id stands for, 0 for a special (int32)."""
        sizes = np.zeros(self.vocab_size, np.int32)
        sizes[: len(self._pieces)] = [len(piece) for piece in self._pieces]
        return sizes

    def control_tokens(self) -> dict[str, int]:
        """The file's special tokens, and what stands for BOS and EOS; never the mask."""
        added = self._json.get("added_tokens", [])
        found = {token["content"]: token["id"] for token in added if token["special"]}
        for text, number in ((self.bos, self.bos_id), (self.eos, self.eos_id)):
            if isinstance(text, str):
                found[text] = number
        return {text: number for text, number in found.items() if text and number != self.mask_id}

    def keep(self, folder: Path, write: bool) -> "HuggingFaceTokenizer":
        """This tokenizer with its `sha256`; if `write`, its file is copied into `folder`.

        Raises ValueError when the folder has another tokenizer's file.
        """
        copy = folder / FILE_NAME
        keep_file(copy, self._data, self.path, "tokenizer", write)
        # Without a file of its own it goes on with the copy.
        path = self.path if self.text is None else str(copy)
        return replace(self, path=path, text=None, sha256=self._digest)

    @cached_property
    def _data(self) -> bytes:
        if self.text is not None:
            return self.text.encode()
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be read ({error.strerror}); type tokenizer.path= of a "
                "tokenizer.json, or train one with bdjax tokenizer"
            ) from error

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    @cached_property
    def _json(self) -> dict[str, Any]:
        try:
            found = json.loads(self._data)
            _require_byte_level(found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is no tokenizer.json of a byte-level BPE: {_sentence(error)}; train "
                "one with bdjax tokenizer"
            ) from error
        return found

    @cached_property
    def _lacking(self) -> frozenset[int]:
        """Bytes without a token, which the library would leave out of a text."""
        return frozenset(BYTE_OF[c] for c in set(BYTE_OF) - _words(self._json).keys())

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of every id of the file; empty for specials and gaps."""
        added = {token["id"]: token for token in self._json.get("added_tokens", [])}
        found = {
            i: bytes(BYTE_OF[c] for c in t) for t, i in _words(self._json).items() if i not in added
        }
        for i, token in added.items():
            found[i] = b"" if token["special"] else token["content"].encode()
        for i in self._special_ids:
            found[i] = b""
        return [found.get(i, b"") for i in range(self.file_size)]

    @cached_property
    def file_size(self) -> int:
        """One more than the largest id of the file."""
        added = [token["id"] for token in self._json.get("added_tokens", [])]
        return 1 + max([*_words(self._json).values(), *added])

    @cached_property
    def _special_ids(self) -> tuple[int, ...]:
        return (self.bos_id, self.eos_id, self.mask_id, self.cut_id)

    @cached_property
    def _library(self) -> Any:
        found = self._load()
        # A text that spells a special token means its characters.
        found.encode_special_tokens = True
        return found

    @cached_property
    def _library_with_specials(self) -> Any:
        return self._load()

    def _load(self) -> Any:
        _ = self._json
        library = _tokenizers()
        with _no_panic(self.path):
            found = library.Tokenizer.from_str(self._data.decode())
            found.no_truncation()
            found.no_padding()
        return found

    def spelling(self, number: int) -> str | None:
        """The text of a special token, None where the file has none."""
        added = self._json.get("added_tokens", [])
        return next((token["content"] for token in added if token["id"] == number), None)

    def to_json(self) -> str:
        """The file's content. Where prompts begin with BOS, a text that it encodes does too."""
        text = self.spelling(self.bos_id)
        if not self.leads or text is None or self.adds_bos():
            return self._data.decode()
        found = self._json | {
            "post_processor": leading(self._json.get("post_processor"), text, self.bos_id)
        }
        return json.dumps(found, ensure_ascii=False, indent=1)

    def adds_bos(self) -> bool:
        """Whether the file itself puts BOS before a text, by its post-processor."""
        with _no_panic(self.path):
            return self._library.encode("").ids[:1] == [self.bos_id]

    def _id(self, name: str, token: str | int) -> int:
        if isinstance(token, int):
            if token < 0:
                raise ValueError(f"{name}={token} must not be negative; type {name}=0")
            return token
        known = _words(self._json) | {
            added["content"]: added["id"] for added in self._json.get("added_tokens", [])
        }
        if token not in known:
            added = [t["content"] for t in self._json.get("added_tokens", []) if t["special"]]
            raise ValueError(
                f"{name}={token!r} is no token of {self.path}; type tokenizer.{name}= one of its "
                f"special tokens ({', '.join(added[:8]) or 'none'}) or the number {self.file_size}"
            )
        return known[token]


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int, folder: str | Path
) -> HuggingFaceTokenizer:
    """A byte-level BPE of `vocab_size` ids at most, written to folder/tokenizer.json.

    Ids 0 to 3 are BOS, EOS, the mask and CUT. Raises ValueError for fewer ids than the 256 bytes
    and these, FileExistsError when the file is there, ValueError without the library.
    """
    least = 256 + len(SPECIALS)
    if vocab_size < least:
        raise ValueError(
            f"--vocab-size {vocab_size} has no room for 256 bytes and {len(SPECIALS)} special "
            f"tokens; type --vocab-size {least} or more"
        )
    path = Path(folder) / FILE_NAME
    if path.exists():
        raise FileExistsError(f"{path} exists; type --out with another folder")
    library = _tokenizers()
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for document in documents:
            yield document.data.decode()

    made.train_from_iterator(texts(), trainer=trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.to_str(pretty=True), encoding="utf-8")
    return HuggingFaceTokenizer(path=str(path), cut=SPECIALS["cut"])


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ValueError(
            "a tokenizer.json needs the library tokenizers; type pip install 'bdjax[hf]'"
        ) from error
    return tokenizers


@contextmanager
def _no_panic(path: str) -> Iterator[None]:
    """What the library raises, its panics too, as ValueError: they are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ValueError, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(
            f"{path} cannot be used by the library tokenizers: {_sentence(error)}"
        ) from error


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _words(found: dict[str, Any]) -> dict[str, int]:
    return found["model"]["vocab"]


def _require_byte_level(found: dict[str, Any]) -> None:
    """Raises ValueError for a tokenizer whose tokens are not the text's bytes, each once."""
    model = found["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"{name} is {model[name]!r}, and must not be set")
    for step in _flat(found.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise ValueError(f"its normalizer ({step['type']}) changes the text")
    steps = _flat(found.get("pre_tokenizer"), "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in steps):
        raise ValueError("its pre-tokenizer has no ByteLevel")
    for step in steps:
        if step.get("add_prefix_space"):
            raise ValueError("its add_prefix_space changes the text")
        if step["type"] not in ("ByteLevel", "Split", "Digits") or (
            step.get("behavior") == "Removed"
        ):
            raise ValueError(f"its pre-tokenizer {step['type']} may change the text")
    for added in found.get("added_tokens", []):
        if type(added["content"]) is not str or type(added["special"]) is not bool:
            raise ValueError(f"its added token {str(added)[:80]} has no content or special")
        if not added["special"] and (added["lstrip"] or added["rstrip"]):
            raise ValueError(f"its token {added['content']!r} takes spaces away")
    added = {token["content"]: token["id"] for token in found.get("added_tokens", [])}
    strange = [word for word in model["vocab"] if word not in added and set(word) - set(BYTE_OF)]
    lacking = {c for c in set(BYTE_OF) - set(model["vocab"]) if BYTE_OF[c] in _IN_ASCII_TEXT}
    if strange or lacking:
        raise ValueError(f"{len(lacking)} bytes and {len(strange)} tokens do not fit its alphabet")
    numbers = [*model["vocab"].values(), *added.values()]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("one of its ids is no number from 0 on")
    if len(set(model["vocab"].values())) != len(model["vocab"]):
        raise ValueError("two of its tokens have one id")
    if max(numbers) >= len(numbers) + _MOST_GAPS:
        raise ValueError(f"its id {max(numbers)} leaves more than {_MOST_GAPS} ids without a token")


def _flat(step: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a nested sequence. Raises ValueError for what is none."""
    if step is None:
        return []
    if not isinstance(step, dict):
        raise ValueError(f"one of its {name} is {str(step)[:80]}")
    if step["type"] != "Sequence":
        return [step]
    return [one for inner in step[name] for one in _flat(inner, name)]


# What no text can do without; SmolLM2 has no token for some control characters.
_IN_ASCII_TEXT = (*range(0x20, 0x7F), *b"\t\n")
_MOST_GAPS = 1 << 16
