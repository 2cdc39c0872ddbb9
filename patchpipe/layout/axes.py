"""Coordinates of ranks on the mesh ``data × cfg × pipe × displaced × ring × ulysses × tensor``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

Axis = Literal["data", "cfg", "pipe", "displaced", "ring", "ulysses", "tensor"]
AXES: tuple[Axis, ...] = ("data", "cfg", "pipe", "displaced", "ring", "ulysses", "tensor")
DEGREES = ("data", "cfg", "pipefusion", "distrifusion", "ring", "ulysses", "tensor")  # what users call their sizes
SEQUENCE_AXES: tuple[Axis, ...] = ("displaced", "ring", "ulysses")  # ranks along these share the rows of a patch


@dataclass(frozen=True)
class Mesh:
    """The mesh and one rank's place on it. The last axis varies fastest, so its ranks are neighbours.

    Attributes:
        sizes: Size of each of ``AXES``.
        rank: This rank.
    """

    sizes: tuple[int, ...]
    rank: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes)

    def size(self, axis: Axis) -> int:
        """Number of ranks along an axis."""
        return self.sizes[AXES.index(axis)]

    def at(self, axis: Axis, rank: int | None = None) -> int:
        """Coordinate of a rank (this one by default) along an axis."""
        rank = self.rank if rank is None else rank
        after = prod(self.sizes[AXES.index(axis) + 1 :])
        return rank // after % self.size(axis)

    def peer(self, **moved: int) -> int:
        """The rank that stands where this one does, but for the axes given."""
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + moved.get(axis, self.at(axis))
        return rank

    def along(self, axis: Axis) -> tuple[int, ...]:
        """Ranks of this rank's line along an axis, itself included."""
        return tuple(self.peer(**{axis: index}) for index in range(self.size(axis)))

    @property
    def parts(self) -> int:
        """Ranks that share the rows of every patch."""
        return prod(self.size(axis) for axis in SEQUENCE_AXES)

    @property
    def part(self) -> int:
        """This rank's place among them: its rows come after those of the places before."""
        part = 0
        for axis in SEQUENCE_AXES:
            part = part * self.size(axis) + self.at(axis)
        return part

    def maker(self, data: int, cfg: int, pipe: int, part: int) -> int:
        """The rank that answers for a part of the rows; ranks along ``tensor`` all make the same answer."""
        moved = {"data": data, "cfg": cfg, "pipe": pipe, "tensor": 0}
        for axis in reversed(SEQUENCE_AXES):
            part, moved[axis] = divmod(part, self.size(axis))
        return self.peer(**moved)

    def stage(self, index: int) -> tuple[int, ...]:
        """Every rank of one pipeline stage."""
        return tuple(rank for rank in range(self.world_size) if self.at("pipe", rank) == index)


@lru_cache(maxsize=1024)  # asked for by every layer of every patch
def shares(total: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Ranges that split ``total`` into ``parts`` that differ by one at most; a part may be empty."""
    size, extra = divmod(total, parts)
    stops = [(index + 1) * size + min(index + 1, extra) for index in range(parts)]
    return tuple(zip((0, *stops[:-1]), stops, strict=True))
