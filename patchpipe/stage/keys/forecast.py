"""Forecast of stale keys and values: shown not as they were, but where they will be.

Between two calls the noise level falls by a known step, and keys and values move almost in a line. A row that no
patch has recomputed yet is therefore shown as ``A + r·D``: its last true value, and the change that led there, as far
on as the noise level has gone on. ``D`` is kept in eight bits. The sum stands in the place of the true row, which is
found again as ``shown - r·D``; so nothing is kept twice.

Where a scheduler adds fresh noise between two calls, the last change says nothing of the next one. The rows of the
first patch tell: they have just been recomputed, so what would have been forecast for them can be compared with what
came. Where it does not help, rows are shown as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchpipe.stage.rows import Range

SEQUENCE = 2  # dim of the rows in [batch, heads, rows, channels]
LEVELS = 127  # of eight bits with a sign
WORTH = 0.25  # the part of the forecast change that must have come true in the first patch's rows
FURTHEST = 4.0  # times the last change


@dataclass(frozen=True)
class Pace:
    """How the noise level of a call follows those of the calls before; numbers stay on the device.

    Attributes:
        ahead: The step to this call's noise level, in steps that led to the last one; 0 where there were no two.
        again: 1 where this call's level is the last one's once more, as of second-order schedulers, else 0.
    """

    ahead: Tensor
    again: Tensor


class Clock:
    """The noise levels of one guidance branch's calls."""

    def __init__(self) -> None:
        self._level: Tensor | None = None
        self._step: Tensor | None = None

    def tick(self, time: Tensor | float) -> Pace:
        """Takes the next call's time, or time step: what falls with the noise level.

        Args:
            time: As the transformer is given it, one for each entry of the batch or each token.
        """
        level = torch.as_tensor(time).double().amax()  # tokens that are not noisy have time 0
        if self._level is None or self._step is None:
            self._level, self._step = level, torch.zeros_like(level)
            return Pace(torch.zeros_like(level), torch.zeros_like(level))
        change, before = level - self._level, self._step
        again = change == 0
        ahead = torch.where(before == 0, 0.0, change / before.masked_fill(before == 0, 1.0))
        self._level, self._step = level, torch.where(again, before, change)
        return Pace(ahead.clamp(0.0, FURTHEST), again.double())


class Trend:
    """The last change of one layer's keys or values, and how far on stale rows are shown.

    Args:
        kept: The rows ``[batch, heads, rows, channels]``, which are shown in their place.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        self._change = torch.zeros_like(kept, dtype=torch.int8)
        self._scale = kept.new_zeros((*kept.shape[:-1], 1))
        self._ahead = kept.new_zeros((*kept.shape[:SEQUENCE], 1, 1))  # of every head: shown rows are so far on

    @property
    def bytes(self) -> int:
        """Memory of the changes."""
        return self._change.nbytes + self._scale.nbytes

    def move(self, kept: Tensor) -> None:
        """Goes where the rows have gone, which are these now."""
        self.kept = kept
        self._change, self._scale, self._ahead = (
            own.to(kept.device) for own in (self._change, self._scale, self._ahead)
        )

    def renew(self, ranges: Sequence[Range], fresh: Tensor, pace: Pace, *, begins: bool, known: bool) -> None:
        """Puts fresh rows in place, and their change since the last call.

        Args:
            ranges: Where they are.
            fresh: The rows, in the order of the ranges.
            pace: Of the call that computed them.
            begins: Whether they are the first of that call: all other rows are then shown as far on as is worth it.
            known: Whether there were rows in their place before.
        """
        sizes = [high - low for low, high in ranges]
        pieces = fresh.split(sizes, SEQUENCE)
        if begins:  # all have been recomputed since rows were shown ahead
            self.settle()
        if known:
            changes = [self._changed(span, piece, pace) for span, piece in zip(ranges, pieces, strict=True)]
            if begins and sum(sizes) < self.kept.shape[SEQUENCE]:
                ahead = self._worth(changes, pace)
                self._show(ranges, ahead)
            for span, (change, _) in zip(ranges, changes, strict=True):
                self._pack(span, change)
        for (low, high), piece in zip(ranges, pieces, strict=True):
            self.kept.narrow(SEQUENCE, low, high - low).copy_(piece)

    def settle(self) -> None:
        """All rows are true ones now."""
        self._ahead.zero_()

    def entries(self, start: int, stop: int) -> Trend:
        """That of some entries of the batch, in the same memory."""
        part = object.__new__(Trend)
        part.kept, part._change = self.kept[start:stop], self._change[start:stop]
        part._scale, part._ahead = self._scale[start:stop], self._ahead[start:stop]
        return part

    def _changed(self, span: Range, fresh: Tensor, pace: Pace) -> tuple[Tensor, Tensor]:
        """The rows' change to a new value, and the change before."""
        low, count = span[0], span[1] - span[0]
        before = self._unpack(low, count)
        last = self.kept.narrow(SEQUENCE, low, count) - before * self._ahead
        return (fresh - last) + before * pace.again.to(fresh.dtype), before

    def _worth(self, changes: Sequence[tuple[Tensor, Tensor]], pace: Pace) -> Tensor:
        """How far on each head's stale rows are to be shown.

        Sums are made in float64, so that their order does not decide.
        """
        again = pace.again
        met = self._ahead.new_zeros(self._ahead.shape, dtype=torch.float64)
        size = torch.zeros_like(met)
        for change, before in changes:
            wide = before.double()
            came = change.double() - wide * again
            met += (came * wide).sum((2, 3), keepdim=True)
            size += (wide * wide).sum((2, 3), keepdim=True)
        worth = met > WORTH * pace.ahead * size
        return torch.where(worth, pace.ahead, 0.0).to(self._ahead.dtype)

    def _show(self, taken: Sequence[Range], ahead: Tensor) -> None:
        """Moves the rows outside some ranges on."""
        self._ahead.copy_(ahead)
        start, end = 0, self.kept.shape[SEQUENCE]
        for low, high in [*taken, (end, end)]:
            if low > start:
                self.kept.narrow(SEQUENCE, start, low - start).add_(self._unpack(start, low - start).mul_(self._ahead))
            start = high

    def _pack(self, span: Range, change: Tensor) -> None:
        low, count = span[0], span[1] - span[0]
        scale = change.abs().amax(-1, keepdim=True).div_(LEVELS)
        self._scale.narrow(SEQUENCE, low, count).copy_(scale)
        steps = change.div_(scale.masked_fill_(scale == 0, 1.0)).round_()
        self._change.narrow(SEQUENCE, low, count).copy_(steps)

    def _unpack(self, low: int, count: int) -> Tensor:
        change = self._change.narrow(SEQUENCE, low, count).to(self.kept.dtype)
        return change.mul_(self._scale.narrow(SEQUENCE, low, count))
