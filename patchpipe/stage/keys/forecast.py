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

from patchpipe.kernels.passes import passes_for
from patchpipe.kernels.trends import PLAIN, Passes, Rows, Sums
from patchpipe.stage.rows import Range

SEQUENCE = 2  # dim of the rows in [batch, heads, rows, channels]
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
        self._passes = _passes_of(kept)

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
        self._passes = _passes_of(kept)

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
        if not known:
            for (low, _), piece in zip(ranges, pieces, strict=True):
                self.kept.narrow(SEQUENCE, low, piece.shape[SEQUENCE]).copy_(piece)
            return
        told = [
            self._passes.renew(self._rows(*span), piece, self._ahead, pace.again, begins)
            for span, piece in zip(ranges, pieces, strict=True)
        ]
        if begins:
            self._go_on(ranges, _all([sums for sums in told if sums is not None]), pace)

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
        part._passes = self._passes
        return part

    def _go_on(self, taken: Sequence[Range], sums: Sums, pace: Pace) -> None:
        """Moves the rows outside some ranges on, as far as the rows inside tell that it is worth it."""
        if pace.watched:
            self._error.copy_(_missed(sums, pace))
        start, end = 0, self.kept.shape[SEQUENCE]
        if sum(high - low for low, high in taken) == end:
            return
        met = sums.met - sums.size * pace.again  # of which the change is a part
        self._ahead.copy_(torch.where(met > WORTH * pace.ahead * sums.size, pace.ahead, 0.0))
        for low, high in [*taken, (end, end)]:
            if low > start:
                self._passes.show(self._rows(start, low), self._ahead)
            start = high

    def _rows(self, low: int, high: int) -> Rows:
        return Rows(*(each.narrow(SEQUENCE, low, high - low) for each in (self.kept, self._change, self._scale)))


def _passes_of(kept: Tensor) -> Passes:
    return passes_for(kept.device, kept.dtype) if kept.stride(-1) == 1 else PLAIN


def _all(parts: Sequence[Sums]) -> Sums:
    """Of several ranges together."""
    if len(parts) == 1:
        return parts[0]
    size, met, came = (torch.stack([getattr(one, name) for one in parts]).sum(0) for name in ("size", "met", "came"))
    return Sums(size, met, came)


def _missed(sums: Sums, pace: Pace) -> Tensor:
    """The squared error of a forecast beside the squared change, of each entry; 0 where there is no forecast."""
    size, met, came = (each.sum((1, 2, 3)) for each in (sums.size, sums.met, sums.came))
    came = came - pace.again * (2 * met - pace.again * size)
    met = met - pace.again * size
    error = came - pace.ahead * (2 * met - pace.ahead * size)
    return torch.where((pace.ahead > 0) & (came > 0), error / came.clamp_min(torch.finfo(came.dtype).tiny), 0.0)
