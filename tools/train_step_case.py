"""What the contestants of tools/bench_train_step.py share: the shape, their names, the clock."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

# Qwen3's mask token is one of its unused ids.
_MASK_FROM_END = 267


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The decoder (Qwen3, tied head) and its rows: `length` clean tokens and one noisy view.

    unroll: layers of ours in one iteration of the loop over them.
    """

    layers: int = 28
    unroll: int = 28
    width: int = 2048
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 6144
    vocab: int = 151_936
    length: int = 4096
    block: int = 32
    rope_theta: float = 1e6
    ar_weight: float = 0.0

    @property
    def mask_id(self) -> int:
        """The mask token: drawn as a token or scored as a label by nobody."""
        return max(self.vocab - _MASK_FROM_END, self.vocab // 2)


class Contestant(NamedTuple):
    """`side`-`master`:`remat`:`rows`: who, the masters' dtype, what is kept, rows per step."""

    side: str
    master: str
    remat: str
    rows: int

    def __str__(self) -> str:
        side = self.side if self.master == "float32" else f"{self.side}-{self.master}"
        return f"{side}:{self.remat}:{self.rows}"


def contestant(text: str) -> Contestant:
    """ours:dots:2, peer:none:1, peer-bfloat16:full:2; ValueError says what is accepted."""
    side, _, rest = text.partition(":")
    remat, _, rows = rest.partition(":")
    side, _, master = side.partition("-")
    master = master or "float32"
    remats = {"ours": ("none", "dots", "full"), "peer": ("none", "full")}
    masters = {"ours": ("float32",), "peer": ("float32", "bfloat16")}
    if master not in masters.get(side, ()) or remat not in remats[side] or not rows.isdigit():
        raise ValueError(
            f"{text!r} is no contestant; type ours:none|dots|full:ROWS, peer:none|full:ROWS or "
            "peer-bfloat16:none|full:ROWS"
        )
    return Contestant(side, master, remat, int(rows))


def timed(
    step: Callable[[], object], wait: Callable[[object], object], *, steps: int, samples: int
) -> dict:
    """Seconds per step: the median over samples of `steps` steps, which wait at their ends alone.

    spread: largest minus smallest sample over the median. The first step, which may compile, and
    the second are not timed.
    """
    begin = time.perf_counter()
    wait(step())
    first = time.perf_counter() - begin
    wait(step())
    found = []
    for _ in range(samples):
        begin = time.perf_counter()
        for _ in range(steps):
            last = step()
        wait(last)
        found.append((time.perf_counter() - begin) / steps)
    middle = statistics.median(found)
    return {
        "seconds": middle,
        "spread": (max(found) - min(found)) / middle,
        "samples": found,
        "first_step_seconds": first,
    }
