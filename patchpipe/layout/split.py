"""Blocks split into stages, by what each costs: where a stage begins and ends, which may be within a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import inf

ROUNDING = 1e-9  # of sums of costs
WORTH_HOLDING = 0.97  # of the dearest stage's time: below it, two stages hold and run the block between them
DECIMALS = 3  # of a share of a block
SMALLEST_SHARE = 0.06  # of a block's patches, below which one stage takes them all


@dataclass(frozen=True)
class Boundary:
    """Where one stage ends and the next begins, which may be within a block: both then run it in turns.

    Turns are the halves of a batch, each with keys and values of its own, or the patches of a latent. Where 3.5 blocks
    would be a stage's fair share, it runs 4 for one half of them and 3 for the other.

    Attributes:
        block: Blocks before it, in running order.
        share: Of the turns in which the next block is run before it too, the first ones.
    """

    block: int
    share: float = 0.0

    def taken(self, turns: int) -> int:
        """In how many turns the next block is run before it."""
        return round(self.share * turns)

    def at(self, turn: int, turns: int) -> int:
        """Blocks before it in one of so many turns."""
        return self.block + (turn < self.taken(turns))

    @property
    def places(self) -> tuple[int, ...]:
        """Where it can be."""
        return (self.block, self.block + 1) if self.share else (self.block,)


@dataclass(frozen=True)
class StageBlocks:
    """The blocks of one stage.

    Attributes:
        start: Where it begins.
        stop: Where it ends.
        halves: Whether the turns are halves of a batch; else they are patches.
    """

    start: Boundary
    stop: Boundary
    halves: bool = False

    @property
    def held(self) -> range:
        """All blocks of the stage."""
        return range(self.start.block, self.stop.places[-1])

    @property
    def whole(self) -> range:
        """What it runs where there are no turns: a block that two stages share is the later one's."""
        return range(self.start.block, self.stop.block)

    def of(self, turn: int, turns: int = 2) -> range:
        """What it runs in a turn."""
        return range(self.start.at(turn, turns), self.stop.at(turn, turns))

    @property
    def shared(self) -> tuple[int, ...]:
        """The blocks that a neighbour runs too."""
        return tuple(boundary.block for boundary in (self.start, self.stop) if boundary.share)


def shared_blocks(split: Sequence[StageBlocks]) -> tuple[int, ...]:
    """The blocks that two stages run, each for some of the patches: both hold them, with their keys and values."""
    return tuple(stage.stop.block for stage in split if stage.stop.share and not stage.halves)


def sharing_stages(split: Sequence[StageBlocks]) -> tuple[int, ...]:
    """The stages that share their last block with the next one."""
    return tuple(index for index, stage in enumerate(split) if stage.stop.share and not stage.halves)


def stages_of(sizes: Sequence[float]) -> list[StageBlocks]:
    """Stages of so many blocks each, one or more; a fraction of a block is that share of its patches."""
    stops = [round(stop, DECIMALS) for stop in accumulate(sizes, initial=0)]
    return _between([Boundary(int(stop), round(stop % 1, DECIMALS)) for stop in stops])


def sizes_of(split: Sequence[StageBlocks]) -> tuple[float, ...]:
    """Blocks of each stage, as ``stages_of`` takes them."""
    stops = [round(stage.stop.block + stage.stop.share, DECIMALS) for stage in split]
    sizes = [round(stop - start, DECIMALS) for start, stop in pairwise([0.0, *stops])]
    return tuple(int(size) if size == int(size) else size for size in sizes)


def _between(boundaries: list[Boundary], *, halves: bool = False) -> list[StageBlocks]:
    return [StageBlocks(start, stop, halves) for start, stop in pairwise(boundaries)]


def split_costs(
    costs: list[float], stages: int, *, halved: bool = False, shared: bool | None = False
) -> list[StageBlocks]:
    """The stages whose dearest is as cheap as it can be.

    Args:
        costs: Of each block.
        stages: How many there are to be.
        halved: Whether the halves of a batch may have their own, where that makes stages enough cheaper.
        shared: Whether neighbours share the block between them by patches; ``None`` does so in the same case.
    """
    whole = balanced(costs, stages)
    limit = WORTH_HOLDING * _dearest(costs, whole)
    if halved:
        half_blocks = [cost / 2 for cost in costs for _ in range(2)]
        sizes = balanced(half_blocks, stages)
        split = _between([Boundary(stop // 2, stop % 2 / 2) for stop in accumulate(sizes, initial=0)], halves=True)
        if _dearest(half_blocks, sizes) <= limit and all(stage.of(0) and stage.of(1) for stage in split):
            return split
    if shared or (shared is None and sum(costs) / stages <= limit):
        split = _between(_even_boundaries(costs, stages))
        if all(_never_idle(stage) for stage in split):
            return split
    return stages_of(whole)


def _even_boundaries(costs: list[float], stages: int) -> list[Boundary]:
    """Boundaries between stages of the same cost, within a block unless they are all but between two."""
    until = [0.0, *accumulate(costs)]
    found = [Boundary(0)]
    for stage in range(1, stages):
        wanted = until[-1] * stage / stages
        block = max(index for index in range(len(costs)) if until[index] <= wanted)
        share = (wanted - until[block]) / costs[block]
        near = share < SMALLEST_SHARE or share > 1 - SMALLEST_SHARE
        found.append(Boundary(block + round(share)) if near else Boundary(block, round(share, DECIMALS)))
    return [*found, Boundary(len(costs))]


def _never_idle(stage: StageBlocks) -> bool:
    """Whether it has a block to run for every patch, however many there are."""
    return len(stage.whole) > 1 or (len(stage.whole) == 1 and stage.start.share <= stage.stop.share)


def _dearest(costs: list[float], sizes: tuple[int, ...]) -> float:
    return max(sum(costs[start:stop]) for start, stop in pairwise(accumulate(sizes, initial=0)))


def balanced(costs: list[float], stages: int) -> tuple[int, ...]:
    """Sizes of contiguous groups, none empty, whose dearest is as cheap as it can be; of such splits the most even."""
    until = [0.0, *accumulate(costs)]

    def stops(start: int, left: int) -> range:
        """Where the first of the groups left may end."""
        return range(start + 1, len(costs) - left + 2) if left > 1 else range(len(costs), len(costs) + 1)

    @cache
    def dearest(start: int, left: int) -> float:
        if not left:
            return 0.0
        return min(max(until[stop] - until[start], dearest(stop, left - 1)) for stop in stops(start, left))

    limit = dearest(0, stages) * (1 + ROUNDING)

    @cache
    def most_even(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if not left:
            return 0.0, ()
        options = []
        for stop in stops(start, left):
            cost = until[stop] - until[start]
            squares, rest = most_even(stop, left - 1)
            options.append((cost**2 + squares if cost <= limit else inf, (stop - start, *rest)))
        return min(options)

    return most_even(0, stages)[1]
