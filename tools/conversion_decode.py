"""Tokens per forward against quality: continuations of held-out texts under the decoding rules.

Quality is the continuation's bits per byte under the AR model that was converted. Alone it rewards
repetition: `distinct` (different pairs of neighbouring tokens over all pairs, mean over the texts)
stands beside it, and the texts' own continuations and the AR model's samples are scored as well.
"""

import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from conversion_rows import Windows
from jaxtyping import Array, Bool, Int

import bdjax
from bdjax import likelihood
from bdjax.data import RowBatch
from bdjax.policies import Number, View, policy
from bdjax.stats import Stats

RULES = ("threshold", "steps", "entropy", "sequential", "random")
# What samples are shown of.
SHOWN = ("threshold", 0.9)


@policy
class AnyRule(bdjax.Policy):
    """RULES[rule] with its `number`, both of them data: a sweep over all rules compiles once."""

    rule: Number
    number: Number

    def select(self, stats: Stats, view: View) -> Bool[Array, "N W"]:
        """What the rule accepts."""
        rules = (
            bdjax.Threshold(threshold=self.number),
            bdjax.Static(steps=self.number),
            bdjax.EntropyBounded(budget=self.number),
            bdjax.Sequential(steps=self.number),
            bdjax.RandomOne(),
        )
        return jnp.stack([rule.select(stats, view) for rule in rules])[self.rule]


def settings(block_size: int) -> list[tuple[str, float]]:
    """(rule, number) of the sweep: thresholds, steps per block, nats, and one token at a time."""
    steps = sorted({max(1, block_size // n) for n in (1, 2, 4)}, reverse=True)
    return [
        *(("threshold", x) for x in (0.95, 0.9, 0.8, 0.6, 0.4)),
        *(("steps", float(x)) for x in steps),
        *(("entropy", x) for x in (0.1, 0.5, 1.0, 2.0)),
        ("sequential", float(block_size)),
        ("random", 0.0),
    ]


def prompts_of(found: dict[str, Windows], prompt: int, tokens: int, count: int) -> np.ndarray:
    """(count, prompt + tokens) ids with BOS: windows from all sources in turn.

    Fewer than `count` where there are no more. Raises ValueError where no window is long enough.
    """
    long = [[ids for ids in texts if len(ids) >= prompt + tokens] for texts in found.values()]
    turns = [ids for n in range(max(map(len, long))) for texts in long for ids in texts[n : n + 1]]
    if not turns:
        raise ValueError(
            f"no held-out window has {prompt} + {tokens} tokens; type --prompt and --tokens smaller"
        )
    return np.stack([ids[: prompt + tokens] for ids in turns[:count]])


def judge(
    ar: bdjax.LanguageModel, prompts: Int[np.ndarray, "N P"], written: Sequence[np.ndarray]
) -> dict:
    """Bits per byte of the texts under the AR model, and how varied they are.

    All bits over all bytes. Tokens without bytes, as the one that ends a text, are not scored.
    """
    tokenizer = ar.config.tokenizer
    sizes = tokenizer.token_bytes()
    width = prompts.shape[1]
    longest = width + max(len(ids) for ids in written)
    length = -(-longest // 64) * 64
    tokens = np.full((len(written), length), tokenizer.eos_id, np.int32)
    position = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    for row, given, ids in zip(tokens, prompts, written, strict=True):
        row[:width], row[width : width + len(ids)] = given, ids
    ends = width + np.array([[len(ids)] for ids in written])
    real = position < ends
    batch = RowBatch(
        tokens=tokens,
        segment=real.astype(np.int32),
        position=np.where(real, position, 0),
        trainable=real & (position >= width) & (sizes[tokens] > 0),
    )
    found = None
    if batch["trainable"].any():
        with jax.set_mesh(ar.config.mesh.build()):
            found = likelihood.evaluate(
                ar.config.objective, ar.model, ar.params, [batch], sizes, block_size=1
            ).ar
    pairs = [list(zip(ids, ids[1:], strict=False)) for ids in written if len(ids) > 1]
    counts = np.unique(np.concatenate(written), return_counts=True)[1]
    shares = counts / counts.sum()
    return {
        "judge_bits_per_byte": None if found is None else found.bits_per_byte,
        "judge_se": None if found is None else found.bits_se,
        "distinct": float(np.mean([len(set(p)) / len(p) for p in pairs])) if pairs else None,
        "unigram_entropy_bits": float(-(shares * np.log2(shares)).sum()),
        "mean_tokens": float(np.mean([len(ids) for ids in written])),
    }


def write(
    loaded: bdjax.LanguageModel,
    ar: bdjax.LanguageModel,
    prompts: Int[np.ndarray, "N P"],
    *,
    tokens: int,
    block_size: int,
    rule: str,
    number: float,
    temperature: float,
    shown: int = 0,
) -> dict:
    """One setting: every prompt continued, counted, judged; the first `shown` texts as they are."""
    begin = time.monotonic()
    results = bdjax.generate(
        loaded,
        prompts.tolist(),
        max_new_tokens=tokens,
        policy=AnyRule(rule=np.int32(RULES.index(rule)), number=np.float32(number)),
        block_size=block_size,
        temperature=temperature,
    )
    seconds = time.monotonic() - begin
    drawn = sum(int((result.step >= 0).sum()) for result in results)
    forwards = sum(result.forwards for result in results)
    record = {
        "block_size": block_size,
        "rule": rule,
        "number": number,
        "temperature": temperature,
        "tokens_per_forward": drawn / max(1, forwards),
        "stopped": sum(result.finish == "stop" for result in results) / len(results),
        "seconds": seconds,
    }
    record |= judge(ar, prompts, [result.tokens for result in results])
    if shown:
        record["texts"] = [result.text for result in results[:shown]]
    return record


def references(ar: bdjax.LanguageModel, texts: Int[np.ndarray, "N T"], prompt: int) -> dict:
    """The AR model's own samples, greedy and at temperature 1, and the texts as they go on."""
    given, truth = texts[:, :prompt], texts[:, prompt:]
    tokenizer = ar.config.tokenizer
    found = {
        f"ar-{temperature:g}": write(
            ar,
            ar,
            given,
            tokens=truth.shape[1],
            block_size=1,
            rule="sequential",
            number=1.0,
            temperature=temperature,
            shown=4,
        )
        for temperature in (0.0, 1.0)
    }
    held_out = judge(ar, given, list(truth)) | {"texts": [tokenizer.decode(x) for x in truth[:4]]}
    return found | {"truth": held_out, "given": [tokenizer.decode(x) for x in given[:4]]}


def sweep(
    loaded: bdjax.LanguageModel,
    ar: bdjax.LanguageModel,
    texts: Int[np.ndarray, "N T"],
    prompt: int,
    block_sizes: Sequence[int],
) -> list[dict]:
    """Every setting at every block size, greedy and at temperature 1; prints each as it comes."""
    found = []
    for size in block_sizes:
        for temperature in (0.0, 1.0):
            for rule, number in settings(size):
                one = write(
                    loaded,
                    ar,
                    texts[:, :prompt],
                    tokens=texts.shape[1] - prompt,
                    block_size=size,
                    rule=rule,
                    number=number,
                    temperature=temperature,
                    shown=4 if (rule, number) == SHOWN else 0,
                )
                found.append(one)
                bits = one["judge_bits_per_byte"]
                print(
                    f"B={size} T={temperature:g} {rule} {number:g}: "
                    f"{one['tokens_per_forward']:.2f} tokens per forward, "
                    f"{math.nan if bits is None else bits:.3f} bits/byte, "
                    f"{one['seconds']:.1f} s",
                    flush=True,
                )
    return found
