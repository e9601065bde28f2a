"""Draws the tile map of a packed two-stream row: what kernels visit, where they need a mask.

python tools/tile_picture.py docs/tiles.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from bdjax.layout import clean_places, join_places, noisy_places
from pallas_kernels import CleanMode, dense_mask, intervals
from pallas_kernels.tiles import pairs, tile_map

COLOURS = ("white", "#dddddd", "#f2b134", "#4878a8", "#1f3f66")


def main() -> None:
    """One row of three documents in tiles of 16, clean queries above the noisy ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out")
    parser.add_argument("--tile", type=int, default=16)
    args = parser.parse_args()
    lengths = (112, 40, 104)
    segment = jnp.asarray(np.repeat(np.arange(3) + 1, lengths))[None]
    position = jnp.asarray(np.concatenate([np.arange(n) for n in lengths]))[None]
    clean = clean_places(segment, position, 8)
    row = join_places(clean, noisy_places(clean, 1)).meta
    bounds, size = intervals(row, row, CleanMode.TOKEN), row.stream.shape[1]
    found = tile_map(bounds, size, args.tile, args.tile)
    live, full = (np.asarray(x).any(axis=0)[0] for x in found)
    grow = np.ones((args.tile, args.tile), int)
    seen = np.asarray(dense_mask(row, row, CleanMode.TOKEN))[0]
    # 0 skipped, 1 visited but not visible, 2 visible under a mask, 4 visible in a full tile.
    shade = np.kron(live, grow) + seen * (1 + 2 * np.kron(full, grow))
    figure, axes = plt.subplots(figsize=(6, 6.3), dpi=110)
    axes.imshow(shade, cmap=ListedColormap(COLOURS), vmin=0, vmax=4, interpolation="nearest")
    axes.set_xticks([size // 4, 3 * size // 4], ["clean keys", "noisy keys"])
    axes.set_yticks([size // 4, 3 * size // 4], ["clean queries", "noisy queries"], rotation=90)
    for at in np.arange(0, size, args.tile) - 0.5:
        axes.axhline(at, color="#eeeeee", lw=0.4)
        axes.axvline(at, color="#eeeeee", lw=0.4)
    share = float(live.sum()) * args.tile**2 / float(pairs(bounds))
    axes.set_title(f"visited/visible {share:.2f} with tiles of {args.tile}", fontsize=10)
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
