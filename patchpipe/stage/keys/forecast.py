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
        watched: Whether the error of forecasts is asked for.
    """

    ahead: Tensor
    again: Tensor
    watched: bool = False


class Clock:
    """The noise levels of one guidance branch's calls.

    Args:
        watched: Whether the error of forecasts is asked for.
    """

    def __init__(self, *, watched: bool = False) -> None:
        self._watched = watched
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
            nothing = torch.zeros_like(level)
            return Pace(nothing, nothing, self._watched)
        change, before = level - self._level, self._step
        again = change == 0
        ahead = torch.where(before == 0, 0.0, change / before.masked_fill(before == 0, 1.0))
        self._level, self._step = level, torch.where(again, before, change)
        ahead = ahead.clamp(0.0, FURTHEST)
        return Pace(ahead, again.double(), self._watched)


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
        self._error = kept.new_zeros(kept.shape[0], dtype=torch.float64)  # of the forecast of the first rows

    @property
    def bytes(self) -> int:
        """Memory of the changes."""
        return self._change.nbytes + self._scale.nbytes

    def move(self, kept: Tensor) -> None:
        """Goes where the rows have gone, which are these now."""
        self.kept = kept
        self._change, self._scale, self._ahead, self._error = (
            own.to(kept.device) for own in (self._change, self._scale, self._ahead, self._error)
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
            before = [self._unpack(low, high - low) for low, high in ranges]
            changes = [self._changed(*each, pace) for each in zip(ranges, pieces, before, strict=True)]
            if begins and pace.watched:
                self._error.copy_(_missed(changes, before, pace))
            if begins and sum(sizes) < self.kept.shape[SEQUENCE]:
                self._show(ranges, self._worth(changes, before, pace))
            for span, change in zip(ranges, changes, strict=True):
                self._pack(span, change)
        for (low, high), piece in zip(ranges, pieces, strict=True):
            self.kept.narrow(SEQUENCE, low, high - low).copy_(piece)

    @property
    def error(self) -> float:
        """How much of the first rows' change a forecast would have missed in the last call, in the first entry.

        The squared error of the whole forecast, beside the squared change; 0 where there was none. Reads it from the
        device.
        """
        return float(self._error[0])

    def settle(self) -> None:
        """All rows are true ones now."""
        self._ahead.zero_()

    def entries(self, start: int, stop: int) -> Trend:
        """That of some entries of the batch, in the same memory."""
        part = object.__new__(Trend)
        part.kept, part._change = self.kept[start:stop], self._change[start:stop]
        part._scale, part._ahead, part._error = (each[start:stop] for each in (self._scale, self._ahead, self._error))
        return part

    def _changed(self, span: Range, fresh: Tensor, before: Tensor, pace: Pace) -> Tensor:
        """The rows' change to a new value; ``before`` is their last one."""
        shown = self.kept.narrow(SEQUENCE, span[0], span[1] - span[0])
        return torch.addcmul(fresh, before, self._ahead + pace.again.to(fresh.dtype)).sub_(shown)

    def _worth(self, changes: Sequence[Tensor], before: Sequence[Tensor], pace: Pace) -> Tensor:
        """How far on each head's stale rows are to be shown.

        Sums are made in float64, so that their order does not decide.
        """
        size = _dot(before, before)
        met = _dot(changes, before) - size * pace.again  # of which the change is a part
        return torch.where(met > WORTH * pace.ahead * size, pace.ahead, 0.0).to(self._ahead.dtype)

    def _show(self, taken: Sequence[Range], ahead: Tensor) -> None:
        """Moves the rows outside some ranges on."""
        self._ahead.copy_(ahead)
        start, end = 0, self.kept.shape[SEQUENCE]
        for low, high in [*taken, (end, end)]:
            if low > start:
                self.kept.narrow(SEQUENCE, start, low - start).addcmul_(self._unpack(start, low - start), self._ahead)
            start = high

    def _pack(self, span: Range, change: Tensor) -> None:
        low, count = span[0], span[1] - span[0]
        scale = torch.linalg.vector_norm(change, torch.inf, -1, keepdim=True).div_(LEVELS)
        self._scale.narrow(SEQUENCE, low, count).copy_(scale)
        steps = change.div_(scale.masked_fill_(scale == 0, 1.0)).round_()
        self._change.narrow(SEQUENCE, low, count).copy_(steps)

    def _unpack(self, low: int, count: int) -> Tensor:
        return self._change.narrow(SEQUENCE, low, count) * self._scale.narrow(SEQUENCE, low, count)


def _dot(rows: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Of each head ``[batch, heads, 1, 1]``."""
    parts = [
        (one * other).sum((2, 3), keepdim=True, dtype=torch.float64) for one, other in zip(rows, others, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _missed(changes: Sequence[Tensor], before: Sequence[Tensor], pace: Pace) -> Tensor:
    """The squared error of a forecast beside the squared change, of each entry; 0 where there is no forecast."""
    size, met = _dot(before, before).sum((1, 2, 3)), _dot(changes, before).sum((1, 2, 3))
    came = _dot(changes, changes).sum((1, 2, 3)) - pace.again * (2 * met - pace.again * size)
    met = met - pace.again * size
    error = came - pace.ahead * (2 * met - pace.ahead * size)
    return torch.where((pace.ahead > 0) & (came > 0), error / came.clamp_min(torch.finfo(came.dtype).tiny), 0.0)
