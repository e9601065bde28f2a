"""What it costs to prepare a row for the kernels, and how much of what they visit is visible.

python tools/bench_tiles.py --length 16384 --documents 700

Intervals, tile map and both tile lists are part of the jitted step: the host prepares nothing.
"host" is how long a call keeps the caller, "device" how long the work takes from call to result,
medians in microseconds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from arguments import positive

from bdjax.layout import clean_places, join_places, noisy_places
from pallas_kernels import CleanMode, intervals
from pallas_kernels.tiles import pairs, tile_list, tile_map


def microseconds(function, *arguments, repeats: int = 50) -> tuple[float, float]:
    """Median time until the call returns, and until its result is there."""
    jax.block_until_ready(function(*arguments))
    returned, ready = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        found = function(*arguments)
        returned.append(time.perf_counter() - start)
        jax.block_until_ready(found)
        ready.append(time.perf_counter() - start)
    return 1e6 * statistics.median(returned), 1e6 * statistics.median(ready)


def main() -> None:
    """Prints a line for the intervals and one for each tile size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=positive, default=16384, help="clean tokens: half a row")
    parser.add_argument("--documents", type=positive, default=700, help="tokens each")
    parser.add_argument("--block", type=positive, default=32)
    parser.add_argument("--tiles", type=positive, nargs="+", default=[128, 256, 512])
    args = parser.parse_args()
    at = jnp.arange(args.length)[None]
    clean = clean_places(at // args.documents + 1, at % args.documents, args.block)
    row = join_places(clean, noisy_places(clean, 1)).meta
    find = jax.jit(lambda meta: intervals(meta, meta, CleanMode.TOKEN))
    bounds = find(row)
    print(jax.devices()[0].device_kind, jax.__version__, vars(args))
    print("intervals: host {:.0f}, device {:.0f}".format(*microseconds(find, row)))
    for tile in args.tiles:

        @jax.jit
        def lists(bounds, tile=tile):
            tiles = tile_map(bounds, 2 * args.length, tile, tile)
            return tiles, tile_list(tiles), tile_list(tiles, by_keys=True)

        share = float(lists(bounds)[0].live.sum()) * tile**2 / float(pairs(bounds))
        host, device = microseconds(lists, bounds)
        print(f"tiles of {tile}: host {host:.0f}, device {device:.0f}; visited/visible {share:.3f}")


if __name__ == "__main__":
    main()
