"""The passes of the Hopper kernels alone and together, beside cuDNN's causal attention.

    python tools/bench_hopper.py --length 4096 --block 32

First the outputs and gradients of a short packed row are compared with float32 dense attention, and
two runs bit by bit. Then each pass is timed in turn: milliseconds of a call, the median over five
rounds of calls queued one after another, and useful TFLOP/s (visible pairs alone: 4 H per pair and
head forward, 6 for dQ, 8 for dK and dV, 14 for all). `tools/bench_attention.py` compares with
others under one roof; this is for work on a pass.
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from arguments import positive  # noqa: E402
from attention_race import Case, normals  # noqa: E402

from pallas_kernels import CleanMode, Dense, Hopper  # noqa: E402
from pallas_kernels.hopper_backward import backward_keys, backward_queries  # noqa: E402
from pallas_kernels.hopper_forward import Sizes, forward  # noqa: E402
from pallas_kernels.hopper_product import BLOCKS  # noqa: E402
from pallas_kernels.hopper_tiles import key_plan, query_plan, shares_of  # noqa: E402


def gradients(impl, q, k, v, seen, d_out):
    """Output, log-sum-exp, dQ, dK, dV."""
    found, pull = jax.vjp(lambda *x: impl.attention(*x, seen), q, k, v)
    return *found, *pull((d_out, jnp.zeros(found[1].shape, jnp.float32)))


def check() -> str:
    """Relative errors by norms, and whether a second run gives the same bits."""
    case = Case(
        rows=2, heads=4, kv_heads=2, head_dim=128, length=384, block=24, documents=100,
        clean=CleanMode.TOKEN, dtype="bfloat16",
    )  # fmt: skip
    q, k, v, d_out = case.inputs()
    seen, run = case.intervals(), jax.jit(gradients, static_argnums=0)
    got, again = (run(Hopper(), q, k, v, seen, d_out) for _ in range(2))
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        want = run(Dense(), *wide, seen, d_out.astype(jnp.float32))
    errors = [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(got, want, strict=True)
    ]
    same = all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
    return f"errors {' '.join(f'{e:.1e}' for e in errors)}, same bits again: {same}"


def milliseconds(run, arguments) -> float:
    """Of a call."""
    jax.block_until_ready(run(*arguments))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            result = run(*arguments)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / 20)
    return 1e3 * statistics.median(rounds)


def passes(args, case: Case, seen) -> dict:
    """Name -> function, arguments, FLOPs per pair, head and head_dim; negative: of causal pairs."""
    tokens, width, impl = 2 * args.length, args.head_dim, Hopper()
    q, k, v, d_out = case.inputs()
    ends = jnp.stack(seen, axis=1)
    by_queries = jax.jit(lambda s: query_plan(s, tokens, 128, 128))(seen)
    shares = jax.jit(lambda p: shares_of(p, args.heads, BLOCKS))(by_queries)
    by_keys = jax.jit(lambda s: key_plan(s, tokens, 64, 128))(seen)
    lse = jnp.full((args.rows, args.heads, tokens), 9.0)
    rows = normals(4, "float32", (args.rows, args.heads, 2, tokens))[0]

    def causal(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def pulled(function):
        return lambda q, k, v, d_out: jax.vjp(function, q, k, v)[1](d_out)

    def sizes(stages):
        return Sizes(stages, width)

    found = {
        "forward": (
            lambda *x: forward(sizes(impl.forward_stages), *x),
            (by_queries, shares, q, k, v, ends),
            4,
        ),
        "dQ": (
            lambda *x: backward_queries(sizes(impl.queries_stages), *x),
            (by_queries, q, k, v, q, d_out, lse, lse, ends),
            6,
        ),
        "dK and dV": (
            lambda *x: backward_keys(sizes(impl.keys_stages), *x),
            (by_keys, q, k, v, d_out, rows, ends),
            8,
        ),
    }
    found["plan of queries"] = (
        lambda s: (plan := query_plan(s, tokens, 128, 128), shares_of(plan, args.heads, BLOCKS)),
        (seen,),
        0,
    )
    found["plan of keys"] = lambda s: key_plan(s, tokens, 64, 128), (seen,), 0

    def ours(q, k, v):
        return impl.attention(q, k, v, seen)[0]

    found["forward, all of it"] = ours, (q, k, v), 4
    found["forward and backward"] = pulled(ours), (q, k, v, d_out), 14
    if args.heads == args.kv_heads:
        found["cuDNN causal, forward"] = causal, (q, k, v), -4
        found["cuDNN causal, both"] = pulled(causal), (q, k, v, d_out), -14
    return found


def main() -> None:
    """Checks, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=positive, default=2)
    parser.add_argument("--heads", type=positive, default=16)
    parser.add_argument("--kv-heads", type=positive, default=16)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--length", type=positive, default=4096, help="clean tokens; a row is 2 x")
    parser.add_argument("--block", type=positive, default=32)
    parser.add_argument("--documents", type=positive, help="pack documents of so many tokens")
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    print(check(), flush=True)
    case = Case(clean=CleanMode.TOKEN, dtype="bfloat16", **vars(args))
    seen = case.intervals()
    pairs = float((seen.a1 - seen.a0 + seen.b1 - seen.b0).astype(jnp.float32).sum())
    causal = args.rows * args.length * (2 * args.length + 1)
    found = passes(args, case, seen)
    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(lambda x: jax.jit(x[0]).lower(*x[1]).compile(), found.values()))
    for (name, (_, arguments, per)), program in zip(found.items(), programs, strict=True):
        took = milliseconds(program, arguments)
        useful = abs(per) * args.head_dim * args.heads * (pairs if per > 0 else causal)
        rate = f"{useful / took / 1e9:6.1f} useful TFLOP/s" if per else ""
        print(f"{name:24s} {took:7.3f} ms {rate}", flush=True)


if __name__ == "__main__":
    main()
