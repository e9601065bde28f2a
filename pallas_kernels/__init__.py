"""Block-sparse attention for the two-stream mask of block diffusion; imports jax and numpy only.

`mask` defines who sees whom, `intervals` turns that into at most two key intervals per query, and
every implementation (`dense`, `blockwise`, `cudnn`, `hopper`, `mosaic`) has the same two functions:

    attention(q, k, v, intervals)                       -> out, lse     # differentiable in both
    prefix_attention(q, cache_k, cache_v, layer, ...)   -> out, lse     # forward only
"""

from pallas_kernels.blockwise import Blockwise
from pallas_kernels.cudnn import Cudnn
from pallas_kernels.dense import Dense
from pallas_kernels.hopper import Hopper
from pallas_kernels.intervals import Intervals, intervals
from pallas_kernels.kept import KEPT
from pallas_kernels.mask import CleanMode, Meta, dense_mask, visible
from pallas_kernels.merge import merge
from pallas_kernels.mosaic import Mosaic

__all__ = [
    "KEPT",
    "Blockwise",
    "CleanMode",
    "Cudnn",
    "Dense",
    "Hopper",
    "Intervals",
    "Meta",
    "Mosaic",
    "dense_mask",
    "intervals",
    "merge",
    "visible",
]
