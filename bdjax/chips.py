"""Accelerators by the numbers that bound a training step, per chip as their makers sell it.

TPUs: cloud.google.com/tpu/docs, pages v5e and tpu7x (the latter compares v5p, v6e and TPU7x); GPUs:
NVIDIA's H100 and H200 data sheets, SXM modules, dense products. Peaks of the data sheet: a large
matrix product reaches 70 to 95 % of them.
"""

from dataclasses import dataclass

GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    flops: bf16 FLOP/s. memory: HBM bytes. bandwidth: HBM bytes/s. links: bytes/s out of the chip
    over all its links (half of a bidirectional figure). devices: JAX devices per chip; numbers are
    per chip, `per_device` gives the share of one. cores: TensorCores per chip, which the names of
    v5p and TPU7x slices count. kinds: how `device_kind` starts.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    kinds: tuple[str, ...]
    devices: int = 1
    cores: int = 1

    def per_device(self) -> "Chip":
        """The share of one JAX device, as a chip of its own."""
        return Chip(
            name=self.name,
            flops=self.flops / self.devices,
            memory=self.memory / self.devices,
            bandwidth=self.bandwidth / self.devices,
            links=self.links / self.devices,
            kinds=self.kinds,
        )


V5E = Chip(
    name="v5e",
    flops=197e12,
    memory=16 * GIB,
    bandwidth=819e9,
    links=200e9,
    kinds=("TPU v5 lite", "TPU v5e"),
)
V5P = Chip(
    name="v5p",
    flops=459e12,
    memory=95 * GIB,
    bandwidth=2765e9,
    links=600e9,
    kinds=("TPU v5p", "TPU v5"),
    cores=2,
)
V6E = Chip(
    name="v6e",
    flops=918e12,
    memory=32 * GIB,
    bandwidth=1638e9,
    links=400e9,
    kinds=("TPU v6 lite", "TPU v6e"),
)
TPU7X = Chip(
    name="7x",
    flops=2307e12,
    memory=192 * GIB,
    bandwidth=7380e9,
    links=600e9,
    kinds=("TPU7x", "TPU v7x"),
    devices=2,
    cores=2,
)
H100 = Chip(
    name="h100",
    flops=989.4e12,
    memory=80e9,
    bandwidth=3350e9,
    links=450e9,
    kinds=("NVIDIA H100 80GB HBM3",),
)
H200 = Chip(
    name="h200",
    flops=989.4e12,
    memory=141e9,
    bandwidth=4800e9,
    links=450e9,
    kinds=("NVIDIA H200",),
)

# "TPU v5" alone is a v5p: the longer names of its generation must be tried before it.
CHIPS = (V5E, V5P, V6E, TPU7X, H100, H200)


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a JAX device, one device's share of it; None for a kind not listed here."""
    for chip in CHIPS:
        if device_kind.startswith(chip.kinds):
            return chip.per_device()
    return None
