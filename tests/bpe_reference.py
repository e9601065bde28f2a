"""Byte-level BPE in plain Python: words by `re` and Unicode's tables, merges one rank at a time."""

import functools
import re
import sys
import unicodedata


@functools.cache
def letters_and_numbers():
    r"""\p{L} and \p{N} as the insides of character classes."""
    ranges = {"L": [], "N": []}
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))[0]
        if kind not in ranges:
            continue
        if ranges[kind] and ranges[kind][-1][1] == code - 1:
            ranges[kind][-1][1] = code
        else:
            ranges[kind].append([code, code])
    return ["".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in found) for found in ranges.values()]


@functools.cache
def cutter(pre):
    letter, number = letters_and_numbers()
    if pre == "smollm":
        pattern = (
            f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{number}]+"
            rf"| ?[^\s{letter}{number}]+|\s+(?!\S)|\s+"
        )
    else:
        digits = f"[{number}]{{1,3}}" if pre == "llama-bpe" else f"[{number}]"
        pattern = (
            rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letter}{number}]?[{letter}]+|{digits}"
            rf"| ?[^\s{letter}{number}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    return re.compile(pattern)


def words(text, pre):
    """The words that are merged each for itself."""
    if pre == "qwen2":
        text = unicodedata.normalize("NFC", text)
    if pre != "smollm":
        return cutter(pre).findall(text)
    _, number = letters_and_numbers()
    # Every digit stands alone before anything else is looked at.
    parts = re.split(f"([{number}])", text)
    return [word for part in parts for word in cutter(pre).findall(part)]


def symbols():
    """Byte to the character that stands for it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def encode(text, pre, tokens, merges, specials):
    """Ids of a text in which the texts of `specials` are those tokens."""
    ids = {token: i for i, token in enumerate(tokens)}
    rank = {tuple(merge.split(" ")): n for n, merge in enumerate(merges)}
    symbol = symbols()
    found = []
    for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text):
        if part in specials:
            found.append(ids[part])
            continue
        for word in words(part, pre):
            pieces = [symbol[byte] for byte in word.encode()]
            if pre == "llama-bpe" and "".join(pieces) in ids:
                pieces = ["".join(pieces)]
            while len(pieces) > 1:
                pairs = list(zip(pieces, pieces[1:], strict=False))
                best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
                if best not in rank:
                    break
                at = pairs.index(best)
                pieces[at : at + 2] = ["".join(best)]
            found += [ids[piece] for piece in pieces if piece in ids]
    return found
