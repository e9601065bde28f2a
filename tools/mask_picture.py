"""Draws the README's picture of the mask from the predicate itself.

python tools/mask_picture.py docs/mask.png
"""

import argparse

import numpy as np

from bdjax import plots
from pallas_kernels import CleanMode, Meta, dense_mask


def main() -> None:
    """One packed row: documents of 10 and 6 tokens, block size 4, clean stream and one view."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--block-size", type=int, default=4)
    args = parser.parse_args()
    order = np.concatenate([np.arange(10), np.arange(6)])
    segment = np.repeat([1, 2], [10, 6])
    stream = np.repeat([0, 1], len(order))
    order, segment = np.tile(order, 2), np.tile(segment, 2)
    meta = Meta(stream, segment, order // args.block_size, order)
    roles = ["clean" if s == 0 else "noisy 1" for s in stream]
    plots.mask_picture(dense_mask(meta, meta, CleanMode.TOKEN), roles, roles, args.path)


if __name__ == "__main__":
    main()
