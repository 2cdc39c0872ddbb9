"""All-to-all on two levels, where some links are slow: across domains first, then inside them.

Ranks of a domain reach each other over fast links, ranks of different domains over slow ones. In a flat exchange every
rank sends a message to each rank of every other domain. Here it sends one to each other domain, to the rank that stands
there where it stands itself, with all that is meant for that domain. What came is then handed on inside the domain;
what is meant for ranks of one's own domain sets out with the rest. The bytes over slow links are the same, in fewer and
larger messages (CoCoDiff, arXiv 2604.14561).

CoCoDiff goes inside first. Both orders send the same messages of the same sizes, over slow and fast links. But what
goes across first has nothing to wait for: it sets out at once, and the host is free to compute while it is on its way.
Only the fast part is left for when the result is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Coming, Exchange, Shape

ShapeOf = Callable[[int, int], Shape]


class Levels:
    """All-to-all of a line whose ranks are in domains of equal size.

    Args:
        inner: This rank's domain, over fast links.
        outer: The ranks that stand in their domains where this one does, over slow links.

    Attributes:
        index: This rank's place in the line.
        size: Ranks in the line.
    """

    def __init__(self, inner: Exchange, outer: Exchange) -> None:
        self.inner, self.outer = inner, outer
        self.index = outer.index * inner.size + inner.index
        self.size = outer.size * inner.size
        self._open: deque[Crossing] = deque()

    def place(self, domain: int, member: int) -> int:
        """The place in the line of a member of a domain."""
        return domain * self.inner.size + member

    def trade(self, sent: Sequence[Tensor], shape_of: ShapeOf) -> Crossing:
        """See ``Exchange.trade``. Several may be under way; they are taken in the order in which they were begun."""
        crossing = Crossing(self, sent, shape_of)
        self._open.append(crossing)
        return crossing

    def close(self, crossing: Crossing) -> None:
        """Notes that an exchange is taken.

        Raises:
            RuntimeError: It is not its turn: other ranks would be given what belongs to another exchange.
        """
        if not self._open or self._open[0] is not crossing:
            raise RuntimeError("an exchange on two levels was taken twice, or before one that was begun earlier")
        self._open.popleft()


class Crossing:
    """An exchange on two levels, on its way across domains.

    Args:
        levels: The line.
        sent: What each rank is given, by its place.
        shape_of: Shape of what a rank gives another.
    """

    def __init__(self, levels: Levels, sent: Sequence[Tensor], shape_of: ShapeOf) -> None:
        self._levels, self._shape_of = levels, shape_of
        own, members = levels.outer.index, range(levels.inner.size)
        stays = [sent[levels.place(own, member)] for member in members]
        nothing = sent[0].new_empty((0,))
        across = [
            nothing if domain == own else _packed([sent[levels.place(domain, member)] for member in members])
            for domain in range(levels.outer.size)
        ]
        self._coming: Coming = levels.outer.trade(across, lambda domain, _: self._from(domain))
        self._near: Coming = levels.inner.trade(
            stays, lambda one, other: shape_of(levels.place(own, one), levels.place(own, other))
        )

    def take(self) -> list[Tensor]:
        """What every rank gave this one, by its place; once only."""
        levels = self._levels
        levels.close(self)
        own, members = levels.outer.index, range(levels.inner.size)
        near, arrived = self._near.take(), self._coming.take()
        parts: list[Sequence[Tensor]] = []  # by other domain, then by the member that it is for
        for domain in self._others:
            sizes = [self._size(domain, levels.inner.index, member) for member in members]
            parts.append(arrived[domain].split(sizes))
        handed = [_packed([part[member] for part in parts]) for member in members]
        given = levels.inner.trade(handed, lambda member, _: self._by(member)).take()
        far = [self._unpacked(given[member], member) for member in members]
        return [
            near[member] if domain == own else far[member][domain]
            for domain in range(levels.outer.size)
            for member in members
        ]

    @property
    def _others(self) -> list[int]:
        """The other domains."""
        return [domain for domain in range(self._levels.outer.size) if domain != self._levels.outer.index]

    def _from(self, domain: int) -> Shape:
        """Elements that come from another domain, to be handed on; none from this one."""
        levels = self._levels
        if domain == levels.outer.index:
            return (0,)
        return (sum(self._size(domain, levels.inner.index, member) for member in range(levels.inner.size)),)

    def _by(self, member: int) -> Shape:
        """Elements that a member of this domain hands on to this rank."""
        levels = self._levels
        return (sum(self._size(domain, member, levels.inner.index) for domain in self._others),)

    def _size(self, domain: int, member: int, to: int) -> int:
        """Elements that a rank gives a member of this domain."""
        levels = self._levels
        return prod(self._shape_of(levels.place(domain, member), levels.place(levels.outer.index, to)))

    def _unpacked(self, flat: Tensor, member: int) -> dict[int, Tensor]:
        """What a member handed on, by the domain it is from."""
        levels = self._levels
        shapes = [self._shape_of(levels.place(domain, member), levels.index) for domain in self._others]
        parts = flat.split([prod(shape) for shape in shapes])
        return {at: part.view(shape) for at, part, shape in zip(self._others, parts, shapes, strict=True)}


def _packed(pieces: Sequence[Tensor]) -> Tensor:
    """Some tensors as one, flat."""
    return torch.cat([piece.reshape(-1) for piece in pieces])
