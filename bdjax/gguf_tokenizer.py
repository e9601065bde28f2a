"""The tokenizer in a GGUF file's metadata as a tokenizer.json of the library `tokenizers`.

`tokenizer.ggml.pre` only names how text is cut into words before merging. The rules behind a name
are those of the model's own tokenizer.json; a name that is not in the table is refused, since other
rules would give other ids without a word.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from bdjax.gguf_header import shown
from bdjax.pretrained import PretrainedError
from bdjax.tokenizer import added_token, bpe_json, byte_level

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _words(digits: str) -> str:
    """Words as in Llama 3 and Qwen2, which differ in how many digits stay together."""
    parts = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    return "|".join(parts)


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


class _Rules(NamedTuple):
    """What a name of `tokenizer.ggml.pre` stands for. whole_words: a word that is a token is left
    as it is, whatever the merges say. leads: BOS comes first where the file does not say.
    """

    steps: tuple[dict[str, Any], ...]
    normalizer: dict[str, Any] | None = None
    whole_words: bool = False
    leads: bool = False


_RULES = {
    "llama-bpe": _Rules(
        steps=(_split(_words(r"\p{N}{1,3}")), byte_level(use_regex=False)),
        whole_words=True,
        leads=True,
    ),
    "qwen2": _Rules(
        steps=(_split(_words(r"\p{N}")), byte_level(use_regex=False)), normalizer={"type": "NFC"}
    ),
    "smollm": _Rules(
        steps=({"type": "Digits", "individual_digits": True}, byte_level(use_regex=True))
    ),
}


def tokenizer_json(metadata: dict[str, Any], where: str) -> str:
    """The text of a tokenizer.json. `where` names the file in errors.

    Raises PretrainedError for another kind of tokenizer than byte-level BPE, unknown rules of
    cutting, and tokens, types and merges that do not fit together.
    """
    rules = _rules(metadata, where)
    tokens, kinds = _tokens(metadata, where)
    if len(set(tokens)) < len(tokens):
        raise PretrainedError(f"{where} is damaged: it has a token twice; fetch the file again")
    # Ids that only fill up the embedding have no text that could be met. Special tokens are part of
    # the vocabulary: the library numbers those that are not anew.
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    added = [
        added_token(i, token, special=kinds[i] == _CONTROL)
        for token, i in vocab.items()
        if kinds[i] != _NORMAL
    ]
    found = bpe_json(
        vocab=vocab,
        merges=_merges(metadata, vocab, where),
        added=added,
        pre_tokenizer={"type": "Sequence", "pretokenizers": list(rules.steps)},
        post_processor=_heads(metadata, rules, tokens, where),
        normalizer=rules.normalizer,
        ignore_merges=rules.whole_words,
    )
    return json.dumps(found, ensure_ascii=False)


def tokenizer_config(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    """What a tokenizer_config.json says: the special tokens by their text, whether BOS is added.

    Raises PretrainedError for ids outside the vocabulary.
    """
    tokens, _ = _tokens(metadata, where)
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in _SPECIALS.items():
        token = special_id(metadata, key, len(tokens), where)
        if token is not None:
            found[f"{name}_token"] = tokens[token]
    unsaid = {"add_bos_token": _rules(metadata, where).leads, "add_eos_token": False}
    for name, default in unsaid.items():
        found[name] = metadata.get(f"tokenizer.ggml.{name}", default) is True
    return found


def special_id(metadata: dict[str, Any], key: str, size: int, where: str) -> int | None:
    """The id that `tokenizer.ggml.<key>_token_id` gives, None where there is none.

    Raises PretrainedError for an id outside 0..size-1.
    """
    found = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if found is not None and (type(found) is not int or not 0 <= found < size):
        raise PretrainedError(
            f"{where} is damaged: tokenizer.ggml.{key}_token_id is {shown(found)}, expected 0 to "
            f"{size - 1}; fetch the file again"
        )
    return found


def _rules(metadata: dict[str, Any], where: str) -> _Rules:
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind != "gpt2":
        raise PretrainedError(
            f"{where} has a tokenizer of kind {shown(kind)} (tokenizer.ggml.model), and byte-level "
            "BPE ('gpt2') is read; take a file of a Llama 3, SmolLM2 or Qwen model"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix", False) is not False:
        raise PretrainedError(
            f"{where} sets tokenizer.ggml.add_space_prefix, which changes the text; take a file of "
            "a Llama 3, SmolLM2 or Qwen model"
        )
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _RULES:
        raise PretrainedError(
            f"{where} cuts text into words by {shown(name)} (tokenizer.ggml.pre), and the rules of "
            f"{', '.join(sorted(_RULES))} are known; import the model from its Hugging Face folder"
        )
    return _RULES[name]


def _tokens(metadata: dict[str, Any], where: str) -> tuple[list[str], list[int]]:
    """Texts and types of all ids."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise PretrainedError(
            f"{where} has no tokenizer (tokenizer.ggml.tokens); take another file"
        )
    kinds = metadata.get("tokenizer.ggml.token_type")
    known = (_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED)
    if (
        not isinstance(kinds, np.ndarray)
        or len(kinds) != len(tokens)
        or not np.isin(kinds, known).all()
    ):
        raise PretrainedError(
            f"{where} is damaged: tokenizer.ggml.token_type should give each of {len(tokens)} "
            f"tokens one of the types {known}; fetch the file again"
        )
    return tokens, kinds.tolist()


def _merges(metadata: dict[str, Any], vocab: dict[str, int], where: str) -> list[list[str]]:
    found = metadata.get("tokenizer.ggml.merges")
    if not isinstance(found, list):
        raise PretrainedError(f"{where} has no merges (tokenizer.ggml.merges); take another file")
    pairs = [merge.split(" ") for merge in found]
    for merge, pair in zip(found, pairs, strict=True):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise PretrainedError(
                f"{where} is damaged: the merge {shown(merge)} does not join two of its tokens to "
                "a third; fetch the file again"
            )
    return pairs


def _heads(
    metadata: dict[str, Any], rules: _Rules, tokens: list[str], where: str
) -> dict[str, Any]:
    """The post-processor: BOS before a text where the model's own tokenizer puts it."""
    bos = special_id(metadata, "bos", len(tokens), where)
    if bos is None or metadata.get("tokenizer.ggml.add_bos_token", rules.leads) is not True:
        return byte_level(use_regex=True)
    head = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [head, first],
        "pair": [head, first, head | {"SpecialToken": {"id": tokens[bos], "type_id": 1}}, second],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }
