"""Which tiles the TPU kernels use on which chip, from a table by `tools/compile_tpu.py tiles`."""

import json
from importlib import resources
from typing import NamedTuple


class TileSizes(NamedTuple):
    """Tokens per tile: of queries and keys in training rows, of cached keys under a window."""

    query: int = 512
    key: int = 512
    window: int = 1024


def tile_sizes(kind: str, head_dim: int) -> TileSizes:
    """The tiles for a chip (`device_kind`) and head_dim; those of the next larger head_dim listed.

    A chip or a head_dim that the table does not list gets the defaults.
    """
    table = json.loads(resources.files("pallas_kernels").joinpath("tile_sizes.json").read_text())
    fits = [row for row in table["rows"] if row["kind"] == kind and row["head_dim"] >= head_dim]
    if not fits:
        return TileSizes()
    best = min(fits, key=lambda row: row["head_dim"])
    return TileSizes(best["query"], best["key"], best["window"])
