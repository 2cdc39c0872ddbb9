"""Where weights lie in the working buffer, which is filled round and round.

Positions count on for ever; a position's place in the buffer is what is left of it after whole rounds. Every tensor
lies in one piece: one that would cross the buffer's end begins at its start, and leaves a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 512  # bytes: as allocators give memory out, and vector instructions like it


@dataclass(frozen=True)
class Run:
    """Bytes of a block that lie in one piece in its home and in the buffer.

    Attributes:
        source: Where they begin in the block's home.
        start: Where they begin, as a position.
        size: How many there are.
    """

    source: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.start + self.size

    def chunks(self, size: int) -> list[Run]:
        """The same in pieces of ``size`` bytes at most."""
        return [Run(self.source + at, self.start + at, min(size, self.size - at)) for at in range(0, self.size, size)]


@dataclass(frozen=True)
class Placement:
    """Where the weights of one block lie.

    Attributes:
        starts: Where each tensor begins, as a position.
        runs: The bytes to copy.
        start: Where the block begins, a gap before it included.
        stop: Where it ends.
    """

    starts: tuple[int, ...]
    runs: tuple[Run, ...]
    start: int
    stop: int


def aligned(size: int) -> int:
    """Bytes that a tensor takes, up to where the next one may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(sizes: Sequence[int], start: int, ring: int) -> Placement:
    """Places a block's tensors one after the other.

    Args:
        sizes: Their bytes, aligned, in the order of the block's home.
        start: The first position that may be used.
        ring: Bytes of the buffer.
    """
    starts: list[int] = []
    runs: list[Run] = []
    position = start
    source = 0
    for size in sizes:
        if position % ring + size > ring:
            position += ring - position % ring
        starts.append(position)
        if runs and runs[-1].stop == position and position % ring:
            runs[-1] = Run(runs[-1].source, runs[-1].start, runs[-1].size + size)
        else:
            runs.append(Run(source, position, size))
        position, source = position + size, source + size
    return Placement(tuple(starts), tuple(runs), start, position)


def ring_bytes(largest_block: int, largest_tensor: int, depth: int, chunk: int) -> int:
    """Bytes of a buffer that holds the block at work and ``depth`` chunks of those after it.

    Args:
        largest_block: Streamed bytes of the largest block.
        largest_tensor: Bytes of the largest streamed tensor: the gap at the buffer's end is smaller.
        depth: Chunks.
        chunk: Bytes of a chunk.
    """
    return largest_block + aligned(depth * chunk) + largest_tensor if largest_block else 0
