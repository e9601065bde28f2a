"""Block sizes as functions of the step. They are data, never shapes: a curriculum compiles once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True, kw_only=True)
class BlockSizes(ABC):
    """Base of the block-size schedules."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """All sizes of the run, in the order in which they come."""

    @property
    def largest(self) -> int:
        """The largest block of the run: what packing aligns to and canvases are wide."""
        return max(self.sizes)

    @abstractmethod
    def at(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """The block size at a step."""


@dataclass(frozen=True, kw_only=True)
class BlockSize(BlockSizes):
    """`first`, doubled every `double_every` steps from step `begin` on, up to `last`.

    B(s) = min(last, first 2^floor(max(0, s - begin) / double_every)) (NBDiff).
    """

    first: int
    last: int | None = None
    double_every: int = 0
    begin: int = 0

    def __post_init__(self):
        if self.first < 1:
            raise ValueError(
                f"block size first={self.first} must be at least 1; type block_size.first=4"
            )
        if self.double_every < 0:
            raise ValueError(
                f"double_every={self.double_every} must be 0 (constant) or more; "
                "type double_every=1000"
            )
        if (self.last is None) != (self.double_every == 0):
            raise ValueError(
                f"a growing block size needs both last and double_every, got last={self.last} "
                f"double_every={self.double_every}; type last={2 * self.first} double_every=1000"
            )
        if self.begin < 0 or (self.begin > 0 and self.last is None):
            raise ValueError(
                f"begin={self.begin} is the step from which a growing block size grows, with last="
                f"{self.last} double_every={self.double_every}; type begin=0"
            )
        if self.last is not None:
            ratio = self.last / self.first
            if ratio < 1 or int(ratio) & (int(ratio) - 1) or ratio != int(ratio):
                raise ValueError(
                    f"last={self.last} is not first={self.first} times a power of two; "
                    f"type last={8 * self.first}"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """first, 2 first, ..., last."""
        doublings = ((self.last or self.first) // self.first).bit_length() - 1
        return tuple(self.first << n for n in range(doublings + 1))

    def at(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """The block size at a step."""
        if self.last is None:
            return jnp.asarray(self.first, jnp.int32)
        grown = jnp.maximum(0, step - self.begin) // self.double_every
        return jnp.asarray(self.first, jnp.int32) << jnp.minimum(grown, len(self.sizes) - 1)


@dataclass(frozen=True, kw_only=True)
class BlockStages(BlockSizes):
    """`stages[i]` from step `begins[i]` on, up and down (TDAR, LLaDA2.0's warm-up and decay).

    begins starts with 0 and rises. Aligned packing asks that every size divides the largest.
    """

    stages: tuple[int, ...]
    begins: tuple[int, ...]

    def __post_init__(self):
        if not self.stages or min(self.stages) < 1:
            raise ValueError(
                f"stages={self.stages} must be block sizes of at least 1; type stages=4,8"
            )
        rising = all(a < b for a, b in zip(self.begins, self.begins[1:], strict=False))
        if len(self.begins) != len(self.stages) or self.begins[0] != 0 or not rising:
            example = ",".join(str(1000 * n) for n in range(len(self.stages)))
            raise ValueError(
                f"begins={self.begins} must give every one of stages={self.stages} its first step, "
                f"rising from 0; type begins={example}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The stages."""
        return self.stages

    def at(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """The block size at a step."""
        size = jnp.asarray(self.stages[0], jnp.int32)
        for begin, before, after in zip(
            self.begins[1:], self.stages, self.stages[1:], strict=False
        ):
            size += jnp.where(step >= begin, after - before, 0)
        return size
