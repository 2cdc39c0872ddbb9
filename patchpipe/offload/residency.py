"""Which weights stay on the device: spread so that every block waits for as long as any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

HALVINGS = 40  # of the interval in which the time is looked for that all blocks wait


def spread(sizes: Sequence[float], seconds: Sequence[float], bandwidth: float, resident: float) -> list[float]:
    """Bytes of each block that are to stay.

    A block whose weights come while the one before computes can have as many come as that takes. So what comes of each
    is B·(T + e), with one e for all: the time it waits, or has to spare where e is below 0.

    Args:
        sizes: Bytes of each block.
        seconds: How long each computes; what matters is the block before, in the order they run round and round.
        bandwidth: Bytes a second.
        resident: Bytes that are to stay, of all blocks together.
    """
    before = [seconds[block - 1] for block in range(len(sizes))]
    wanted = sum(sizes) - min(resident, sum(sizes))

    def comes(size: float, each: float, wait: float) -> float:
        return min(size, max(0.0, bandwidth * (each + wait)))

    kinds = Counter(zip(sizes, before, strict=True))  # models have many blocks of few kinds
    low, high = -max(before, default=0.0), max(sizes, default=0.0) / bandwidth
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        come = sum(count * comes(*kind, middle) for kind, count in kinds.items())
        low, high = (middle, high) if come < wanted else (low, middle)
    return [size - comes(size, each, high) for size, each in zip(sizes, before, strict=True)]


def chosen(weights: Sequence[Sequence[int]], targets: Sequence[float]) -> list[list[int]]:
    """The weights of each block that stay, by number: as many bytes as wanted, on the whole.

    A matrix stays whole or comes whole. What a block gets too little the next gets more, and never all blocks
    together get more than is wanted.

    Args:
        weights: Bytes of each block's weights.
        targets: Bytes of each block that are to stay.
    """
    owed, found = 0.0, []
    for sizes, target in zip(weights, targets, strict=True):
        owed += target
        staying = []
        for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
            if sizes[number] <= owed + 0.5:
                staying.append(number)
                owed -= sizes[number]
        found.append(sorted(staying))
    return found
