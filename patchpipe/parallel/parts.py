"""Keys and values of one layer where each rank runs a part of the latent and sees the others' rows one step late."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Coming, Exchange
from patchpipe.stage.keys.forecast import SEQUENCE, Pace, Trend

ROWS = 1 + SEQUENCE  # dim of the rows in a part [key and value, batch, heads, rows, channels]


class PartStore:
    """Each rank's rows in a tensor of their own: they arrive where they stay.

    What a mask adds to the scores of the keys of all layers has a store like it, with one tensor in place of two.

    Belongs to one layer, one guidance branch and one request.

    Args:
        exchange: Among the ranks of the parts.

    Attributes:
        bytes: Of the rows it holds, with the room for those under way.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.bytes = 0
        self._own = exchange.index
        self._parts: list[Tensor | None] = [None] * exchange.size
        self._coming: Coming | None = None

    def expect(self, coming: Coming, size: int, pace: Pace | None = None) -> None:
        """Takes the promise of every part's rows, ``size`` bytes in all; a pace is of no use here."""
        self._coming, self.bytes = coming, size

    def beside(self, own: Tensor, pace: Pace | None = None) -> tuple[Tensor, ...]:
        """Keys and values of every row some step has computed: of this rank fresh, of the others one step old.

        They come part by part, each with its own text rows: attention does not depend on the order of keys. Waits for
        those under way. After that the others' are let go, since newer ones will have come when they are asked for.

        Args:
            own: This rank's ``[key and value, batch, heads, rows, channels]``.
            pace: Of no use here.
        """
        self._arrive()
        self._parts[self._own] = own
        seen = self._together()
        self._parts = [rows if part == self._own else None for part, rows in enumerate(self._parts)]
        return seen

    def fresh(self) -> tuple[Tensor, ...]:
        """Keys and values of every row, of the step at work; waits for those under way."""
        self._arrive()
        return self._together()

    def move(self, device: torch.device) -> None:
        """Takes all rows to another device, once those under way are there."""
        self._arrive()
        self._parts = [None if rows is None else rows.to(device) for rows in self._parts]

    def _together(self) -> tuple[Tensor, ...]:
        return torch.cat([rows for rows in self._parts if rows is not None], dim=ROWS).unbind(0)

    def _arrive(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            self._parts[:] = coming.take()


class MovingParts:
    """The same where others' rows are shown not as they were but where they will be: see ``stage.keys.forecast``.

    All rows are in one tensor, part by part. This rank's own have just been recomputed when the others' are asked for,
    and tell whether a forecast is of use.

    Args:
        exchange: Among the ranks of the parts.
        lengths: Rows of each part.
    """

    def __init__(self, exchange: Exchange, lengths: Sequence[int]) -> None:
        bounds = list(accumulate(lengths, initial=0))
        self._spans = list(pairwise(bounds))
        self._own, self._total = exchange.index, bounds[-1]
        self._trends: tuple[Trend, ...] = ()  # of keys and values
        self._known = dict.fromkeys(range(exchange.size), False)  # whether there are rows of it
        self._coming: tuple[Coming, Pace] | None = None
        self._room = 0

    @property
    def bytes(self) -> int:
        """Of the rows it holds, with their changes and the room for those under way."""
        return self._room + sum(trend.kept.nbytes + trend.bytes for trend in self._trends)

    def expect(self, coming: Coming, size: int, pace: Pace | None = None) -> None:
        """Takes the promise of every part's rows, ``size`` bytes in all, which a call of this pace computes."""
        assert pace is not None
        self._arrive()
        low, high = self._spans[self._own]
        self._coming, self._room = (coming, pace), size * (self._total - (high - low)) // self._total

    def beside(self, own: Tensor, pace: Pace | None = None) -> tuple[Tensor, ...]:
        """Keys and values of every row some step has computed: of this rank fresh, of the others forecast.

        Args:
            own: This rank's ``[key and value, batch, heads, rows, channels]``.
            pace: Of the call that computed them.
        """
        assert pace is not None
        self._arrive()
        self._write(self._own, own, pace, begins=True)
        if not all(self._known.values()):
            return own.unbind(0)
        return tuple(trend.kept for trend in self._trends)

    def fresh(self) -> tuple[Tensor, ...]:
        """Keys and values of every row, of the step at work; waits for those under way."""
        assert self._coming is not None
        (coming, pace), self._coming = self._coming, None
        pieces = coming.take()
        for part, rows in enumerate(pieces):
            self._write(part, rows, pace, begins=False)
        return torch.cat(pieces, dim=ROWS).unbind(0)

    def move(self, device: torch.device) -> None:
        """Takes all rows to another device, once those under way are there."""
        self._arrive()
        for trend in self._trends:
            trend.move(trend.kept.to(device))

    def _arrive(self) -> None:
        """Puts the others' rows in place, if some are under way."""
        if self._coming is None:
            return
        (coming, pace), self._coming = self._coming, None
        for part, rows in enumerate(coming.take()):
            if part != self._own:  # whose newer ones are there already, or are just coming
                self._write(part, rows, pace, begins=False)
        for trend in self._trends:
            trend.settle()

    def _write(self, part: int, rows: Tensor, pace: Pace, *, begins: bool) -> None:
        """Puts a part's rows in place; where they are the first of a call, the others' are then shown ahead."""
        if not self._trends:
            _, batch, heads, _, channels = rows.shape
            self._trends = tuple(Trend(rows.new_zeros(batch, heads, self._total, channels)) for _ in rows)
        for trend, fresh in zip(self._trends, rows.unbind(0), strict=True):
            trend.renew([self._spans[part]], fresh, pace, begins=begins, known=self._known[part])
        self._known[part] = True
