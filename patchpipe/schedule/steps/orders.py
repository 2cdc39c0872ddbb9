"""What is to become of requests, told by rank 0 to all ranks at the same point of their programs.

Telling does not wait for anybody: a rank that is behind finds the words when it comes to that point. A rank that is
ahead waits for them, which happens rarely: rank 0 runs the first stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from patchpipe.distributed.mesh import Group
from patchpipe.schedule.steps.verbs import Verb

MOST = 8  # orders told at one point; more of them wait for the next
KEPT = 64  # points whose words may be under way


@dataclass(frozen=True)
class Order:
    """One of them.

    Attributes:
        verb: What is to be done.
        number: The request's.
        option: See ``Verb``.
    """

    verb: Verb
    number: int = 0
    option: int = 0


Next = Callable[[float], list[Order]]  # the orders that have come, at most ``MOST``; waits for them so many seconds


class Orders:
    """Brings the orders to all ranks.

    Args:
        group: The ranks.
        given: Gives the orders, on rank 0.
    """

    def __init__(self, group: Group, given: Next) -> None:
        self._given, self._leads = given, group.rank == 0
        wire = group.control_wire() if group.world_size > 1 else None
        others = range(1, group.world_size) if self._leads else [0]
        self._ways = [] if wire is None else [wire.channel(rank) for rank in others]

    def hear(self, seconds: float = 0.0) -> list[Order]:
        """What is to be done at this point; every rank comes to it.

        Args:
            seconds: How long rank 0 waits for an order. It then tells that there is none, so that the others know that
                it is there.

        Raises:
            PatchpipeError: A rank died or did not answer in time.
        """
        if not self._leads:
            return _read(self._ways[0].expect((1 + 3 * MOST,), torch.int64).take())
        orders = self._given(seconds)
        for way in self._ways:
            way.next_call(KEPT)
            way.send(_written(orders))
            if seconds:  # nothing else is under way, and a rank that has died must not go unnoticed
                way.drain()
        return orders


def _written(orders: list[Order]) -> torch.Tensor:
    assert len(orders) <= MOST
    words = torch.zeros(1 + 3 * MOST, dtype=torch.int64)
    words[0] = len(orders)
    for at, order in enumerate(orders):
        words[1 + 3 * at : 4 + 3 * at] = torch.tensor([order.verb, order.number, order.option])
    return words


def _read(words: torch.Tensor) -> list[Order]:
    count, *rest = words.tolist()
    return [Order(Verb(rest[3 * at]), rest[3 * at + 1], rest[3 * at + 2]) for at in range(count)]
