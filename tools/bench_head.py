"""The readout on one chip: NLL with its gradients, and what the sampler asks, beside their floors.

    python tools/bench_head.py --seconds 85

Floors are measured in the same run: four bf16 products by the platform's own library (logits twice,
d hidden, d head) for training, a sum over the head's bytes for sampling. Everything is compared
with float32 products at the highest precision before it is timed: relative errors by norms, of 512
scored rows. "x" is the time over the floor; memory is what the compiled program needs beside its
inputs and outputs. Cases run in the order of their weight until the seconds are spent.
"""

import argparse
import runpy
import sys
import time
import traceback
import types
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
# The readout alone, without what the command line imports.
package = types.ModuleType("bdjax")
package.__path__ = [str(ROOT / "bdjax")]
sys.modules.setdefault("bdjax", package)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from bdjax import nll, stats  # noqa: E402
from bdjax.readout import Shaping, TokenReadout, readout_stats  # noqa: E402
from pallas_kernels import hopper_head, hopper_product, hopper_stats  # noqa: E402

STARTED = time.time()
CHECKED = 512
KIND = nll.device_kind


def timed(run, *arguments, seconds: float = 0.4, least: int = 3) -> float:
    """Milliseconds of a call, the smallest of three means; calls are queued."""
    jax.block_until_ready(run(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    calls = max(least, min(200, int(seconds / 3 / (time.perf_counter() - start))))
    means = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            result = run(*arguments)
        jax.block_until_ready(result)
        means.append((time.perf_counter() - start) / calls)
        del result
    return min(means) * 1e3


def say(name: str, text: str) -> None:
    """One line, at once."""
    print(f"{time.time() - STARTED:5.0f} s  {name:44s} {text}", flush=True)


def compiled(function, *arguments):
    """The compiled function and its temporary memory in MiB."""
    program = jax.jit(function).lower(*arguments).compile()
    return program, program.memory_analysis().temp_size_in_bytes / 2**20


def distance(a, b) -> float:
    """Relative distance of two arrays by norms."""
    norm = jax.jit(lambda a, b: (jnp.linalg.norm(a - b), jnp.linalg.norm(b)))
    up, down = norm(a.astype(jnp.float32), b.astype(jnp.float32))
    return float(up / down)


def on(kernels: bool) -> None:
    """Whether the readout may use the chip's kernels. Raises where there are none."""
    nll.device_kind = KIND if kernels else lambda: "without kernels"
    if kernels and not nll.by_kernel(jnp.zeros((1, 256), jnp.bfloat16)):
        raise NotImplementedError(f"no kernels for {KIND()}")


class Training:
    """16k hidden rows, all of them scored unless said otherwise, in an order of their own."""

    def __init__(self, args):
        keys = jax.random.split(jax.random.key(0), 5)
        shape = 2, args.rows // 2
        self.vocab = args.vocab
        self.hidden = jax.random.normal(keys[0], (*shape, args.width), jnp.bfloat16)
        scale = 1.5 * args.width**-0.5
        self.head = jax.random.normal(keys[1], (args.vocab, args.width), jnp.bfloat16) * scale
        self.head = self.head.astype(jnp.bfloat16)
        order = jax.random.permutation(keys[2], shape[1])
        self.rows = jnp.broadcast_to(order, shape).astype(jnp.int32)
        self.labels = jax.random.randint(keys[3], shape, 0, args.vocab - 1)
        self.d_nll = jax.random.uniform(keys[4], shape)
        self.flops = 2 * args.rows * args.vocab * args.width

    def scored(self, count: int):
        return (jnp.arange(self.rows.size) < count).reshape(self.rows.shape)

    def arguments(self, count: int):
        return (
            self.hidden,
            self.head,
            self.rows,
            self.labels,
            self.scored(count),
            self.d_nll,
        )

    def reference(self):
        """NLL of the first `CHECKED` rows and both gradients, in float32."""

        @jax.jit
        def run(hidden, head, rows, labels, d_nll):
            with jax.default_matmul_precision("highest"):
                x = hidden[0].astype(jnp.float32)[rows[0, :CHECKED]]
                head = head.astype(jnp.float32)
                logits = (x @ head.T).at[:, self.vocab - 1].set(-jnp.inf)
                log_p = jax.nn.log_softmax(logits)
                target = labels[0, :CHECKED]
                loss = -jnp.take_along_axis(log_p, target[:, None], axis=1)[:, 0]
                d_logits = jnp.exp(log_p) - jax.nn.one_hot(target, self.vocab)
                d_logits *= d_nll[0, :CHECKED, None]
                d_x = jnp.zeros(hidden[0].shape).at[rows[0, :CHECKED]].add(d_logits @ head)
                return loss, d_x, d_logits.T @ x

        return run(self.hidden, self.head, self.rows, self.labels, self.d_nll)

    def contest(self, name: str, scored_nll, floor: float, counts=()) -> None:
        """Checks, then times forward, and forward and backward together."""

        def both(hidden, head, rows, labels, scored, d_nll):
            value, pull = jax.vjp(lambda h, w: scored_nll(h, w, rows, labels, scored), hidden, head)
            return value, *pull(d_nll)

        everything = self.arguments(self.rows.size)
        program, memory = compiled(both, *everything)
        value, d_hidden, d_head = program(*self.arguments(CHECKED))
        expected = self.reference()
        found = value[0, :CHECKED], d_hidden[0], d_head
        errors = [distance(a, b) for a, b in zip(found, expected, strict=True)]
        del expected, d_hidden, d_head, found
        text = "errors " + " ".join(f"{e:.1e}" for e in errors)
        if not max(errors) < 2e-2:
            say(name, f"WRONG: {text}")
            return
        ms = timed(program, *everything)
        forward, forward_memory = compiled(lambda *a: scored_nll(*a), *everything[:5])
        once = timed(forward, *everything[:5])
        say(
            name,
            f"{ms:7.2f} ms = {ms / floor:.3f} x; forward {once:6.2f}; memory {memory:.0f} "
            f"(forward {forward_memory:.0f}) MiB; {text}",
        )
        for count in counts:
            part = timed(program, *self.arguments(count), seconds=0.2)
            say(f"  {count} rows scored", f"{part:7.2f} ms = {part / ms:.3f} of all rows'")


def floors(case: Training) -> float:
    """Milliseconds of the four products; each is a program of its own."""
    x = case.hidden.reshape(-1, case.hidden.shape[-1])
    logits, _ = compiled(lambda x, w: x @ w.T, x, case.head)
    d = logits(x, case.head)
    d_x, _ = compiled(lambda d, w: d @ w, d, case.head)
    d_w, _ = compiled(lambda d, x: d.T @ x, d, x)
    times = timed(logits, x, case.head), timed(d_x, d, case.head), timed(d_w, d, x)
    total = 2 * times[0] + times[1] + times[2]
    rates = " ".join(f"{t:.2f} ({case.flops / t / 1e9:.0f})" for t in times)
    say("four products: logits, d hidden, d head", f"{total:.2f} ms; ms (TFLOP/s) {rates}")
    return total


def pieces(case: Training, chunk: int) -> None:
    """The kernels one by one: TFLOP/s, whole vocabulary forward, one chunk backward."""
    x = case.hidden.reshape(-1, case.hidden.shape[-1])
    rows, width = x.shape
    count, first = jnp.int32(rows), jnp.int32(4 * chunk)
    banned = (jnp.int32(case.vocab - 1),)
    target, ones = case.labels.reshape(-1), jnp.ones((rows,), jnp.float32)
    flops = 2 * rows * chunk * width
    run, _ = compiled(
        lambda x, w, t: hopper_head.statistics(x, w, t, count, banned), x, case.head, target
    )
    ms = timed(run, x, case.head, target)
    say("  kernel: statistics", f"{ms:7.2f} ms, {case.flops / ms / 1e9:.0f} TFLOP/s")

    def logit_gradients(x, head, target, ones):
        return hopper_head.logit_gradients(
            x, head, target, 10 * ones, ones, count, first, chunk, banned
        )

    run, _ = compiled(logit_gradients, x, case.head, target, ones)
    d = run(x, case.head, target, ones)
    ms = timed(run, x, case.head, target, ones)
    say(f"  kernel: logit gradients of {chunk}", f"{ms:7.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s")

    # Three at a time in place: the copies of what a Ref starts with are paid once.
    def rows_of(d, head):
        total = jax.new_ref(jnp.zeros((rows, width), jnp.float32))
        for _ in range(3):
            hopper_head.add_row_gradients(d, head, total, count, first)
        return jax.freeze(total)

    def head_of(d, x):
        total = jax.new_ref(jnp.zeros((chunk, width), jnp.bfloat16))
        for _ in range(3):
            hopper_head.set_head_gradients(d, x, total, count, jnp.int32(0))
        return jax.freeze(total)

    for name, function, other in (("row", rows_of, case.head), ("head", head_of, x)):
        run, _ = compiled(function, d, other)
        ms = timed(run, d, other) / 3
        say(
            f"  kernel: {name} gradients of {chunk}",
            f"{ms:7.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s",
        )


class Sampling:
    """A few slots of one draw each, temperature 0.8."""

    def __init__(self, case: Training, slots: int):
        self.head, self.slots = case.head, slots
        self.hidden = case.hidden[:1, :slots]
        self.temperature = jnp.full((1, slots), 0.8)
        self.keys = jax.random.key_data(jax.random.split(jax.random.key(1), (1, slots)))
        self.vocab = case.vocab

    def contest(self, name: str, floor: float, chunk: int = 8192, top_k: int | None = None) -> None:
        it = TokenReadout(
            vocab_size=self.vocab,
            width=self.head.shape[1],
            banned=(self.vocab - 1,),
            vocab_chunk=chunk,
        )

        def run(hidden, head, temperature, keys):
            kept = None if top_k is None else jnp.full((1,), top_k)
            shaping = Shaping(temperature, kept)
            return readout_stats.__wrapped__(
                it, hidden, head, shaping, jax.random.wrap_key_data(keys)
            )

        arguments = self.hidden, self.head, self.temperature, self.keys
        program, memory = compiled(run, *arguments)
        found = program(*arguments)
        text = self.errors(found) if top_k is None else ""
        ms = timed(program, *arguments)
        say(name, f"{ms:7.3f} ms = {ms / floor:.3f} x; memory {memory:.1f} MiB; {text}")

    def errors(self, found) -> str:
        """Largest errors against float32 logits of all ids, and how many tokens agree."""

        @jax.jit
        def reference(hidden, head, temperature, keys):
            with jax.default_matmul_precision("highest"):
                logits = hidden[0].astype(jnp.float32) @ head.astype(jnp.float32).T
            logits = logits.at[:, self.vocab - 1].set(-1e30)
            view = stats.Vocabulary(
                count=1,
                chunk=lambda index: (jnp.arange(self.vocab), logits),
                axes=(),
                temperature=temperature[0],
                keys=jax.random.wrap_key_data(keys)[0],
            )
            return stats.summarise(stats.scan(view, False, self.vocab), None, temperature[0])

        want = reference(self.hidden, self.head, self.temperature, self.keys)
        agree = float((want.token == found.token[0]).mean())
        names = ("top_prob", "gap", "entropy", "logprob_raw", "prob")
        same = np.asarray(want.token == found.token[0])
        worst = {
            n: float(np.abs(np.asarray(getattr(want, n) - getattr(found, n)[0]))[same].max())
            for n in names
        }
        return f"tokens {agree:.3f}; " + " ".join(f"{n} {e:.0e}" for n, e in worst.items())

    def kernel(self, width: int, floor: float) -> None:
        x = jnp.pad(self.hidden[0], ((0, -self.slots % hopper_stats.ROWS), (0, 0)))
        scale = jnp.full((x.shape[0],), 0.8)
        keys = jnp.pad(self.keys[0], ((0, x.shape[0] - self.slots), (0, 0)))
        run, _ = compiled(
            lambda *a: hopper_stats.statistics(*a, 0, (self.vocab - 1,), width=width)[::3],
            *(x, self.head, scale, keys),
        )
        ms = timed(run, x, self.head, scale, keys)
        say(
            f"  kernel: {self.slots} rows, tiles of {width} ids",
            f"{ms:7.3f} ms = {ms / floor:.3f} x",
        )


def reading(case: Training) -> float:
    """Milliseconds to read the head once: the best of three ways to add it up."""
    ways = {
        "rows": lambda w: w.astype(jnp.float32).sum(axis=1),
        "columns": lambda w: lax.reduce(w, jnp.bfloat16(-jnp.inf), lax.max, (0,)),
        "all": lambda w: w.astype(jnp.float32).sum(),
    }
    times = {}
    for name, way in ways.items():
        run, _ = compiled(way, case.head)
        times[name] = timed(run, case.head)
    best = min(times.values())
    text = " ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    say(
        "reading the head once", f"{best:.3f} ms, {case.head.nbytes / best / 1e6:.0f} GB/s ({text})"
    )
    run, _ = compiled(lambda w: w + 1, case.head)
    ms = timed(run, case.head)
    say("copying it", f"{ms:.3f} ms, {2 * case.head.nbytes / ms / 1e6:.0f} GB/s read and written")
    return best


def cases(case: Training, args):
    """Name and function of everything, the weightiest first."""
    results = {}
    chunks = nll.Chunks((case.vocab - 1,), 1024, 8192)
    kernel_gradients = hopper_head.gradients

    def plain(rows, ids):
        on(False)
        it = nll.Chunks(chunks.banned, rows, ids)
        case.contest(f"XLA, {rows} rows by {ids} ids", partial(nll.scored_nll, it), results["four"])

    def kernels(chunk, counts=()):
        on(True)
        hopper_head.gradients = partial(kernel_gradients, chunk=chunk)
        name = f"kernels, chunks of {chunk} ids"
        try:
            case.contest(name, partial(nll.scored_nll, chunks), results["four"], counts)
        finally:
            hopper_head.gradients = kernel_gradients

    def varied(module, name, value):
        before = getattr(module, name)
        setattr(module, name, value)
        say(f"{name} = {value} instead of {before}", "")
        try:
            pieces(case, 2048)
        finally:
            setattr(module, name, before)

    def before():
        earlier = runpy.run_path(args.before, run_name="earlier_readout")
        it = earlier["TokenReadout"](vocab_size=case.vocab, width=args.width, banned=chunks.banned)
        case.contest(args.before, partial(earlier["_scored_nll"], it), results["four"])

    def sampling(slots, name, kernels, **options):
        on(kernels)
        Sampling(case, slots).contest(f"sampling, {slots} rows: {name}", results["read"], **options)

    def tiles(slots, *widths):
        for width in widths:
            Sampling(case, slots).kernel(width, results["read"])

    yield lambda: results.update(four=floors(case))
    yield lambda: kernels(2048, (args.rows // 2, 1000))
    yield lambda: pieces(case, 2048)
    yield lambda: results.update(read=reading(case))
    yield lambda: tiles(64, *hopper_stats.WIDTHS)
    yield lambda: sampling(64, "kernel", True)
    yield lambda: sampling(64, "XLA", False)
    yield lambda: kernels(4096)
    yield lambda: sampling(256, "kernel", True)
    yield lambda: sampling(256, "XLA", False)
    if args.before:
        yield before
    yield lambda: plain(2048, 8192)
    yield lambda: varied(hopper_product, "CLUSTER", 1)
    yield lambda: varied(hopper_product, "_GROUP", 4)
    yield lambda: varied(hopper_product, "_GROUP", 16)
    yield lambda: sampling(64, "XLA, half the ids at a time", False, chunk=75_968)
    yield lambda: sampling(64, "XLA, top-k", False, top_k=20)
    yield lambda: pieces(case, 4096)
    yield lambda: plain(4096, 4096)
    yield lambda: sampling(64, "XLA, top-k, half the ids", False, chunk=75_968, top_k=20)
    yield lambda: plain(1024, 8192)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=85, help="no case starts later")
    parser.add_argument("--before", help="a readout.py of before `bdjax.nll`, to compare with")
    parser.add_argument("--skip", type=int, nargs="*", default=[], help="numbers of cases")
    args = parser.parse_args()
    device = jax.devices()[0]
    size = f"{args.rows} rows, V {args.vocab}, D {args.width}"
    print(f"{device.device_kind}, jax {jax.__version__}, {size}")
    case = Training(args)
    for number, run in enumerate(cases(case, args)):
        if time.time() - STARTED > args.seconds:
            say("out of time", f"from case {number} on")
            break
        if number in args.skip:
            continue
        try:
            run()
        except Exception:
            say("FAILED", traceback.format_exc(limit=-3).replace("\n", " | ")[-900:])


if __name__ == "__main__":
    main()
