"""What requests take on a replica, as it told; see ``scheduling.Costs``."""

from __future__ import annotations

from collections.abc import Mapping

from patchpipe.scheduling import Shape, kind_of
from patchpipe.serve.fleet.words import Price
from patchpipe.serve.steer.costs import GUESS, SWITCHES, Machine
from patchpipe.serve.steer.shapes import bare, joins


class Prices:
    """A replica's costs. A shape that it has not priced yet is guessed by its size.

    Args:
        machine: What the replica has to share.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._told: dict[Shape, Price] = {}

    def take(self, prices: Mapping[Shape, Price]) -> None:
        """Takes what it told."""
        self._told.update(prices)

    def told(self, shape: Shape) -> Price | None:
        """What it told of a shape."""
        return self._told.get(bare(shape))

    def degrees(self, shape: Shape) -> tuple[int, ...]:
        """See ``Costs``."""
        return tuple(self._price(shape).steps)

    def largest_batch(self, shape: Shape) -> int:
        """See ``Costs``."""
        return self._machine.together if shape.kind == "picture" and joins(shape) else 1

    def step(self, shape: Shape, batch: int, degree: int) -> float:
        """See ``Costs``."""
        return batch * self._price(shape).steps[degree]

    def switch(self, shape: Shape, before: int, after: int, *, moved: bool = False) -> float:
        """See ``Costs``."""
        return SWITCHES[kind_of(before, after, moved)]

    def starts(self, shape: Shape) -> float:
        """See ``Costs``: among what is after the steps."""
        return 0.0

    def ends(self, shape: Shape, batch: int) -> float:
        """See ``Costs``."""
        return batch * self._price(shape).ends

    def _price(self, shape: Shape) -> Price:
        found = self.told(shape)
        if found is not None:
            return found
        guess = GUESS * shape.width * shape.height * shape.frames / 1e6
        return Price({1: guess}, guess)
